"""Some functions of PyTorch are up to ten times as slow on a CPU with AVX-512 until one of them has met -0.0.

    python benches/log1p_page.py

Times them in a process that has met none, and again after ``log1p(-0.0)``. What is behind it, and what the library does
about it: ``cdc_ops.special.map_constants``. On other CPUs both columns should agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

ROUNDS = 30


def milliseconds(call: Callable[[], object]) -> float:
    """The median of some calls, after one that is not counted."""
    call()
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken)


def main() -> None:
    x, out = torch.linspace(0.1, 5, 256_000), torch.empty(256_000)
    calls: dict[str, Callable[[], object]] = {
        "log1p": lambda: torch.log1p(x, out=out),
        "expm1": lambda: torch.expm1(x, out=out),
        "softplus": lambda: F.softplus(x),
        "logaddexp": lambda: torch.logaddexp(x, x, out=out),
        "log": lambda: torch.log(x, out=out),
        "exp": lambda: torch.exp(x, out=out),
    }
    before = {name: milliseconds(call) for name, call in calls.items()}
    torch.log1p(torch.full((64,), -0.0))
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}\n")
    print("| 256 000 numbers | ms before log1p(-0.0) | ms after | ratio |\n| --- | ---: | ---: | ---: |")
    for name, call in calls.items():
        after = milliseconds(call)
        print(f"| {name} | {before[name]:.3f} | {after:.3f} | {before[name] / after:.1f} |")


if __name__ == "__main__":
    main()
