"""The decoupling loss over text features [M, K, D]: one program a class, one read of its M vectors."""

import triton
import triton.language as tl

from cdc_kernels.fused_opinion import EPS


@triton.jit
def unit_vectors(t_ptr, k, M, D, t_m, t_k, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The M features of class k made unit vectors [BLOCK_M, BLOCK_D], zero outside; and their lengths."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = t_ptr + m.to(tl.int64)[:, None] * t_m + k.to(tl.int64) * t_k + d[None, :]
    t = tl.load(at, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(t * t, 1)), EPS)
    return t / length[:, None], length


@triton.jit
def decoupling_forward_kernel(
    t_ptr, out_ptr, M, D, t_m, t_k, SQUARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """``sum_{m > n} cos(t_mk, t_nk)``, or of its square, for class k."""
    k = tl.program_id(0)
    u, _ = unit_vectors(t_ptr, k, M, D, t_m, t_k, BLOCK_M, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, M):
        other = tl.sum(tl.where((m == n)[:, None], u, 0.0), 0)
        cosine = tl.sum(u * other[None, :], 1)
        if SQUARED:
            cosine = cosine * cosine
        total += tl.where(m > n, cosine, 0.0)
    tl.store(out_ptr + k, tl.sum(total, 0))


@triton.jit
def decoupling_backward_kernel(
    t_ptr, g_ptr, g_t_ptr, M, K, D, t_m, t_k, SQUARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Owns the gradients of the M features of class k; g [K] arrives at the classes' sums."""
    k = tl.program_id(0)
    u, length = unit_vectors(t_ptr, k, M, D, t_m, t_k, BLOCK_M, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # by the unit vectors
    for n in range(0, M):
        other = tl.sum(tl.where((m == n)[:, None], u, 0.0), 0)
        weight = tl.where(m == n, 0.0, 1.0)
        if SQUARED:
            weight = weight * 2.0 * tl.sum(u * other[None, :], 1)
        grad += weight[:, None] * other[None, :]
    along = tl.where(length > EPS, tl.sum(grad * u, 1), 0.0)
    grad = (grad - along[:, None] * u) * (tl.load(g_ptr + k) / length)[:, None]
    at = g_t_ptr + (m.to(tl.int64)[:, None] * K + k) * D + d[None, :]
    tl.store(at, grad.to(g_t_ptr.dtype.element_ty), mask=(m < M)[:, None] & (d < D)[None, :])
