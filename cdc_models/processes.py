"""Several processes that do one run together, as torchrun or accelerate launch starts them.

Every process has the whole model and computes on its share of each batch. What has to be one is made one here: the
gradients are summed, and what only one process may do (write, print) is done by the first.

Gradients are summed by one all-reduce after the backward pass, and not by DistributedDataParallel: that wraps
`forward`, where a method has `loss`; its worth is to send while the backward pass still runs, where an adapter has
megabytes at most to send; and it averages over processes, where an uneven last batch must be averaged over images.

All functions here are of no effect in a process that is alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

__all__ = [
    "FirstFailed",
    "OthersLost",
    "check_part",
    "cores",
    "gather_json",
    "gather_tensors",
    "in_step",
    "is_first",
    "joined",
    "launched",
    "meeting",
    "on_first",
    "own_device",
    "part",
    "share_tensors",
    "sum_gradients",
]

Item = TypeVar("Item")

PATIENCE = timedelta(hours=1)
"""How long one process waits for another that still answers nothing. They do the same work, so waits are short: while
the first writes a checkpoint, one reads slower images, compiles later, or downloads the weights."""

UNEVEN = timedelta(days=7)
"""The same where one may have hours of work more than another. One that dies is noticed at once all the same, by the
connection that ends; only a machine that falls silent is waited for."""


class FirstFailed(RuntimeError):
    """The first process could not do what the others waited for; it says why itself."""


class OthersLost(RuntimeError):
    """Other processes ended, or do not answer, while this one waits for them."""


def part() -> tuple[int, int]:
    """(r, n): this is process r of n. (0, 1) where nothing was joined."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def check_part(part: tuple[int, int]) -> None:
    """Raise ValueError unless ``part`` says: process r of n."""
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part: expected (r, n) with 0 <= r < n, got {part}")


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return part()[0] == 0


def launched() -> int:
    """How many processes a launcher says it has started, this one among them; 1 without a launcher."""
    return _told("WORLD_SIZE", 1)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_device(device: str) -> str:
    """The device of this process, where all are given the same one: of several GPUs, that of its number.

    Raises:
        ValueError: for one GPU given to several processes, or fewer GPUs on this machine than processes.
    """
    if device == "meta":
        raise ValueError("device: expected one that computes, got 'meta'")
    if part()[1] == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise ValueError(
            f"device: each of {part()[1]} processes takes a GPU of its own; expected 'cuda', got {device!r}"
        )
    rank, gpus = _told("LOCAL_RANK", 0), torch.cuda.device_count()
    here = max(_told("LOCAL_WORLD_SIZE", 1), rank + 1)
    if gpus < here:
        raise ValueError(
            f"device: {here} processes on this machine need a GPU each, it has {gpus}; start fewer, or take cpu"
        )
    torch.cuda.set_device(rank)  # which NCCL goes by
    return f"cuda:{rank}"


def _told(name: str, default: int) -> int:
    """A number that a launcher tells by the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}: expected a whole number from the launcher, got {text!r}")
    return int(text)


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher started beside this one, and part from them at the end.

    Of no effect where there is one process, or where the caller has made a process group already.

    Raises:
        ValueError: if the launcher has not said where the processes meet (MASTER_ADDR and MASTER_PORT).
        OthersLost: if they do not meet there.

    Example:
        >>> with joined():
        ...     print(part())
        (0, 1)
    """
    if launched() < 2 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with _waiting():
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _waiting() -> Iterator[None]:
    """Around every exchange: what its libraries say of a lost connection, as a sentence."""
    try:
        yield
    except RuntimeError as error:  # gloo throws no other
        rank, count = part() if dist.is_initialized() else (_told("RANK", 0), launched())
        # without the line of C++ in front, and the advice behind
        reason = re.sub(r"^\[[^]]*\] ", "", str(error)).split("\n")[0].split(". ")[0] or type(error).__name__
        raise OthersLost(
            f"process {rank} of {count} has lost the others, which ended or do not answer ({reason}); start all again "
            "to go on from what is saved"
        ) from error


