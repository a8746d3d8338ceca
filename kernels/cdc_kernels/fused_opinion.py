"""Tiles of [B] x [K] over all prompts: products, evidence, fusion and row sums without [B, M, K].

Three kernels share :func:`cosine_tile`. ``forward_kernel`` owns a tile of images and classes and loops over the
prompts, the fused state in registers. ``image_kernel`` owns the gradient of a tile of images (with what belongs to a
row: scale, bias, the rule's weights), ``text_kernel`` that of a tile of classes of one prompt. Each result has
one owner and one order of summation: no atomics, bitwise the same every time.

Layouts, with R = M + 1 opinions, the fused one last: row sums [plane, R, B], partial row sums
[plane, R, tile of classes, B]. Image features [B, D] are [B, M, D] with stride 0 over m.
"""

import triton
import triton.language as tl

from cdc_kernels.epilogue import (
    LINEAR_LIMIT,
    evidence,
    evidence_slope,
    fuse,
    fuse_linear,
    fuse_slope,
    fused,
    kl_element,
    leave_linear,
    log_alpha_of,
    log_sum,
    row_slope,
)
from cdc_kernels.special import NOTHING, log1p, log_expm1, log_or_nothing, logaddexp, softplus

#: Planes of finished row sums: ln(rest) (or -ln u), ln alpha_y / W, ln sum of squares, sum of KL elements; then,
#: for the backward kernels, the loss's gradients by these four, without KL's value: 3 values, 4 gradients.
TOTAL, LOG_TARGET, LOG_SQUARE, KL_SUM = 0, 1, 2, 3
EPS = tl.constexpr(1e-12)  # F.normalize's floor for a length
#: A vector shorter than the floor (its inverse length times EPS is 1, to rounding) is divided by a constant.
SHORT = tl.constexpr(0.9999)


