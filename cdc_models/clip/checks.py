"""Argument errors of the towers: what was given, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from cdc_ops import NonFiniteError


def shape_of(x: object) -> str:
    """A tensor's shape and dtype, or another object's type, for error messages."""
    return f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def check_count(argument: str, value: object, low: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{argument}: expected a whole number >= {low}, got {value!r}")


def usable_device(device: torch.device | str | int) -> torch.device:
    """The device, or a ValueError if torch does not know it or this machine does not have it."""
    try:
        known = torch.device(device)
        torch.empty(1, device=known)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device!r} cannot be used: {reason}") from error
    return known


def check_prompts(
    context: Tensor,
    deep: Tensor | None,
    *,
    width: int,
    depth: int,
    device: torch.device,
    classes: int | None = None,
) -> None:
    """Raise ValueError unless `context` is [M, n, width] (or [M, classes, n, width]) and `deep` fits it."""
    expected = f"[M, n, {width}]" + (f" or [M, {classes}, n, {width}]" if classes is not None else "")
    good = isinstance(context, Tensor) and context.is_floating_point() and context.ndim in (3, 4)
    if good and context.ndim == 4:
        good = classes is not None and context.size(1) == classes
    if not good or context.size(-1) != width or context.size(0) == 0:
        raise ValueError(f"context: expected a floating-point tensor {expected} with M >= 1, got {shape_of(context)}")
    if context.device != device:
        raise ValueError(f"context is on {context.device}, the backbone is on {device}")
    if deep is None:
        return
    if context.ndim == 4:
        raise ValueError(
            "deep: deep prompts need a context shared by all classes [M, n, W], got the class-specific context "
            f"{list(context.shape)}"
        )
    m, n = context.shape[:2]
    good = isinstance(deep, Tensor) and deep.is_floating_point() and deep.ndim == 4
    if not good or (deep.size(0), deep.size(2), deep.size(3)) != (m, n, width) or deep.size(1) > depth - 1:
        raise ValueError(
            f"deep: expected a floating-point tensor [M, J-1, n, W] = [{m}, at most {depth - 1}, {n}, {width}], "
            f"got {shape_of(deep)}"
        )
    if deep.device != device:
        raise ValueError(f"deep is on {deep.device}, the backbone is on {device}")


def check_images(images: Tensor, shape: tuple[int, int], device: torch.device, prompts: int | None = None) -> None:
    """Raise ValueError unless `images` are finite floats [B, 3, H, W] (or [B, prompts, 3, H, W])."""
    h, w = shape
    expected = f"[B, 3, {h}, {w}]" + (f" or [B, {prompts}, 3, {h}, {w}]" if prompts is not None else "")
    # dense, and of at least 16 bits: torch computes little with others
    dense = isinstance(images, Tensor) and images.layout == torch.strided and images.dtype.itemsize > 1
    if not dense or not images.is_floating_point():
        raise ValueError(
            f"images: expected a dense floating-point tensor {expected}, normalised as by backbone.preprocess, "
            f"got {shape_of(images)}"
        )
    good = images.ndim == 4 or (images.ndim == 5 and prompts is not None and images.size(1) == prompts)
    if not good or tuple(images.shape[-3:]) != (3, h, w) or images.size(0) == 0:
        raise ValueError(f"images: expected {expected} with B >= 1, got {shape_of(images)}")
    if images.device != device:
        raise ValueError(f"images are on {images.device}, the backbone is on {device}")
    # Reading a value would break a compiled graph in two; compiled code is checked when it runs eagerly.
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(images).all()):
        raise NonFiniteError("images: expected finite values, got NaN or infinity")
