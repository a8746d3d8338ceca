"""Argument errors of the methods' options, raised when a method is built."""

from __future__ import annotations

from cdc_models.clip import ClassTokens, ClipBackbone

__all__ = ["check_count", "check_room"]


def check_count(argument: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: expected a whole number >= 1, got {value!r}")


def check_room(backbone: ClipBackbone, classes: ClassTokens, n_ctx: int) -> None:
    """Raise ValueError unless start, `n_ctx` vectors, every class name and end fit the text tower's context."""
    check_count("n_ctx", n_ctx)
    length = backbone.context_length
    if length - 2 - n_ctx < 1:
        raise ValueError(f"n_ctx: a context of {length} tokens holds at most {length - 3} vectors, got {n_ctx}")
    classes.require_room(length, n_ctx, "names")
