"""Time and peak memory of calls, on a CPU and on a GPU: interleaved repetitions, cold caches, exact allocations."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[], Iterable[Tensor]]

#: Seconds of one measurement on a CPU: a call that takes less runs in a loop for so long, as it does where it is used.
#: Its first run pays for the caches that another way has filled, the others do not.
LOOP = 20e-3
#: The most rounds there are.
MOST_ROUNDS = 100


def time_interleaved(
    calls: Mapping[str, Call], device: str, seconds: float, rounds: int = 5, wall: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round: all calls once, then all again, in another order, for ``rounds`` and
    then for ``seconds``.

    What disturbs the machine disturbs neighbours in a round alike, so ratios are taken within rounds. Calls that
    would use up the time by themselves only take part in those first rounds. The calls must have run before: nothing
    warms up here but the first, discarded round.

    On a GPU each measurement is the time between two events around the call, after the L2 cache was flushed by
    writing twice its size; the flush also keeps the device busy while the host gets ahead. ``wall``: the host's
    clock around a call and the wait for its end instead, for shapes where launches are what matters.
    """
    clock = gpu_clock if device == "cuda" and not wall else wall_clock
    gc.collect()
    first = {name: clock(call, device) for name, call in calls.items()}  # also tells how long each takes
    slow = {name for name, ms in first.items() if ms / 1e3 > seconds / (2 * rounds)}
    repeats = {name: 1 if device == "cuda" else math.ceil(LOOP * 1e3 / ms) for name, ms in first.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, since, shuffled = list(calls), math.inf, random.Random(0)  # no way always follows the same other one
    for number in range(MOST_ROUNDS):
        if number == rounds:
            since = time.perf_counter()
        if number >= rounds and (time.perf_counter() - since >= seconds or len(slow) == len(names)):
            break
        shuffled.shuffle(names)
        for name in names:
            if name in slow and number >= rounds:
                continue
            taken[name].append(clock(calls[name], device, repeats[name]))
    return taken


def wall_clock(call: Call, device: str, repeats: int = 1) -> float:
    """Milliseconds of a call by the host's clock."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / repeats * 1e3


_flush: dict[str, Tensor] = {}


def gpu_clock(call: Call, device: str, repeats: int = 1) -> float:
    """Milliseconds of one call between two events, with a cold L2 cache."""
    if device not in _flush:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
        _flush[device] = torch.empty(2 * cache, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush[device].zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ratios(times: list[float], baseline: list[float]) -> float:
    """Median over rounds of the quotient of two calls' times, as far as both took part."""
    return median(a / b for a, b in zip(times, baseline, strict=False))


def peak_memory(calls: Mapping[str, Call], device: str) -> dict[str, tuple[int, int]]:
    """Of each call: most bytes it held at once beyond what existed before it, and bytes of what it returns.

    On a GPU the allocator's own statistics. On a CPU every allocation and release of PyTorch's allocator, as the
    profiler records them, summed in order of time: exact, temporaries inside an operator and compiled code
    included; scratch space that a matrix library allocates for itself is not seen.
    """
    if device == "cuda":
        return {name: gpu_peak(call) for name, call in calls.items()}
    kept = {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for name, call in calls.items():
            gc.collect()
            with record_function(MARK + name):
                kept[name] = size_of(call())
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    peaks = peaks_of(recorded.profiler.kineto_results.events())
    return {name: (peaks[name], kept[name]) for name in calls}


def gpu_peak(call: Call) -> tuple[int, int]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = size_of(call())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, kept


def size_of(results: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in results)


#: What marks a call in a profile.
MARK = "peak memory of "


def peaks_of(events: Iterable[Any]) -> dict[str, int]:
    """Peak of the running sum of allocations within each marked call of a CPU profile."""
    events = sorted(events, key=lambda e: e.start_ns())
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    peaks = {}
    for mark in events:
        if mark.name().startswith(MARK):
            sizes = [n for at, n in memory if mark.start_ns() <= at <= mark.start_ns() + mark.duration_ns()]
            peaks[mark.name().removeprefix(MARK)] = max(accumulate(sizes), default=0)
    return peaks


def launches(call: Call) -> int | None:
    """Kernels that a call launches on a GPU; None where the profiler cannot see them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device) or None