def meeting() -> Callable[[], None]:
    """Where processes wait for all others, each when its work is done; called by all before it, and by all after it."""
    if part()[1] == 1:
        return lambda: None
    with _waiting():
        group = dist.new_group(backend="gloo", timeout=UNEVEN)
    assert isinstance(group, dist.ProcessGroup)  # and not the mark of one that leaves this process out

    def meet() -> None:
        with _waiting():
            dist.barrier(group)

    return meet


def on_first(do: Callable[[], object]) -> None:
    """Do something in the first process alone, while the others wait; if it fails there, all stop.

    Raises:
        FirstFailed: in the other processes, if it failed; the first raises what `do` raised.
    """
    error: Exception | None = None
    if is_first():
        try:
            do()
        except Exception as caught:
            error = caught
    told = gather_json(None if error is None else str(error))[0]
    if error is not None:
        raise error
    if told is not None:
        raise FirstFailed(f"the first process stopped: {told}")


def gather_json(value: Any) -> list[Any]:
    """What each process gave, by rank; between processes it travels as JSON, so tuples come back as lists."""
    if part()[1] == 1:
        return [value]
    return [json.loads(message) for message in _gather(json.dumps(value).encode())]


def gather_tensors(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors that each process gave, by rank, on the CPU; names and shapes may differ."""
    if part()[1] == 1:
        return [tensors]
    return [load(message) for message in _gather(save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))]


def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    if part()[1] > 1:
        with _waiting():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)


def in_step(batches: Iterable[Item], empty: Item) -> Iterator[Item]:
    """The batches of this process for as long as any process has one; `empty` when this one has none left."""
    if part()[1] == 1:
        yield from batches
        return
    rest = iter(batches)
    while True:
        batch = next(rest, None)
        left = torch.tensor(int(batch is not None), device=_device())
        with _waiting():
            dist.all_reduce(left)
        if not left:
            return
        yield empty if batch is None else batch


def sum_gradients(parameters: Sequence[Tensor], images: int, loss: float, stop: bool) -> tuple[int, float, bool]:
    """Turn gradients of the mean over this process's images into those of the mean over the images of all.

    Args:
        parameters: the same ones in every process. images: what this process computed on; may be 0.
        loss: the mean over them. stop: whether this process is to stop.

    Returns:
        Images of all, the mean loss over them, and whether any process is to stop: the same in every process.
    """
    if part()[1] == 1:
        return images, loss, stop
    # A parameter that no process has a gradient of keeps none: an optimiser leaves it alone, also its decay.
    flags = torch.tensor([images, loss * images, stop, *(p.grad is not None for p in parameters)], dtype=torch.float32)
    grads = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) * images for p in parameters]
    flat = torch.cat([flags.to(parameters[0].device), *(g.float() for g in grads)])
    with _waiting():
        dist.all_reduce(flat)
    total, total_loss, stops, *have = flat[: len(flags)].tolist()
    start = len(flags)
    for p, has in zip(parameters, have, strict=True):
        if has and total:
            p.grad = (flat[start : start + p.numel()] / total).view_as(p).to(p.dtype)
        start += p.numel()
    return int(total), total_loss / max(total, 1), stops > 0


def _device() -> torch.device:
    """Where small messages travel: on the CPU, unless the process group knows GPUs only."""
    return torch.device("cpu" if "cpu" in str(dist.get_backend_config()) else "cuda")


def _gather(message: bytes) -> list[bytes]:
    rank, count = part()
    sizes = torch.zeros(count, dtype=torch.int64, device=_device())
    sizes[rank] = len(message)
    with _waiting():
        dist.all_reduce(sizes)
    room = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    room[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    room = room.to(_device())
    everyone = [torch.empty_like(room) for _ in range(count)]
    with _waiting():
        dist.all_gather(everyone, room)
    return [t[:size].cpu().numpy().tobytes() for t, size in zip(everyone, sizes.tolist(), strict=True)]
