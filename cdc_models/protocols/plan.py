"""Which trainings a protocol asks for, and on what each is tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PROTOCOLS", "TRANSFER", "Cell", "Target", "plan"]

TRANSFER = ("cross-dataset", "domain-generalisation")
"""The protocols that learn from one source and are tested on other datasets too."""

PROTOCOLS = ("base-to-new", "few-shot", *TRANSFER)


@dataclass(frozen=True)
class Target:
    """A test set: a dataset, and which of its classes: "all", or the "base" or "new" half."""

    dataset: str
    half: str = "all"


@dataclass(frozen=True)
class Cell:
    """One training of every method: shots of a dataset by a seed; and what it is tested on."""

    source: str
    shots: int
    seed: int
    targets: tuple[Target, ...]
    half: str = "all"


def plan(
    protocol: str, datasets: Sequence[str], seeds: Sequence[int], shots: Sequence[int], source: str | None = None
) -> list[Cell]:
    """The cells of a protocol.

    - base-to-new: train on the base half of each dataset, test on its base and its new half.
    - few-shot: train and test on all classes of each dataset, for every number of shots.
    - cross-dataset, domain-generalisation: train on the source, test on it and on the datasets.

    Args:
        protocol: one of `PROTOCOLS`.
        datasets: what is trained and tested on; for the last two only tested.
        seeds: of the draws. shots: images per class; one number but for few-shot.
        source: for the last two, what is trained on.

    Raises:
        ValueError: for another protocol, lists that are empty or hold something twice, or numbers out of range.

    Example:
        >>> plan("base-to-new", ["EuroSAT"], [1], [16])[0].targets
        (Target(dataset='EuroSAT', half='base'), Target(dataset='EuroSAT', half='new'))
        >>> [target.dataset for target in plan("cross-dataset", ["EuroSAT"], [1], [16], "ImageNet")[0].targets]
        ['ImageNet', 'EuroSAT']
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    for name, values in (("datasets", datasets), ("seeds", seeds), ("shots", shots)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected at least one and none twice, got {list(values)}")
    if min(shots) < 1:
        raise ValueError(f"shots: expected positive numbers, got {list(shots)}")
    transfer = protocol in TRANSFER
    if transfer != (source is not None):
        raise ValueError(f"source: {protocol} expected {'a' if transfer else 'no'} source, got {source!r}")
    if source is not None:
        targets = tuple(Target(dataset) for dataset in (source, *(d for d in datasets if d != source)))
        return [Cell(source, n, seed, targets) for n in shots for seed in seeds]
    if protocol == "few-shot":
        return [Cell(d, n, seed, (Target(d),)) for d in datasets for n in shots for seed in seeds]
    return [
        Cell(d, n, seed, (Target(d, "base"), Target(d, "new")), "base")
        for d in datasets
        for n in shots
        for seed in seeds
    ]
