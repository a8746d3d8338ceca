"""What a finished test says of itself, told from what somebody has edited."""

from __future__ import annotations

from types import UnionType
from typing import Any

__all__ = ["is_test"]

_KINDS: dict[str, type | UnionType] = {
    "key": str,
    "protocol": str,
    "dataset": str,
    "method": str,
    "split": str,
    "source": str,
    "backbone": str,
    "seed": int,
    "shots": int,
    "recipe": dict,
    "accuracy": float,
    "ece": float,
    "calibrated_ece": float | None,
    "skipped_images": list,
    "train_skipped": list,
}
"""What tables and reports read of a line of results.jsonl."""


def is_test(row: Any) -> bool:
    """Whether a row is what `Runner` writes, as far as others read it.

    Example:
        >>> is_test({"key": "[]", "accuracy": "high"})
        False
    """
    if not isinstance(row, dict) or not all(isinstance(row.get(name, ...), kind) for name, kind in _KINDS.items()):
        return False
    parts = [row[name] for name in ("accuracy", "ece", "calibrated_ece") if row[name] is not None]
    images = [*row["skipped_images"], *row["train_skipped"]]
    return (
        all(0 <= part <= 1 for part in parts)
        and isinstance(row["recipe"].get("method"), str)
        and all(isinstance(image, dict) and isinstance(image.get("path"), str) for image in images)
    )
