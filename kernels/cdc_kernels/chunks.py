"""Backward kernels of the second path, where a library multiplies features over chunks of classes.

The products of every prompt with one chunk of classes lie in a workspace [M, B, chunk]. Forward, the kernel of
:mod:`cdc_kernels.fused_opinion` reads its logits from there. Backward, ``slope_kernel`` turns products into the
gradients by them, in place; the library multiplies these with text and image features, and ``project_kernel`` takes
away what lies along a feature that was normalised.
"""

import triton
import triton.language as tl

from cdc_kernels.fused_opinion import (
    EPS,
    SHORT,
    cosine_tile,
    fuse_tile,
    fused_slope_tile,
    log_ratio_of,
    place,
    prompt_constants,
    prompt_slope_tile,
)


@triton.jit
def slope_kernel(
    x_ptr, t_ptr, scale_ptr, bias_ptr, xi_ptr, ti_ptr, weight_ptr, target_ptr,
    planes_ptr, g_ratio_ptr, slope_ptr, g_rows_ptr,
    B, M, K, D, first, last, tiles, x_b, x_m, t_m, t_k, xi_b, xi_m, g_ratio_b,
    log_w, log_share, log_share_of_class,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, RULE: tl.constexpr, FUSED: tl.constexpr, G_RATIO: tl.constexpr,
    TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr, LOADED: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Owns a tile of images and of classes first .. last, all prompts: gradients by the products ``<x_b, t_mk>``.

    slope [M, B, chunk] is the workspace itself (each number is written by the one program that read it, after it
    did) or another tensor of its strides. Rows [3, M, tiles, B]: partial gradients of scale, bias and weight.
    """
    rows, row_live, cols, live, is_target, has_target, tile = place(
        target_ptr, first, last, B, TARGET, BLOCK_B, BLOCK_K
    )
    safe_rows = tl.minimum(rows, B - 1)
    safe_cols = tl.minimum(cols, last - 1)
    R = tile * 0 + M + 1
    L = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    by_fused = L
    if FUSED:
        state, bound = fuse_tile(
            x_ptr, t_ptr, scale_ptr, bias_ptr, xi_ptr, ti_ptr, weight_ptr, planes_ptr, planes_ptr,
            safe_rows, row_live, safe_cols, live, is_target, has_target, tile, tiles, first,
            B, M, K, D, x_b, x_m, t_m, t_k, xi_b, xi_m, log_w, log_share, log_share_of_class, log_w,
            ACTIVATION, RULE, FUSED, False, False, TARGET, SQUARE, KL, 1, LOADED,
            HAS_BIAS, NORMALIZE, EVEN_D, UPCAST, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        L = log_ratio_of(state, bound, RULE)
        by_fused = fused_slope_tile(
            L, safe_rows, safe_cols, is_target, planes_ptr, g_ratio_ptr, B, R, g_ratio_b,
            log_w, log_share_of_class, G_RATIO, TARGET, SQUARE, KL,
        )  # fmt: skip
    for prompt in range(0, M):
        m = tile * 0 + prompt
        cosine, xi, ti = cosine_tile(
            x_ptr, t_ptr, xi_ptr, ti_ptr, m, safe_rows, safe_cols, live, first, M, K, D,
            x_b, x_m, t_m, t_k, xi_b, xi_m,
            1, LOADED, NORMALIZE, EVEN_D, UPCAST, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        scale, bias = prompt_constants(scale_ptr, bias_ptr, m, HAS_BIAS)
        grad, by_weight = prompt_slope_tile(
            cosine, scale, bias, m, safe_rows, live, is_target, L, by_fused, planes_ptr, weight_ptr, B, R,
            log_w, log_share, log_share_of_class, ACTIVATION, RULE, FUSED, TARGET, SQUARE, KL,
        )  # fmt: skip
        if ROWS:
            at = g_rows_ptr + (m * tiles + tile).to(tl.int64) * B + rows
            size = (R - 1).to(tl.int64) * tiles * B
            tl.store(at, tl.sum(grad * cosine, 1), mask=row_live)
            tl.store(at + size, tl.sum(grad, 1), mask=row_live)
            tl.store(at + 2 * size, tl.sum(by_weight, 1), mask=row_live)
        slope = grad * (scale * xi)[:, None] * ti[None, :]
        at = slope_ptr + m.to(tl.int64) * x_m + rows.to(tl.int64)[:, None] * x_b + (cols - first)[None, :]
        tl.store(at, slope.to(slope_ptr.dtype.element_ty), mask=live)


@triton.jit
def project_kernel(
    g_ptr, x_ptr, length_ptr, out_ptr, N, D, g_o, g_n, x_o, x_n, length_o, length_n, out_o, out_n,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out = g - <g, x> x / |x|^2`` over [outer, N, D]: the gradient by x of its direction alone. g may be out."""
    o = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    live = n < N
    rows = n.to(tl.int64)
    length = tl.load(length_ptr + o * length_o + rows * length_n, mask=live, other=1.0)
    inverse = 1.0 / tl.maximum(length, EPS)
    g_ptrs = g_ptr + o * g_o + rows[:, None] * g_n + d[None, :]
    x_ptrs = x_ptr + o * x_o + rows[:, None] * x_n + d[None, :]
    out_ptrs = out_ptr + o * out_o + rows[:, None] * out_n + d[None, :]
    along = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = live[:, None] & (d < D - start)[None, :]
        g = tl.load(g_ptrs + start, mask=mask, other=0.0)
        along += tl.sum(g * tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32), 1)
    along = tl.where(inverse * EPS < SHORT, along * inverse * inverse, 0.0)
    for start in range(0, D, BLOCK_D):
        mask = live[:, None] & (d < D - start)[None, :]
        g = tl.load(g_ptrs + start, mask=mask, other=0.0)
        x = tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs + start, (g - along[:, None] * x).to(out_ptr.dtype.element_ty), mask=mask)
