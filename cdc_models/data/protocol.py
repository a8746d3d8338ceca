"""The rules of CoOp's and MaPLe's evaluation as small pure functions."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

__all__ = ["base_new_split", "few_shot_indices", "harmonic_mean"]

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


def few_shot_indices(labels: Sequence[Label], shots: int, seed: int) -> list[int]:
    """Indices of a few-shot draw: `shots` per label, labels in the order of their first appearance.

    A label with fewer items than `shots` gives all it has.

    Raises:
        ValueError: if `shots` is not positive.

    Source: CoOp (Zhou et al., IJCV 2022), its published protocol: one `random.sample` per label after seeding.

    Example:
        >>> sorted(few_shot_indices(["a", "b", "a", "a", "b"], shots=2, seed=1))[-2:]
        [3, 4]
    """
    if shots < 1:
        raise ValueError(f"shots: expected a positive number, got {shots}")
    of_label: dict[Label, list[int]] = {}
    for index, label in enumerate(labels):
        of_label.setdefault(label, []).append(index)
    rng = random.Random(seed)
    chosen: list[int] = []
    for items in of_label.values():
        chosen += rng.sample(items, shots) if len(items) >= shots else items
    return chosen


def harmonic_mean(base: float, new: float) -> float:
    """H of base and new accuracy; 0 if either is 0.

    Example:
        >>> round(harmonic_mean(82.28, 75.14), 2)
        78.55
    """
    return 0.0 if base <= 0 or new <= 0 else 2 * base * new / (base + new)
