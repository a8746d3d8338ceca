"""Argument errors of the methods' options, raised when a method is built."""

from __future__ import annotations

from cdc_models.clip import ClassTokens, ClipBackbone
from cdc_models.clip.checks import check_count

__all__ = ["check_flags", "check_room"]


def check_flags(**flags: object) -> None:
    """Raise ValueError unless every one is True or False: the text "false" would count as true."""
    if wrong := {argument: value for argument, value in flags.items() if not isinstance(value, bool)}:
        argument, value = next(iter(wrong.items()))
        raise ValueError(f"{argument}: expected True or False, got {value!r}")


def check_room(backbone: ClipBackbone, classes: ClassTokens, n_ctx: int) -> None:
    """Raise ValueError unless start, `n_ctx` vectors, every class name and end fit the text tower's context."""
    check_count("n_ctx", n_ctx)
    length = backbone.context_length
    if length - 2 - n_ctx < 1:
        raise ValueError(f"n_ctx: a context of {length} tokens holds at most {length - 3} vectors, got {n_ctx}")
    classes.require_room(length, n_ctx, "names")
