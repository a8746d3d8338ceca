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
    room = length - 2 - n_ctx
    if room < 1:
        raise ValueError(f"n_ctx: a context of {length} tokens holds at most {length - 3} vectors, got {n_ctx}")
    if long := [name for name, n in zip(classes.names, classes.token_lengths, strict=True) if n > room]:
        raise ValueError(
            f"names: {long} do not fit: start, {n_ctx} context vectors and end leave {room} of {length} tokens"
        )
