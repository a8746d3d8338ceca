"""Time and peak memory of calls, on a CPU and on a GPU: interleaved repetitions, cold caches, exact allocations."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Iterable[Tensor]]

#: Below this a CPU call is repeated within one measurement, so that the clock's own cost does not show.
SHORTEST = 2e-3
#: Rounds that every call takes part in, and the most there are.
ROUNDS = 5, 100


def time_interleaved(calls: dict[str, Call], device: str, seconds: float, wall: bool = False) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round: all calls once, then all again, in turned order, for ``seconds``.

    What disturbs the machine disturbs neighbours in a round alike, so ratios are taken within rounds. Calls that
    would use up the time by themselves only take part in the first rounds. The calls must have run before: nothing
    warms up here but the first, discarded round.

    On a GPU each measurement is the time between two events around the call, after the L2 cache was flushed by
    writing twice its size; the flush also keeps the device busy while the host gets ahead. ``wall``: the host's
    clock around a call and the wait for its end instead, for shapes where launches are what matters.
    """
    clock = gpu_clock if device == "cuda" and not wall else wall_clock
    gc.collect()
    first = {name: clock(call, device) for name, call in calls.items()}  # also tells how long each takes
    slow = {name for name, ms in first.items() if ms / 1e3 > seconds / (2 * ROUNDS[0])}
    repeats = {name: 1 if device == "cuda" else max(1, int(SHORTEST * 1e3 / ms)) for name, ms in first.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, started = list(calls), time.perf_counter()
    for number in range(ROUNDS[1]):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in slow and number >= ROUNDS[0]:
                continue
            taken[name].append(clock(calls[name], device, repeats[name]))
        if number + 1 >= ROUNDS[0] and (time.perf_counter() - started > seconds or len(slow) == len(names)):
            break
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


def peak_memory(call: Call, device: str) -> tuple[int, int]:
    """Most bytes a call held at once beyond what existed before it, and bytes of what it returns.

    On a GPU the allocator's own statistics. On a CPU every allocation and release of PyTorch's allocator, as the
    profiler records them, summed in order of time: exact, temporaries inside an operator and compiled code
    included; scratch space that a matrix library allocates for itself is not seen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = list(call())
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            results = list(call())
        peak = peak_of(recorded)
    return peak, sum(x.numel() * x.element_size() for x in results)


def peak_of(recorded: profile) -> int:
    """Peak of the running sum of allocations in a CPU profile."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(call: Call) -> int | None:
    """Kernels that a call launches on a GPU; None where the profiler cannot see them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device) or None