@triton.jit
def operand(x, UPCAST: tl.constexpr):
    """A loaded operand of a product; the interpreter's bf16 product is wrong, so there it is made float32."""
    if UPCAST:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def part_of(x, at: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Part ``at`` of 1, 2 or 4 that lie side by side in x [ROWS, PARTS * COLUMNS]."""
    if PARTS == 1:
        return x
    else:
        parts = tl.permute(tl.reshape(x, (ROWS, PARTS, COLUMNS)), (0, 2, 1))
        if PARTS == 2:
            even, odd = tl.split(parts)
        else:
            evens, odds = tl.split(tl.reshape(parts, (ROWS, COLUMNS, 2, 2)))
            pair = evens
            if at % 2 == 1:
                pair = odds
            even, odd = tl.split(pair)
        if at // (PARTS // 2) == 0:
            return even
        else:
            return odd


@triton.jit
def cosine_tile(
    x_ptr, t_ptr, xi_ptr, ti_ptr, m, rows, cols, live, first, M, K, D, x_b, x_m, t_m, t_k, xi_b, xi_m,
    PROMPTS: tl.constexpr, LOADED: tl.constexpr, NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``<x_b, t_mk>`` of rows and columns inside the problem, of unit vectors if NORMALIZE; and inverse lengths.

    Products are made here, or LOADED: x_ptr is then a workspace [M, B, classes from ``first``] that a library filled.
    PROMPTS of them from m on lie side by side, [b, PROMPTS * k], if the images are the same for all: a tile of images
    that was read once meets as many more columns.
    """
    prompts = m
    if PROMPTS > 1:
        prompts = m + tl.arange(0, PROMPTS * BLOCK_K) // BLOCK_K
        cols = tl.reshape(tl.broadcast_to(cols[None, :], (PROMPTS, BLOCK_K)), (PROMPTS * BLOCK_K,))
    if LOADED:
        # others may have written here already where a tile reaches over the edge
        at = x_ptr + m.to(tl.int64) * x_m + rows.to(tl.int64)[:, None] * x_b + (cols - first)[None, :]
        cosine = tl.load(at, mask=live, other=0.0)
    else:
        d = tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + (m.to(tl.int64) * x_m) + rows.to(tl.int64)[:, None] * x_b + d[None, :]
        t_ptrs = t_ptr + (prompts.to(tl.int64) * t_m + cols.to(tl.int64) * t_k)[None, :] + d[:, None]
        cosine = tl.zeros((BLOCK_B, PROMPTS * BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_D):
            if EVEN_D:
                x = tl.load(x_ptrs + start)
                t = tl.load(t_ptrs + start)
            else:
                x = tl.load(x_ptrs + start, mask=d[None, :] < D - start, other=0.0)
                t = tl.load(t_ptrs + start, mask=d[:, None] < D - start, other=0.0)
            cosine = tl.dot(operand(x, UPCAST), operand(t, UPCAST), cosine, input_precision=PRECISION)
    xi = tl.full((BLOCK_B,), 1.0, tl.float32)
    ti = tl.full((PROMPTS * BLOCK_K,), 1.0, tl.float32)
    if NORMALIZE:
        xi = 1.0 / tl.maximum(tl.load(xi_ptr + rows * xi_b + m * xi_m), EPS)
        ti = 1.0 / tl.maximum(tl.load(ti_ptr + prompts.to(tl.int64) * K + cols), EPS)
        cosine = cosine * xi[:, None] * ti[None, :]
    return cosine, xi, ti


@triton.jit
def prompt_constants(scale_ptr, bias_ptr, m, HAS_BIAS: tl.constexpr):
    """scale_m and bias_m."""
    scale = tl.load(scale_ptr + m)
    if HAS_BIAS:
        return scale, tl.load(bias_ptr + m)
    else:
        return scale, scale * 0


@triton.jit
def log_weight_of(weight_ptr, m, rows, B, log_share, RULE: tl.constexpr):
    """Logarithm of the rule's weight of prompt m, [b, 1]."""
    if RULE == "weighted":
        w = tl.load(weight_ptr + m.to(tl.int64) * B + rows)
        return log_or_nothing(w)[:, None]
    else:
        return (rows * 0 + log_share)[:, None]


@triton.jit
def store_sums(
    partial_ptr, sums_ptr, x, is_target, has_target, live, r, tile, rows, row_live, B, R, tiles,
    log_share_of_class, log_others, log_w,
    LINEAR: tl.constexpr, WHOLE: tl.constexpr, TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """One opinion's partial row sums over this tile of classes, the target left out; and the target's own.

    If the tile is the WHOLE row the sums are finished: ``partial`` is ``sums``, with one tile.
    """
    size = R.to(tl.int64) * tiles * B
    at = partial_ptr + (r * tiles + tile).to(tl.int64) * B + rows
    others = live
    if TARGET:
        others = live & (is_target == 0)
    total = log_sum(x, others, LINEAR)
    if WHOLE:
        total = logaddexp(total, log_others)
    tl.store(at, total, mask=row_live)
    if TARGET:
        log_target = log_alpha_of(tl.sum(tl.where(is_target, x, 0.0), 1), log_share_of_class, LINEAR)
        of_target = sums_ptr + R.to(tl.int64) * B + r.to(tl.int64) * B + rows
        tl.store(of_target, log_target, mask=row_live & has_target)
    elif WHOLE:
        tl.store(at + size, total * 0, mask=row_live)
    if SQUARE or KL:
        log_alpha = log_alpha_of(x, log_share_of_class, LINEAR)
    if SQUARE:
        tl.store(at + 2 * size, log_sum(2.0 * log_alpha, others, False), mask=row_live)
    elif WHOLE:
        tl.store(at + 2 * size, total * 0, mask=row_live)
    if KL:
        share = tl.where(others, kl_element(log_alpha + log_w), 0.0)
        tl.store(at + 3 * size, tl.sum(share, 1), mask=row_live)
    elif WHOLE:
        tl.store(at + 3 * size, total * 0, mask=row_live)


@triton.jit
def place(target_ptr, first, last, B, TARGET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows, columns and targets of this program's tile of images and of classes first .. last."""
    pid = tl.program_id(0)
    across = tl.cdiv(B, BLOCK_B)
    tile = pid // across  # neighbours share text features, the larger operand
    rows = (pid % across) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = first + tile * BLOCK_K + tl.arange(0, BLOCK_K)
    row_live = rows < B
    live = (cols < last)[None, :] & row_live[:, None]
    is_target = live
    has_target = row_live
    if TARGET:
        target = tl.load(target_ptr + tl.minimum(rows, B - 1)).to(tl.int32)
        is_target = (cols[None, :] == target[:, None]) & live
        has_target = tl.max(is_target.to(tl.int32), 1) > 0
    return rows, row_live, cols, live, is_target, has_target, tile


@triton.jit
def fuse_tile(
    x_ptr, t_ptr, scale_ptr, bias_ptr, xi_ptr, ti_ptr, weight_ptr, partial_ptr, sums_ptr,
    rows, row_live, cols, live, is_target, has_target, tile, tiles, first,
    B, M, K, D, x_b, x_m, t_m, t_k, xi_b, xi_m, log_w, log_share, log_share_of_class, log_others,
    ACTIVATION: tl.constexpr, RULE: tl.constexpr, FUSED: tl.constexpr, SUMS: tl.constexpr, WHOLE: tl.constexpr,
    TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr, PROMPTS: tl.constexpr, LOADED: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The fused state of a tile and the bound on its L, which tells what the state is; row sums on the way."""
    state = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    bound = log_w * 0
    R = tile * 0 + M + 1
    for prompt in range(0, M, PROMPTS):
        cosines, _, _ = cosine_tile(
            x_ptr, t_ptr, xi_ptr, ti_ptr, tile * 0 + prompt, rows, cols, live, first, M, K, D,
            x_b, x_m, t_m, t_k, xi_b, xi_m,
            PROMPTS, LOADED, NORMALIZE, EVEN_D, UPCAST, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        for part in tl.static_range(PROMPTS):
            m = tile * 0 + prompt + part
            cosine = part_of(cosines, part, PROMPTS, BLOCK_B, BLOCK_K)
            scale, bias = prompt_constants(scale_ptr, bias_ptr, m, HAS_BIAS)
            z = cosine * scale + bias
            y, _ = evidence(z, log_w, ACTIVATION)
            log_weight = log_weight_of(weight_ptr, m, rows, B, log_share, RULE)
            before = bound
            if not FUSED:
                before = bound * 0
            bound = before + softplus(tl.max(tl.max(y, 1), 0))
            if bound < LINEAR_LIMIT:
                v = tl.exp(y)
                if SUMS:
                    store_sums(
                        partial_ptr, sums_ptr, v, is_target, has_target, live, m, tile, rows, row_live, B, R, tiles,
                        log_share_of_class, log_others, log_w, True, WHOLE, TARGET, SQUARE, KL,
                    )  # fmt: skip
                if FUSED:
                    state = fuse_linear(state, v, log_weight, RULE)
            else:
                if SUMS:
                    store_sums(
                        partial_ptr, sums_ptr, y, is_target, has_target, live, m, tile, rows, row_live, B, R, tiles,
                        log_share_of_class, log_others, log_w, False, WHOLE, TARGET, SQUARE, KL,
                    )  # fmt: skip
                if FUSED:
                    if before < LINEAR_LIMIT:
                        state = leave_linear(state, RULE)
                    _, l = evidence(z, log_w, ACTIVATION)  # noqa: E741
                    state = fuse(state, y, l, log_weight, RULE)
    return state, bound


@triton.jit
def log_ratio_of(state, bound, RULE: tl.constexpr):
    """L of a fused state."""
    if bound < LINEAR_LIMIT:
        L = log1p(state)
    else:
        _, L = fused(state, RULE)
    return L


@triton.jit
def forward_kernel(
    x_ptr, t_ptr, scale_ptr, bias_ptr, xi_ptr, ti_ptr, weight_ptr, target_ptr,
    ratio_ptr, partial_ptr, sums_ptr,
    B, M, K, D, first, last, tiles, x_b, x_m, t_m, t_k, xi_b, xi_m, ratio_b,
    log_w, log_share, log_share_of_class, log_others,
    ACTIVATION: tl.constexpr, RULE: tl.constexpr, FUSED: tl.constexpr, SUMS: tl.constexpr, RATIO: tl.constexpr,
    WHOLE: tl.constexpr, TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
    PROMPTS: tl.constexpr, LOADED: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of images and of classes first .. last, all prompts, PROMPTS of them (which divides M) at a time."""
    rows, row_live, cols, live, is_target, has_target, tile = place(
        target_ptr, first, last, B, TARGET, BLOCK_B, BLOCK_K
    )
    safe_rows = tl.minimum(rows, B - 1)
    state, bound = fuse_tile(
        x_ptr, t_ptr, scale_ptr, bias_ptr, xi_ptr, ti_ptr, weight_ptr, partial_ptr, sums_ptr,
        safe_rows, row_live, tl.minimum(cols, last - 1), live, is_target, has_target, tile, tiles, first,
        B, M, K, D, x_b, x_m, t_m, t_k, xi_b, xi_m, log_w, log_share, log_share_of_class, log_others,
        ACTIVATION, RULE, FUSED, SUMS, WHOLE, TARGET, SQUARE, KL, PROMPTS, LOADED,
        HAS_BIAS, NORMALIZE, EVEN_D, UPCAST, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if FUSED:
        if SUMS:
            R = tile * 0 + M + 1
            if bound < LINEAR_LIMIT:
                store_sums(
                    partial_ptr, sums_ptr, state, is_target, has_target, live, R - 1, tile, safe_rows, row_live, B, R,
                    tiles, log_share_of_class, log_others, log_w, True, WHOLE, TARGET, SQUARE, KL,
                )  # fmt: skip
            else:
                Y, _ = fused(state, RULE)
                store_sums(
                    partial_ptr, sums_ptr, Y, is_target, has_target, live, R - 1, tile, safe_rows, row_live, B, R,
                    tiles, log_share_of_class, log_others, log_w, False, WHOLE, TARGET, SQUARE, KL,
                )  # fmt: skip
        if RATIO:
            at = ratio_ptr + rows.to(tl.int64)[:, None] * ratio_b + (cols - first)[None, :]
            tl.store(at, log_ratio_of(state, bound, RULE), mask=live)


@triton.jit
def log_row(partial_ptr, rows, live, B, tiles, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr):
    """``ln sum exp`` over tiles of partial row sums kept as logarithms."""
    total = tl.full((BLOCK_B,), NOTHING, tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = live[:, None] & (tile < tiles)[None, :]
        part = tl.load(partial_ptr + tile.to(tl.int64)[None, :] * B + rows[:, None], mask=mask, other=NOTHING)
        total = logaddexp(total, log_sum(part, mask, False))
    return total


@triton.jit
def plain_row(partial_ptr, rows, live, B, tiles, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sum over tiles of partial row sums."""
    total = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = live[:, None] & (tile < tiles)[None, :]
        total += tl.sum(tl.load(partial_ptr + tile.to(tl.int64)[None, :] * B + rows[:, None], mask=mask, other=0.0), 1)
    return total


@triton.jit
def finish_kernel(
    partial_ptr, sums_ptr, B, R, tiles, log_others, ADD: tl.constexpr,
    TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Partial row sums to row sums: planes total, (log_target, written already), log_square, kl_sum.

    ADD: to those of earlier classes. Else to the prior's share of a row: 1 over all classes, (K - 1) / K without the
    target, nothing if K is 1.
    """
    r = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = rows < B
    plane = (r * 0 + R).to(tl.int64) * B
    at = sums_ptr + r.to(tl.int64) * B + rows
    part = partial_ptr + r.to(tl.int64) * tiles * B
    total = tl.zeros((BLOCK_B,), tl.float32) + log_others
    log_square = tl.full((BLOCK_B,), NOTHING, tl.float32)
    kl_sum = tl.zeros((BLOCK_B,), tl.float32)
    if ADD:
        total = tl.load(at, mask=live, other=0.0)
        log_square = tl.load(at + 2 * plane, mask=live, other=0.0)
        kl_sum = tl.load(at + 3 * plane, mask=live, other=0.0)
    tl.store(at, logaddexp(total, log_row(part, rows, live, B, tiles, BLOCK_B, BLOCK_T)), mask=live)
    if not TARGET:
        tl.store(at + plane, total * 0, mask=live)
    if SQUARE:
        log_square = logaddexp(log_square, log_row(part + 2 * plane * tiles, rows, live, B, tiles, BLOCK_B, BLOCK_T))
        tl.store(at + 2 * plane, log_square, mask=live)
    else:
        tl.store(at + 2 * plane, total * 0, mask=live)
    if KL:
        kl_sum += plain_row(part + 3 * plane * tiles, rows, live, B, tiles, BLOCK_B, BLOCK_T)
    tl.store(at + 3 * plane, kl_sum, mask=live)


# ---- backward ---------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(
    planes_ptr, r, rows, B, R, TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr
):  # fmt: skip
    """One opinion's total, log_target and log_square, then the gradients of these three and of kl_sum."""
    size = R.to(tl.int64) * B
    at = planes_ptr + r.to(tl.int64) * B + rows
    total = tl.load(at)
    g_total = tl.load(at + 3 * size)
    log_target = total
    log_square = total
    g_target = g_total
    g_square = g_total
    g_kl = g_total
    if TARGET:
        log_target = tl.load(at + size)
        g_target = tl.load(at + 4 * size)
    if SQUARE:
        log_square = tl.load(at + 2 * size)
        g_square = tl.load(at + 5 * size)
    if KL:
        g_kl = tl.load(at + 6 * size)
    return total, log_target, log_square, g_total, g_target, g_square, g_kl


@triton.jit
def fused_slope_tile(
    L, rows, cols, is_target, planes_ptr, g_ratio_ptr, B, R, g_ratio_b, log_w, log_share_of_class,
    G_RATIO: tl.constexpr, TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Gradient of everything by the fused L on one tile."""
    total, log_target, log_square, g_total, g_target, g_square, g_kl = load_rows(
        planes_ptr, R - 1, rows, B, R, TARGET, SQUARE, KL
    )
    grad = row_slope(
        L, logaddexp(log_expm1(L), log_share_of_class), is_target, total, log_target, log_square,
        g_total, g_target, g_square, g_kl, log_w, TARGET, SQUARE, KL,
    )  # fmt: skip
    if G_RATIO:
        grad += tl.load(g_ratio_ptr + rows.to(tl.int64)[:, None] * g_ratio_b + cols[None, :])
    return grad


@triton.jit
def prompt_slope_tile(
    cosine, scale, bias, m, rows, live, is_target, L, by_fused, planes_ptr, weight_ptr, B, R,
    log_w, log_share, log_share_of_class,
    ACTIVATION: tl.constexpr, RULE: tl.constexpr, FUSED: tl.constexpr,
    TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Gradient of everything by the logits z of prompt m, and by the rule's weight, on one tile."""
    z = cosine * scale + bias
    y, _ = evidence(z, log_w, ACTIVATION)
    total, log_target, log_square, g_total, g_target, g_square, g_kl = load_rows(
        planes_ptr, m, rows, B, R, TARGET, SQUARE, KL
    )
    grad = row_slope(
        y, logaddexp(y, log_share_of_class), is_target, total, log_target, log_square,
        g_total, g_target, g_square, g_kl, log_w, TARGET, SQUARE, KL,
    )  # fmt: skip
    by_weight = grad * 0
    if FUSED:
        log_weight = log_weight_of(weight_ptr, m, rows, B, log_share, RULE)
        grad += by_fused * fuse_slope(y, log_weight, L, RULE)
        if RULE == "weighted":
            by_weight = tl.where(live, by_fused * tl.exp(y - L), 0.0)
    return tl.where(live, grad * evidence_slope(z, ACTIVATION), 0.0), by_weight


@triton.jit
def slope_tile(
    cosine, scale, bias, m, rows, cols, live, is_target,
    planes_ptr, ratio_ptr, g_ratio_ptr, weight_ptr, B, M, first, ratio_b, g_ratio_b,
    log_w, log_share, log_share_of_class,
    ACTIVATION: tl.constexpr, RULE: tl.constexpr, FUSED: tl.constexpr, G_RATIO: tl.constexpr,
    TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """As :func:`prompt_slope_tile`, with the fused log ratio from memory."""
    R = m * 0 + M + 1
    L = cosine
    by_fused = cosine
    if FUSED:
        L = tl.load(ratio_ptr + rows.to(tl.int64)[:, None] * ratio_b + (cols - first)[None, :])
        by_fused = fused_slope_tile(
            L, rows, cols, is_target, planes_ptr, g_ratio_ptr, B, R, g_ratio_b, log_w, log_share_of_class,
            G_RATIO, TARGET, SQUARE, KL,
        )  # fmt: skip
    return prompt_slope_tile(
        cosine, scale, bias, m, rows, live, is_target, L, by_fused, planes_ptr, weight_ptr, B, R,
        log_w, log_share, log_share_of_class, ACTIVATION, RULE, FUSED, TARGET, SQUARE, KL,
    )  # fmt: skip


@triton.jit
def gradient_dot(a, b, acc, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a @ b`` for a float32 and loaded b. float16 would lose small gradients, so it goes through float32."""
    if HALF == "bf16":
        return tl.dot(a.to(tl.bfloat16), b, acc)
    else:
        return tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def image_kernel(
    x_ptr, t_ptr, scale_ptr, bias_ptr, xi_ptr, ti_ptr, weight_ptr, target_ptr,
    planes_ptr, ratio_ptr, g_ratio_ptr, g_image_ptr, g_rows_ptr,
    B, M, K, D, first, last, group, span, x_b, x_m, t_m, t_k, xi_b, xi_m, ratio_b, g_ratio_b, gi_s, gi_b, gi_m,
    log_w, log_share, log_share_of_class,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
    ACTIVATION: tl.constexpr, RULE: tl.constexpr, FUSED: tl.constexpr, G_RATIO: tl.constexpr,
    TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, GRAD_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
):  # fmt: skip
    """Owns a tile of images (of ``group`` prompts: all for shared features, else one) and a slice of features.

    Few images are too few programs for a device: others own the next ``span`` classes (whole tiles) of first .. last,
    each with a gradient of its own, [splits, ..], still to be summed up. Adds to that of earlier classes when ADD.
    Rows [splits, 3, M, B]: the gradients of scale, bias and weight before they are summed over images.
    """
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_live = rows < B
    safe_rows = tl.minimum(rows, B - 1)
    groups = tl.cdiv(M, group)
    split = tl.program_id(1) // groups
    m0 = (tl.program_id(1) % groups) * group
    begin = first + split * span
    d = tl.program_id(2) * OUT_D + tl.arange(0, OUT_D)
    target = safe_rows
    if TARGET:
        target = tl.load(target_ptr + safe_rows).to(tl.int32)
    acc = tl.zeros((BLOCK_B, OUT_D), tl.float32)
    along = tl.zeros((BLOCK_B,), tl.float32)  # gradient along x, which normalising takes away
    inverse = tl.full((BLOCK_B,), 1.0, tl.float32)
    for prompt in range(m0, m0 + group):
        m = m0 * 0 + prompt
        scale, bias = prompt_constants(scale_ptr, bias_ptr, m, HAS_BIAS)
        by_scale = tl.zeros((BLOCK_B,), tl.float32)
        by_bias = tl.zeros((BLOCK_B,), tl.float32)
        by_weight = tl.zeros((BLOCK_B,), tl.float32)
        for start in range(begin, tl.minimum(begin + span, last), BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            safe_cols = tl.minimum(cols, last - 1)
            live = row_live[:, None] & (cols < last)[None, :]
            is_target = live
            if TARGET:
                is_target = (cols[None, :] == target[:, None]) & live
            cosine, xi, ti = cosine_tile(
                x_ptr, t_ptr, xi_ptr, ti_ptr, m, safe_rows, safe_cols, live, first, M, K, D,
                x_b, x_m, t_m, t_k, xi_b, xi_m,
                1, False, NORMALIZE, EVEN_D, UPCAST, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            grad, weight = slope_tile(
                cosine, scale, bias, m, safe_rows, safe_cols, live, is_target,
                planes_ptr, ratio_ptr, g_ratio_ptr, weight_ptr, B, M, first, ratio_b, g_ratio_b,
                log_w, log_share, log_share_of_class,
                ACTIVATION, RULE, FUSED, G_RATIO, TARGET, SQUARE, KL,
            )  # fmt: skip
            by_scale += tl.sum(grad * cosine, 1)
            by_bias += tl.sum(grad, 1)
            by_weight += tl.sum(weight, 1)
            if FEATURES:
                inverse = xi
                t_ptrs = t_ptr + m.to(tl.int64) * t_m + safe_cols.to(tl.int64)[:, None] * t_k + d[None, :]
                t = operand(tl.load(t_ptrs, mask=(d < D)[None, :], other=0.0), UPCAST)
                acc = gradient_dot(grad * (ti * scale)[None, :], t, acc, HALF, GRAD_PRECISION)
        along += by_scale * scale
        if ROWS and tl.program_id(2) == 0:
            size = (m * 0 + M).to(tl.int64) * B
            at = g_rows_ptr + split * 3 * size + m.to(tl.int64) * B + rows
            if ADD:
                by_scale += tl.load(at, mask=row_live)
                by_bias += tl.load(at + size, mask=row_live)
                by_weight += tl.load(at + 2 * size, mask=row_live)
            tl.store(at, by_scale, mask=row_live)
            tl.store(at + size, by_bias, mask=row_live)
            tl.store(at + 2 * size, by_weight, mask=row_live)
    if FEATURES:
        mask = row_live[:, None] & (d < D)[None, :]
        acc = acc * inverse[:, None]
        if NORMALIZE:
            along = tl.where(inverse * EPS < SHORT, along * inverse * inverse, 0.0)
            x_ptrs = x_ptr + m0.to(tl.int64) * x_m + safe_rows.to(tl.int64)[:, None] * x_b + d[None, :]
            acc -= along[:, None] * tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        at = (
            g_image_ptr
            + split.to(tl.int64) * gi_s
            + rows.to(tl.int64)[:, None] * gi_b
            + m0.to(tl.int64) * gi_m
            + d[None, :]
        )
        if ADD:
            acc += tl.load(at, mask=mask, other=0.0)
        tl.store(at, acc, mask=mask)


@triton.jit
def text_kernel(
    x_ptr, t_ptr, scale_ptr, bias_ptr, xi_ptr, ti_ptr, weight_ptr, target_ptr,
    planes_ptr, ratio_ptr, g_ratio_ptr, g_text_ptr,
    B, M, K, D, first, last, x_b, x_m, t_m, t_k, xi_b, xi_m, ratio_b, g_ratio_b,
    log_w, log_share, log_share_of_class,
    ACTIVATION: tl.constexpr, RULE: tl.constexpr, FUSED: tl.constexpr, G_RATIO: tl.constexpr,
    TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, GRAD_PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
):  # fmt: skip
    """Owns a tile of the classes of one prompt and a slice of features; g_text [M, K, D] is contiguous."""
    cols = first + tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    col_live = cols < last
    safe_cols = tl.minimum(cols, last - 1)
    m = tl.program_id(1)
    d = tl.program_id(2) * OUT_D + tl.arange(0, OUT_D)
    scale, bias = prompt_constants(scale_ptr, bias_ptr, m, HAS_BIAS)
    acc = tl.zeros((BLOCK_K, OUT_D), tl.float32)
    along = tl.zeros((BLOCK_K,), tl.float32)
    inverse = tl.full((BLOCK_K,), 1.0, tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        safe_rows = tl.minimum(rows, B - 1)
        live = (rows < B)[:, None] & col_live[None, :]
        is_target = live
        if TARGET:
            target = tl.load(target_ptr + safe_rows).to(tl.int32)
            is_target = (cols[None, :] == target[:, None]) & live
        cosine, xi, ti = cosine_tile(
            x_ptr, t_ptr, xi_ptr, ti_ptr, m, safe_rows, safe_cols, live, first, M, K, D,
            x_b, x_m, t_m, t_k, xi_b, xi_m, 1, False, NORMALIZE, EVEN_D, UPCAST, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        grad, _ = slope_tile(
            cosine, scale, bias, m, safe_rows, safe_cols, live, is_target,
            planes_ptr, ratio_ptr, g_ratio_ptr, weight_ptr, B, M, first, ratio_b, g_ratio_b,
            log_w, log_share, log_share_of_class,
            ACTIVATION, RULE, FUSED, G_RATIO, TARGET, SQUARE, KL,
        )  # fmt: skip
        along += tl.sum(grad * cosine, 0) * scale
        inverse = ti
        x_ptrs = x_ptr + m.to(tl.int64) * x_m + safe_rows.to(tl.int64)[:, None] * x_b + d[None, :]
        x = operand(tl.load(x_ptrs, mask=(d < D)[None, :], other=0.0), UPCAST)
        acc = gradient_dot(tl.trans(grad * (xi * scale)[:, None]), x, acc, HALF, GRAD_PRECISION)
    mask = col_live[:, None] & (d < D)[None, :]
    acc = acc * inverse[:, None]
    if NORMALIZE:
        along = tl.where(inverse * EPS < SHORT, along * inverse * inverse, 0.0)
        t_ptrs = t_ptr + m.to(tl.int64) * t_m + safe_cols.to(tl.int64)[:, None] * t_k + d[None, :]
        acc -= along[:, None] * tl.load(t_ptrs, mask=mask, other=0.0).to(tl.float32)
    at = g_text_ptr + (m.to(tl.int64) * K + cols.to(tl.int64))[:, None] * D + d[None, :]
    tl.store(at, acc.to(g_text_ptr.dtype.element_ty), mask=mask)
