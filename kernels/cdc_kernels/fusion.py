"""Fusion of ready-made evidence [N, M, K] into [N, K]: one pass over memory forward, one backward.

Evidence is ``e = W expm1(l)``; it saturates at the largest finite number where Dempster's product leaves float32.
"""

import triton
import triton.language as tl

from cdc_kernels.epilogue import fuse, fused, leave_linear
from cdc_kernels.special import expm1, log1p, log_or_nothing


@triton.jit
def prompt_state(e_ptr, at, mask, log_w):
    """y = ln(e / W) and l = ln(1 + e / W) of one opinion."""
    e = tl.load(e_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return log_or_nothing(e) - log_w, log1p(e * tl.exp(-log_w))


@triton.jit
def fused_block(
    e_ptr, M, K, total, e_n, e_m, e_k, log_w, log_share, RULE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """This program's BLOCK of the N K fused values: places, which exist, where their evidence starts, and L."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    base = (i // K) * e_n + (i % K) * e_k
    state = leave_linear(tl.zeros((BLOCK,), tl.float32), RULE)
    at = base  # counted on in 64 bits: m e_m need not fit 32
    for _ in range(0, M):
        y, l = prompt_state(e_ptr, at, mask, log_w)  # noqa: E741
        state = fuse(state, y, l, log_share, RULE)
        at += e_m
    _, L = fused(state, RULE)
    return i, mask, base, L


@triton.jit
def fuse_forward_kernel(
    e_ptr, out_ptr, M, K, total, e_n, e_m, e_k, log_w, log_share, top, RULE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Owns BLOCK of the N K fused values; ``top`` is the largest l whose evidence is finite."""
    i, mask, _, L = fused_block(e_ptr, M, K, total, e_n, e_m, e_k, log_w, log_share, RULE, BLOCK)
    tl.store(out_ptr + i, expm1(tl.minimum(L, top)) * tl.exp(log_w), mask=mask)


@triton.jit
def fuse_backward_kernel(
    e_ptr, g_ptr, g_e_ptr, M, K, total, e_n, e_m, e_k, log_w, log_share, top,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Owns the gradients of the M opinions behind BLOCK of the fused values; g_e is contiguous [N, M, K]."""
    i, mask, base, L = fused_block(e_ptr, M, K, total, e_n, e_m, e_k, log_w, log_share, RULE, BLOCK)
    g = tl.load(g_ptr + i, mask=mask, other=0.0)
    g = tl.where(top > L, g, 0.0)
    at, to = base, (i // K) * M * K + i % K
    for _ in range(0, M):
        _, l = prompt_state(e_ptr, at, mask, log_w)  # noqa: E741
        if RULE == "dempster":  # noqa: SIM108 (a branch at compile time)
            # d e / d e_m = exp(L) / (1 + e_m / W)
            slope = tl.exp(tl.minimum(L, top) - l)
        else:
            slope = tl.exp(L * 0 + log_share)
        tl.store(g_e_ptr + to, (g * slope).to(g_e_ptr.dtype.element_ty), mask=mask)
        at += e_m
        to += K
