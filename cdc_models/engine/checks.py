"""Argument errors of training and evaluation: what is no method, no loader, no batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cdc_models.methods.base import Method

__all__ = ["check_loader", "check_method", "pair_of"]


def check_method(model: object) -> None:
    """Raise ValueError unless `model` is a method."""
    if not isinstance(model, Method):
        raise ValueError(f"model: expected a method, such as CDC(backbone, names), got {type(model).__name__}")


def check_loader(loader: object) -> None:
    """Raise ValueError unless `loader` can be passed over."""
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor | str):
        kind = type(loader).__name__
        raise ValueError(f"loader: expected a DataLoader or other batches (images, targets), got {kind}")


def pair_of(batch: object) -> tuple[Tensor, Tensor]:
    """Images and targets of one batch of a loader, or a ValueError that says what came instead."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        inside = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(f"loader: expected batches (images, targets), got a {type(batch).__name__}{inside}")
    images, targets = batch
    try:
        return images, torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"loader: expected targets that are class indices, got {targets!r:.80}") from error
