"""What the epilogue of one logit costs, in instructions of its machine code, and what the two paths should cost.

``python -m cdc_kernels.cost`` compiles the epilogue of one prompt alone (exp evidence, Dempster's rule, no KL) on the
forward kernel's tile of products, takes off a kernel that only multiplies, and divides by the logits a thread holds.
Then it prints the estimates that :func:`cdc_kernels.configs.path` compares. Needs no GPU.
"""

from __future__ import annotations

import re
from collections import Counter

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from cdc_kernels import aot, configs
from cdc_kernels.epilogue import evidence, evidence_slope, fuse, fuse_linear, fuse_slope, fused, log_sum, row_slope
from cdc_kernels.special import log1p, softplus

IMAGES, CLASSES, WARPS = 128, 64, 8
#: nothing: only the product. linear, logs: one prompt, forward; class, class in logs: once for each fused class, log
#: ratio and row sum. slope: the gradient of one prompt's logit.
STEPS = ("nothing", "linear", "logs", "class", "class in logs", "slope")


@triton.jit
def step_kernel(
    x_ptr, t_ptr, state_ptr, row_ptr, log_w, STEP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One step of the epilogue on a tile, from logits and the fused state."""
    rows, cols, d = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K), tl.arange(0, 16)
    x = tl.load(x_ptr + rows[:, None] * 16 + d[None, :])
    t = tl.load(t_ptr + cols[None, :] * 16 + d[:, None])
    z = tl.dot(x, t, tl.zeros((BLOCK_B, BLOCK_K), tl.float32))
    at = rows[:, None] * BLOCK_K + cols[None, :]
    state = tl.load(state_ptr + at)
    row = tl.load(row_ptr + rows)
    live = (rows[:, None] < BLOCK_B) & (cols[None, :] < BLOCK_K)
    total = row
    if STEP == "linear":
        y, _ = evidence(z, log_w, "exp")
        v = tl.exp(y)
        total = log_sum(v, live, True) + softplus(tl.max(tl.max(y, 1), 0))
        state = fuse_linear(state, v, 0.0, "dempster")
    elif STEP == "logs":
        y, l = evidence(z, log_w, "exp")  # noqa: E741
        total = log_sum(y, live, False)
        state = fuse(state, y, l, 0.0, "dempster")
    elif STEP == "class":
        total = log_sum(state, live, True)
        state = log1p(state) + z
    elif STEP == "class in logs":
        Y, L = fused(state, "dempster")
        total = log_sum(Y, live, False)
        state = L + z
    elif STEP == "slope":
        y, _ = evidence(z, log_w, "exp")
        grad = row_slope(y, y, live, row, row, row, total, total, total, total, log_w, False, False, False)
        grad += state * fuse_slope(y, 0.0, state, "dempster")
        state = grad * evidence_slope(z, "exp")
    else:
        state += z
    tl.store(state_ptr + at, state)
    tl.store(row_ptr + rows, total)


def opcodes(step: str) -> Counter[str]:
    """Instructions of one step in NVIDIA 9.0's machine code, by name."""
    signature = {"x_ptr": "*bf16", "t_ptr": "*bf16", "state_ptr": "*fp32", "row_ptr": "*fp32", "log_w": "fp32"}
    signature |= dict.fromkeys(("STEP", "BLOCK_B", "BLOCK_K"), "constexpr")
    constants = {(5,): step, (6,): IMAGES, (7,): CLASSES}
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    compiled = triton.compile(
        ASTSource(step_kernel, signature, constants, attrs),
        target=aot.TARGETS["cuda90"][0],
        options={"num_warps": WARPS},
    )
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9]*)", aot.disassemble(compiled.asm["cubin"]))
    return Counter(name for name in names if name != "NOP")


def table() -> dict[str, tuple[float, float]]:
    """Instructions, and special functions among them, of each step for one logit."""
    logits = IMAGES * CLASSES / (32 * WARPS)
    counts = {step: opcodes(step) for step in STEPS}

    def each(step: str, name: str | None = None) -> float:
        def total(c: Counter[str]) -> int:
            return sum(c.values()) if name is None else c[name]

        return (total(counts[step]) - total(counts["nothing"])) / logits

    return {step: (each(step), each(step, "MUFU")) for step in STEPS[1:]}


#: The shapes of benches/shapes.py: B, M, K, D.
SHAPES = {
    "S1": (256, 4, 1000, 512),
    "S2": (1024, 4, 21841, 512),
    "S3": (512, 8, 100000, 768),
    "S4": (4, 4, 50, 512),
    "S6": (8192, 1, 100000, 768),
}


def main() -> None:
    """Print both tables."""
    for step, (instructions, special) in table().items():
        print(f"{step:14} {instructions:5.1f} instructions a logit, {special:4.1f} of them special functions")
    for name, sizes in SHAPES.items():
        for direction in ("forward", "backward"):
            again = sizes[1] > 1  # a single prompt's opinion is the fused one
            tiles, chunks = (
                1e3 * configs.seconds(p, direction, *sizes, torch.bfloat16, again=again) for p in configs.PATHS
            )
            print(f"{name} {direction:8} bf16, estimated: tiles {tiles:8.3f} ms, chunks {chunks:8.3f} ms")


if __name__ == "__main__":
    main()
