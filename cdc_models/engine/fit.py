"""Training: SGD with one warm-up epoch and a cosine, as the CoOp family publishes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cdc_models.methods.base import Method

__all__ = ["FitResult", "fit", "learning_rate"]


@dataclass(frozen=True)
class FitResult:
    """What a call of `fit` did.

    Attributes:
        losses: mean loss of every finished epoch.
        steps: optimiser steps taken.
        seconds: wall time.
        interrupted: True if Ctrl-C ended it early; the model keeps what it had learned by then.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False


def learning_rate(epoch: int, epochs: int, lr: float, warmup_epochs: int = 1, warmup_lr: float = 1e-5) -> float:
    """Learning rate of an epoch: constant `warmup_lr`, then a cosine that counts all epochs.

    ``lr(e) = lr / 2 (1 + cos(pi (e - warmup) / T))`` for e >= warmup, with T = epochs.

    Source: MaPLe's published schedule (one warm-up epoch at 1e-5).

    Example:
        >>> [round(learning_rate(e, 5, 0.0035), 5) for e in range(5)]
        [1e-05, 0.0035, 0.00317, 0.00229, 0.00121]
    """
    if epoch < warmup_epochs:
        return warmup_lr
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs))


def fit(
    model: Method,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 5,
    lr: float = 0.0035,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup_epochs: int = 1,
    warmup_lr: float = 1e-5,
    seed: int | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
    on_epoch: Callable[[int, float], None] | None = None,
) -> FitResult:
    """Train what a method learns; the backbone stays frozen.

    The defaults are MaPLe's base-to-new settings. Ctrl-C finishes the step and returns with
    `interrupted=True`.

    Args:
        model: a method with something to learn.
        loader: yields (images [B, 3, H, W], targets [B]), once through per epoch.
        epochs: passes over the loader; 0 leaves the model as it is.
        lr, momentum, weight_decay: of SGD.
        warmup_epochs, warmup_lr: see `learning_rate`.
        seed: of torch's global generator, which augmentations draw from; the loader's own shuffling is seeded by
            its generator.
        autocast: run forward passes in this dtype (`torch.bfloat16`); learned parameters stay float32.
        progress: show a progress bar.
        on_epoch: called after each epoch with its number and mean loss.

    Returns:
        FitResult.

    Raises:
        ValueError: for settings out of range, a model with nothing to learn, or a loss that is not finite (the
            message says at which step; parameters keep their last finite values).
    """
    if epochs < 0 or warmup_epochs < 0:
        raise ValueError(f"epochs, warmup_epochs: expected numbers >= 0, got {epochs}, {warmup_epochs}")
    if not (0 < lr < float("inf") and 0 <= momentum < 1 and weight_decay >= 0):
        raise ValueError(
            f"lr, momentum, weight_decay: expected lr > 0, 0 <= momentum < 1, weight_decay >= 0, "
            f"got {lr}, {momentum}, {weight_decay}"
        )
    groups = model.parameter_groups(weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError(f"model: {type(model).__name__} has nothing to learn")
    if seed is not None:
        torch.manual_seed(seed)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    device = model.backbone.device
    losses: list[float] = []
    steps, started, interrupted = 0, time.perf_counter(), False
    per_epoch = len(loader) if isinstance(loader, Sized) else None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    model.train()
    with Progress(*columns, transient=True) if progress else nullcontext() as bar:
        task = None
        if bar is not None:
            total = None if per_epoch is None else per_epoch * epochs
            task = bar.add_task(f"training {model.name}", total=total, note="")
        try:
            for epoch in range(epochs):
                for group in optimizer.param_groups:
                    rate = learning_rate(epoch, epochs, lr, warmup_epochs, warmup_lr)
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                total_loss, seen = 0.0, 0
                for images, targets in loader:
                    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                        loss = model.loss(images, targets)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise ValueError(
                            f"the loss became {value} at step {steps} (epoch {epoch}); try a smaller lr than {lr}"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    steps += 1
                    total_loss, seen = total_loss + value * len(images), seen + len(images)
                    if bar is not None and task is not None:
                        bar.update(task, advance=1, note=f"epoch {epoch + 1}/{epochs} loss {total_loss / seen:.3f}")
                losses.append(total_loss / max(seen, 1))
                if on_epoch is not None:
                    on_epoch(epoch, losses[-1])
        except KeyboardInterrupt:
            interrupted = True
    model.eval()
    return FitResult(losses, steps, time.perf_counter() - started, interrupted)
