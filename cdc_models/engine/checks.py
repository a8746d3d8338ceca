"""Argument errors of training and evaluation: what is no method, no loader, no batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from cdc_models import processes
from cdc_models.methods.base import Method

__all__ = ["check_everything", "check_loader", "check_method", "check_share", "pair_of"]


def check_method(model: object) -> None:
    """Raise ValueError unless `model` is a method."""
    if not isinstance(model, Method):
        raise ValueError(f"model: expected a method, such as CDC(backbone, names), got {type(model).__name__}")


def check_loader(loader: object) -> None:
    """Raise ValueError unless `loader` can be passed over."""
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor | str):
        kind = type(loader).__name__
        raise ValueError(f"loader: expected a DataLoader or other batches (images, targets), got {kind}")


def check_share(loader: object) -> None:
    """Raise ValueError if `loader` says that it gives another process's share of every batch than this one's."""
    share, own = _share_of(loader), processes.part()
    if share not in (None, own):
        raise ValueError(f"loader: expected part {own} of every batch, as of processes.part(), got part {share}")


def check_everything(loader: object) -> bool:
    """Whether `loader` gives this process's share of every batch, and not everything.

    Raises:
        ValueError: for another share, or shares that hold images twice.
    """
    share, own = _share_of(loader), processes.part()
    if share in (None, (0, 1)):
        return False
    if _sampler_of(loader) is not None:
        raise ValueError(
            f"loader: its DistributedSampler gives part {share} and repeats images at the end; expected everything, "
            "or ImageLoader(..., part=processes.part())"
        )
    if share != own:
        raise ValueError(f"loader: expected one of everything or of part {own}, got part {share}")
    return True


def _share_of(loader: object) -> object:
    """(r, n) if a loader says that it gives process r of n its share; None if it says nothing."""
    if (sampler := _sampler_of(loader)) is not None:
        return sampler.rank, sampler.num_replicas
    return getattr(loader, "part", None)


def _sampler_of(loader: object) -> DistributedSampler[object] | None:
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    both = (getattr(loader, "sampler", None), inner)
    return next((sampler for sampler in both if isinstance(sampler, DistributedSampler)), None)


def pair_of(batch: object) -> tuple[Tensor, Tensor]:
    """Images and targets of one batch of a loader, or a ValueError that says what came instead."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        inside = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(f"loader: expected batches (images, targets), got a {type(batch).__name__}{inside}")
    images, targets = batch
    try:
        targets = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"loader: expected targets that are class indices, got {targets!r:.80}") from error
    if targets.shape != images.shape[:1]:
        raise ValueError(f"targets: expected shape {list(images.shape[:1])} to match images, got {list(targets.shape)}")
    return images, targets
