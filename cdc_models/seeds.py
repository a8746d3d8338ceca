"""Seeds: which numbers are, and what follows from them."""

from __future__ import annotations

import hashlib

__all__ = ["as_seed", "check_seed"]


def check_seed(seed: object) -> None:
    """Raise ValueError unless torch's generators take `seed`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not _is_taken(seed):
        raise ValueError(f"seed: expected a whole number of at most 64 bits, got {seed!r}")


def as_seed(number: int) -> int:
    """A number that was made from a seed, as torch's generators take it: itself if they do, else 64 bits of its hash.

    Example:
        >>> as_seed(3), as_seed(2**64 + 3) < 2**64
        (3, True)
    """
    if _is_taken(number):
        return number
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big")


def _is_taken(number: int) -> bool:
    return -(2**63) <= number < 2**64
