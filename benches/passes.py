"""What bounds the blocked backend on a CPU: every pass of its forward over S1, next to the product it follows.

    python benches/passes.py

Each pass runs on the blocks of two prompts, as the backend takes them, and is multiplied by how often S1 needs it. In
the last row is what the backend takes beyond all of them: Python and dispatch, small tensors, and blocks that the
product has pushed out of a core's cache, where a pass that is timed alone finds them. The third row is the same PyTorch
calls one after the other, written for S1 alone: no argument is checked, nothing is chosen. Both must agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median

import torch
from shapes import SCALE, SHAPES
from torch import Tensor
from ways import our_opinion

ROUNDS = 100
BARE, OURS, CALLS = "the bare product", "blocked", "the calls of blocked, without the rest"


def calls_alone(image: Tensor, text: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The opinion of four prompts by the calls of the backend; block [2, B, K] is kept, as the backend's is."""
    M, K, _ = text.shape
    unit = math.log2(math.e)
    images = (image / torch.linalg.vector_norm(image, dim=-1, keepdim=True)).expand(2, *image.shape)
    factor = (SCALE * unit / torch.linalg.vector_norm(text, dim=-1)).unsqueeze(1)
    constant = torch.full((1, 1, 1), -math.log(K) * unit)
    out, fused, sums = torch.empty(len(image), K), None, []
    for m in range(0, M, 2):
        torch.bmm(images, text[m : m + 2].transpose(1, 2), out=block)
        torch.addcmul(constant, block, factor[m : m + 2], out=block).exp2_()
        sums.append(block.sum(-1))
        for v in block.unbind():
            fused = v if fused is None else torch.add(fused, v.addcmul_(v, fused), out=out)
    total = out.sum(-1).log1p_()
    return out.log1p_(), total, torch.cat(sums).log1p_().T


def passes() -> dict[str, tuple[int, Callable[[], object]]]:
    """How often S1 takes each pass, and the pass."""
    s = SHAPES["S1"]
    torch.manual_seed(0)
    image, text, target = torch.randn(s.B, s.D), torch.randn(s.M, s.K, s.D), torch.zeros(s.B, dtype=torch.long)
    images, two = image.expand(2, s.B, s.D), text[:2].transpose(1, 2)
    product, out = (0.01 * torch.rand(2, s.B, s.K) for _ in range(2))
    fused = 0.01 * torch.rand(s.B, s.K)
    factor, constant = torch.rand(2, 1, s.K), torch.full((2, 1, 1), -6.9)
    length = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
    blocked = our_opinion("blocked")
    for mine, theirs in zip(blocked(image, text, target), calls_alone(image, text, out), strict=True):
        torch.testing.assert_close(mine, theirs)
    return {
        BARE: (1, lambda: image @ text.flatten(0, 1).T),
        OURS: (1, lambda: blocked(image, text, target)),
        CALLS: (1, lambda: calls_alone(image, text, out)),
        "products of two prompts": (s.M // 2, lambda: torch.bmm(images, two, out=out)),
        "lengths of text": (1, lambda: torch.linalg.vector_norm(text, dim=-1)),
        "images: length and division": (1, lambda: image / length.copy_(image.norm(dim=-1, keepdim=True))),
        "logits: products * scale / length + c": (s.M // 2, lambda: torch.addcmul(constant, product, factor, out=out)),
        "exp, by powers of 2": (s.M // 2, lambda: torch.exp2(product, out=out)),
        "row sums": (s.M // 2, lambda: product.sum(-1)),
        "row sums of the fused block": (1, lambda: fused.sum(-1)),
        "fusion: v + q v": (s.M - 1, lambda: torch.addcmul(product[0], product[0], fused, out=product[0])),
        "fusion: q + v": (s.M - 1, lambda: torch.add(fused, product[0], out=out[0])),
        "log1p": (1, lambda: torch.log1p(fused, out=out[0])),
    }


def main() -> None:
    torch.set_grad_enabled(False)
    counted = passes()
    taken: dict[str, list[float]] = {name: [] for name in counted}
    for _ in range(ROUNDS):
        for name, (_, call) in counted.items():
            call()
            started = time.perf_counter()
            call()
            taken[name].append(1e3 * (time.perf_counter() - started))
    ms = {name: times * median(taken[name]) for name, (times, _) in counted.items()}
    rows = [(name, str(counted[name][0]), each) for name, each in ms.items()]
    steps = sum(each for name, each in ms.items() if name not in (BARE, OURS, CALLS))
    rows.append(("what is left of blocked", "", ms[OURS] - steps))
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| step | times | ms in all | of bare product |\n| --- | ---: | ---: | ---: |")
    for name, times, each in rows:
        print(f"| {name} | {times} | {each:.2f} | {each / ms[BARE]:.3f} |")


if __name__ == "__main__":
    main()
