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
    room = backbone.text_room
    if n_ctx >= room:
        raise ValueError(
            f"n_ctx: a context of {backbone.context_length} tokens holds at most {room - 1} vectors, got {n_ctx}"
        )
    classes.require_room(room, n_ctx, "names")
