"""Training: SGD with one warm-up epoch and a cosine, as the CoOp family publishes it."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cdc_models import processes
from cdc_models.clip.checks import check_count
from cdc_models.engine.checkpoint import Checkpoint, Position, Randomness
from cdc_models.engine.checks import check_loader, check_method, check_share, pair_of
from cdc_models.methods.base import Method
from cdc_models.seeds import as_seed, check_seed
from cdc_ops import NonFiniteError, checks

__all__ = ["FitResult", "fit", "learning_rate"]


@dataclass(frozen=True)
class FitResult:
    """What a call of `fit` did.

    Attributes:
        losses: mean loss of every finished epoch, with those before a resumed checkpoint.
        steps: optimiser steps taken, likewise.
        seconds: wall time of this call.
        interrupted: True if Ctrl-C ended it early; the model keeps what it had learned by then.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False


def learning_rate(epoch: int, epochs: int, lr: float, warmup_epochs: int = 1, warmup_lr: float = 1e-5) -> float:
    """Learning rate of an epoch: constant `warmup_lr`, then a cosine that counts all epochs.

    ``lr(e) = lr / 2 (1 + cos(pi (e - warmup) / T))`` for e >= warmup, with T = epochs.

    Raises:
        ValueError: a negative epoch, or none in all.

    Source: MaPLe's published schedule (one warm-up epoch at 1e-5).

    Example:
        >>> [round(learning_rate(e, 5, 0.0035), 5) for e in range(5)]
        [1e-05, 0.0035, 0.00317, 0.00229, 0.00121]
    """
    check_count("epoch", epoch, low=0)
    check_count("epochs", epochs)
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
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    progress: bool = True,
    on_epoch: Callable[[int, float], None] | None = None,
) -> FitResult:
    """Train what a method learns; the backbone stays frozen.

    The defaults are MaPLe's base-to-new settings. Ctrl-C finishes the step, writes the checkpoint and returns with
    `interrupted=True`; a second Ctrl-C stops at once. After `model.compile()` the steps are compiled ones.

    With `checkpoint`, a run that was cut off anywhere, also by SIGKILL, goes on where it stood when the same call is
    made again, and ends (on a CPU) with bitwise the same parameters as a run that was not. For that the loader must
    draw its order from torch's global generator, from its own `generator` or its sampler's, as a DataLoader does;
    batches of a half-finished epoch are read again and skipped.

    In a process group (torchrun and `processes.joined`, or your own) all processes make the same call, each with a
    loader of its share of every batch, such as `ImageLoader(..., part=processes.part())`. Parameters start as the first
    process's; a step is that of one process on all shares, since gradients are averaged over images. The first process
    writes the checkpoint, which every process must be able to read, and shows the progress; a run goes on with as many
    processes as it had. Ctrl-C in one process stops all after the same step.

    Args:
        model: a method with something to learn.
        loader: yields (images [B, 3, H, W], targets [B]), once through per epoch.
        epochs: passes over the loader; 0 leaves the model as it is. The first `warmup_epochs` do not use `lr`: if there
            are no others, a warning says so.
        lr, momentum, weight_decay: of SGD.
        warmup_epochs, warmup_lr: see `learning_rate`.
        seed: of torch's global generator, which augmentations draw from, differently in each process; the loader's
            own shuffling is seeded by its generator, which must be the same in all.
        autocast: run forward passes in this dtype (`torch.bfloat16`); learned parameters stay float32.
        checkpoint: file of the run's state, read if it is there, written after every epoch; its folder must exist.
        checkpoint_every: write it also after every so many steps; 0: only after epochs.
        progress: show a progress bar.
        on_epoch: called after each epoch with its number and mean loss, in every process.

    Returns:
        FitResult.

    Raises:
        ValueError: for settings out of range or of another type, a model with nothing to learn, a loader that gives no
            batch or another process's part, images or targets that `Method.loss` refuses, or a loss that is not finite
            (the message says at which step; no checkpoint of it is written).
        CheckpointError: a checkpoint that is damaged or belongs to another run (a ValueError).
        OSError: a checkpoint that cannot be written; found out before the first step, and an earlier one is kept.
            FirstFailed in the other processes.

    Source: optimiser and schedule as CoOp (Zhou et al., IJCV 2022) and MaPLe (Khattak et al., CVPR 2023) publish them.

    Example:
        >>> import torch
        >>> from cdc_models import CoOp, fit, load_clip
        >>> model = CoOp(load_clip("bundled"), ["cat", "dog"])
        >>> images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> loader = [(images[:2], torch.tensor([0, 1])), (images[2:], torch.tensor([1, 0]))]
        >>> result = fit(model, loader, epochs=2, seed=0, progress=False)
        >>> result.steps, len(result.losses), result.interrupted
        (4, 2, False)
    """
    check_method(model)
    check_loader(loader)
    check_share(loader)
    for argument, count in (
        ("epochs", epochs),
        ("warmup_epochs", warmup_epochs),
        ("checkpoint_every", checkpoint_every),
    ):
        check_count(argument, count, low=0)
    lr = checks.number("lr", lr, low=0.0, open_low=True)
    momentum = checks.number("momentum", momentum, low=0.0)
    if momentum >= 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    weight_decay = checks.number("weight_decay", weight_decay, low=0.0)
    warmup_lr = checks.number("warmup_lr", warmup_lr, low=0.0)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast: expected torch.bfloat16, torch.float16 or None, got {autocast!r}")
    if on_epoch is not None and not callable(on_epoch):
        raise ValueError(f"on_epoch: expected a function of an epoch and its loss, or None, got {on_epoch!r:.80}")
    if 0 < epochs <= warmup_epochs and processes.is_first():
        warnings.warn(
            f"epochs: expected more than warmup_epochs={warmup_epochs}, got {epochs}; lr={lr} is never used, only "
            f"warmup_lr={warmup_lr}",
            stacklevel=2,
        )
    groups = model.parameter_groups(weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError(f"model: {type(model).__name__} has nothing to learn")
    if seed is not None:
        check_seed(seed)
        torch.manual_seed(as_seed(seed + 1_000_003 * processes.part()[0]))
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    device, started = model.backbone.device, time.perf_counter()
    per_epoch = len(loader) if isinstance(loader, Sized) else None
    if checkpoint is not None and getattr(loader, "persistent_workers", False):
        raise ValueError("loader: persistent workers keep random states of their own; a checkpoint needs them off")
    randomness = Randomness(loader, device)
    position, now = Position(), None
    epoch_start = randomness.read()
    kept: Checkpoint | None = None
    shared = {
        "epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "seed": seed,
        "warmup_epochs": warmup_epochs, "warmup_lr": warmup_lr, "autocast": str(autocast),
        "processes": processes.part()[1],
    }  # fmt: skip
    data = {
        "batches": per_epoch, "images": _length(getattr(loader, "dataset", None)),
        "batch_size": getattr(loader, "batch_size", None),
    }  # fmt: skip
    _require_same({**shared, "checkpoint_every": checkpoint_every})
    run = {**shared, **processes.gather_json(data)[0]}  # loaders may have shares of different length
    parameters = list(model.learned_parameters().values())
    processes.share_tensors(parameters)
    if checkpoint is not None:
        kept = Checkpoint(Path(checkpoint), model, optimizer, randomness, run)
        if (found := kept.load()) is not None:
            position, epoch_start, now = found
    _require_same({"the checkpoint that they read": None if now is None else asdict(position)})
    if kept is not None and now is None:
        kept.save(position, epoch_start)  # a folder that cannot be written is found out now, not after an epoch
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    interrupted = stop = False
    progress = progress and processes.is_first()
    nothing = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def save() -> None:
        if kept is not None:
            _require_finite(model, position, lr)
            kept.save(position, epoch_start)

    model.train()
    with Progress(*columns, transient=True) if progress else nullcontext() as bar, _one_ctrl_c() as stopped:
        task = None
        if bar is not None:
            total = None if per_epoch is None else per_epoch * epochs
            task = bar.add_task(f"training {model.name}", total=total, completed=position.steps, note="")
        try:
            while position.epoch < epochs and not stop:
                for group in optimizer.param_groups:
                    rate = learning_rate(position.epoch, epochs, lr, warmup_epochs, warmup_lr)
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                if now is not None:
                    randomness.write(epoch_start)
                batches = map(pair_of, loader)
                if now is not None and position.batch:  # cut off within an epoch: read again what was done, then go on
                    next(islice(batches, position.batch, position.batch), None)
                    randomness.write(now)
                now = None
                for images, targets in processes.in_step(batches, nothing):
                    optimizer.zero_grad(set_to_none=True)
                    value = 0.0
                    if len(images) or shared["processes"] == 1:
                        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                            try:
                                loss = model.loss(images, targets)
                            except ValueError as error:
                                _require_finite(model, position, lr)  # which is the reason, if it is one
                                # what is not finite and did not come from the loader was made by training
                                if isinstance(error, NonFiniteError) and bool(images.isfinite().all()):
                                    raise ValueError(
                                        f"training diverged at step {position.steps} (epoch {position.epoch}); try a "
                                        f"smaller lr than {lr} ({error})"
                                    ) from error
                                raise
                        loss.backward()
                        value = float(loss.detach())
                    count, value, stop = processes.sum_gradients(parameters, len(images), value, stopped.is_set())
                    if not math.isfinite(value):
                        raise ValueError(
                            f"the loss became {value} at step {position.steps} (epoch {position.epoch}); "
                            f"try a smaller lr than {lr}"
                        )
                    if count:
                        optimizer.step()
                        position.steps += 1
                    position.batch += 1
                    position.total += value * count
                    position.seen += count
                    if bar is not None and task is not None:
                        note = f"epoch {position.epoch + 1}/{epochs} loss {position.total / max(position.seen, 1):.3f}"
                        bar.update(task, advance=1, note=note)
                    due = checkpoint_every and position.steps % checkpoint_every == 0
                    if due or stop:
                        save()
                    if stop:
                        break
                else:
                    if position.seen == 0:
                        raise ValueError(
                            f"loader: gave no batch in epoch {position.epoch}; expected one that can be passed over "
                            f"{epochs} times"
                        )
                    mean = position.end_epoch()
                    epoch_start = randomness.read()
                    save()
                    if on_epoch is not None:
                        on_epoch(position.epoch - 1, mean)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            model.eval()
        interrupted = interrupted or stop
        if interrupted and kept is not None and bar is not None:
            bar.console.print(f"Interrupted at step {position.steps}; the same call goes on from {kept.path}.")
    return FitResult(position.losses, position.steps, time.perf_counter() - started, interrupted)


def _length(dataset: object) -> int | None:
    return len(dataset) if isinstance(dataset, Sized) else None


def _require_same(values: dict[str, Any]) -> None:
    """Raise ValueError where processes differ: they would wait for each other, or average what is not of one run."""
    everyone = processes.gather_json(values)
    for rank, theirs in enumerate(everyone):
        if told := [name for name in values if theirs[name] != everyone[0][name]]:
            raise ValueError(f"expected the same run in all processes; {rank} and 0 differ in {', '.join(told)}")


def _require_finite(model: Method, position: Position, lr: float) -> None:
    if not all(bool(p.isfinite().all()) for p in model.learned_parameters().values()):
        raise ValueError(f"parameters are not finite after step {position.steps}; try a smaller lr than {lr}")


@contextmanager
def _one_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step is finished; the second one interrupts as usual."""
    stopped = threading.Event()
    usual = signal.getsignal(signal.SIGINT)
    # Signals belong to the main thread, and a handler that somebody else has set is theirs.
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield stopped
        return

    def first(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, first)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, usual)
