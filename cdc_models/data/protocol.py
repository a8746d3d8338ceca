"""The rules of CoOp's and MaPLe's evaluation as small pure functions."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from cdc_ops import checks

__all__ = ["base_new_split", "few_shot_indices", "harmonic_mean", "hold_out"]

Label = TypeVar("Label", bound=Hashable)


def base_new_split(labels: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Labels halved into base and new, each relabelled from 0.

    The distinct labels are sorted; the first ceil(n / 2) are base, the rest new.

    Args:
        labels: any sequence that contains every label at least once.

    Returns:
        Two maps from the label given to the label within its half.

    Raises:
        ValueError: with fewer than two distinct labels.

    Source: CoCoOp (Zhou et al., CVPR 2022), its published protocol.

    Example:
        >>> base_new_split([7, 3, 3, 9])
        ({3: 0, 7: 1}, {9: 0})
    """
    distinct = sorted(set(labels))
    if len(distinct) < 2:
        raise ValueError(f"labels: expected at least two distinct labels, got {distinct}")
    half = (len(distinct) + 1) // 2
    return (
        {label: i for i, label in enumerate(distinct[:half])},
        {label: i for i, label in enumerate(distinct[half:])},
    )


def few_shot_indices(labels: Sequence[Label], shots: int, seed: int | random.Random) -> list[int]:
    """Indices of a few-shot draw: `shots` per label, labels in the order of their first appearance.

    A label with fewer items than `shots` gives all it has.

    Args:
        labels: of all items.
        shots: items per label.
        seed: or a generator, to go on with the one that an earlier draw has used: the published validation shots
            come after the training shots from the same generator.

    Raises:
        ValueError: if `shots` is not positive.

    Source: CoOp (Zhou et al., IJCV 2022), its published protocol: one `random.sample` per label after seeding.

    Example:
        >>> sorted(few_shot_indices(["a", "b", "a", "a", "b"], shots=2, seed=1))[-2:]
        [3, 4]
    """
    if shots < 1:
        raise ValueError(f"shots: expected a positive number, got {shots}")
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    chosen: list[int] = []
    for items in _indices_by_label(labels).values():
        chosen += rng.sample(items, shots) if len(items) >= shots else items
    return chosen


def hold_out(labels: Sequence[Label], parts: Sequence[float], seed: int) -> tuple[list[int], ...]:
    """Indices of what is kept, and of parts held out of every label by chance, for data without splits of its own.

    Of a label's n items round(n part) go to each part, in the order given, but one at least is kept.

    Args:
        labels: of all items. parts: each in [0, 1), together less than 1. seed: of the draw.

    Returns:
        The kept indices, then those of each part, in rising order.

    Raises:
        ValueError: for parts out of range.

    Example:
        >>> kept, test, val = hold_out(["a"] * 10 + ["b"], (0.2, 0.1), seed=1)
        >>> len(kept), len(test), len(val)
        (8, 2, 1)
    """
    if not all(0 <= part < 1 for part in parts) or not sum(parts) < 1:
        raise ValueError(f"parts: expected numbers in [0, 1) with a sum below 1, got {list(parts)}")
    rng = random.Random(seed)
    chosen: list[list[int]] = [[] for _ in range(len(parts) + 1)]
    for items in _indices_by_label(labels).values():
        rest = rng.sample(items, len(items))
        for take, part in enumerate(parts, start=1):
            count = min(round(len(items) * part), len(rest) - 1)
            chosen[take] += rest[:count]
            rest = rest[count:]
        chosen[0] += rest
    return tuple(sorted(indices) for indices in chosen)


def _indices_by_label(labels: Sequence[Label]) -> dict[Label, list[int]]:
    """Label -> its indices; labels in the order of their first appearance."""
    of_label: dict[Label, list[int]] = {}
    for index, label in enumerate(labels):
        of_label.setdefault(label, []).append(index)
    return of_label


def harmonic_mean(base: float, new: float) -> float:
    """H of base and new accuracy, both as parts or both in per cent; 0 if either is 0.

    Raises:
        ValueError: what is no number, or a negative one.

    Source: the figure that CoCoOp (Zhou et al., CVPR 2022) and MaPLe report for base-to-new transfer.

    Example:
        >>> round(harmonic_mean(82.28, 75.14), 2)
        78.55
    """
    base, new = checks.number("base", base, low=0.0), checks.number("new", new, low=0.0)
    return 0.0 if base == 0 or new == 0 else 2 * base * new / (base + new)
