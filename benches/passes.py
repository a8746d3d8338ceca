"""What bounds the blocked backend on a CPU: every pass of its forward over S1, next to the product it follows.

    taskset -c 1 env OMP_NUM_THREADS=1 python benches/passes.py

Each pass runs on one block, warm in the cache, and is multiplied by how often S1 needs it. The clock is the process's
own, so that other processes' turns do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from shapes import SHAPES
from ways import our_opinion

ROUNDS = 40


def passes() -> dict[str, tuple[int, Callable[[], object]]]:
    """How often S1 takes each pass, and the pass."""
    s = SHAPES["S1"]
    torch.manual_seed(0)
    image, text, target = torch.randn(s.B, s.D), torch.randn(s.M, s.K, s.D), torch.zeros(s.B, dtype=torch.long)
    product, fused, out = (0.01 * torch.rand(s.B, s.K) for _ in range(3))
    factor, constant = torch.rand(s.K), torch.tensor(-6.9)
    few = image[:4].clone(), text[:, :50].clone(), target[:4]
    blocked = our_opinion("blocked")
    return {
        "the bare product": (1, lambda: image @ text.flatten(0, 1).T),
        "blocked": (1, lambda: blocked(image, text, target)),
        "product of one prompt": (s.M, lambda: torch.mm(image, text[0].T, out=out)),
        "lengths of text": (1, lambda: torch.linalg.vector_norm(text, dim=-1)),
        "logits: product * scale / |t| + c": (s.M, lambda: torch.addcmul(constant, product, factor, out=out)),
        "exp": (s.M, lambda: torch.exp(product, out=out)),
        "row sum": (s.M + 1, lambda: product.sum(-1)),
        "fusion: v + q v": (s.M - 1, lambda: torch.addcmul(product, product, fused, out=out)),
        "fusion: q + v": (s.M - 1, lambda: torch.add(product, fused, out=out)),
        "log1p": (1, lambda: torch.log1p(product, out=out)),
        "Python and dispatch (S4 in its place)": (1, lambda: blocked(*few)),
    }


def main() -> None:
    torch.set_grad_enabled(False)
    counted = passes()
    taken: dict[str, list[float]] = {name: [] for name in counted}
    for _ in range(ROUNDS):
        for name, (_, call) in counted.items():
            call()
            started = time.process_time()
            call()
            taken[name].append(1e3 * (time.process_time() - started))
    bare = median(taken["the bare product"])
    print("| step | times | ms in all | of bare product |\n| --- | ---: | ---: | ---: |")
    for name, (times, _) in counted.items():
        ms = times * median(taken[name])
        print(f"| {name} | {times} | {ms:.2f} | {ms / bare:.3f} |")


if __name__ == "__main__":
    main()
