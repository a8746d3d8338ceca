"""What happens to a tile of logits: activation, fusion rule and row sums, composed at compile time.

Letters: for evidence e and prior weight W, ``v = e / W``, ``y = ln v`` and ``l = ln(1 + v)``; capital V, Y and L for
the fused opinion. A tile starts in linear space, one exp for each logit, and leaves it for logarithms as soon as its
largest logit says that a product over prompts could overflow: evidence of e^100 stays finite, and small evidence is
cheap. The running ``bound`` on L decides; ``LINEAR`` marks values v, as opposed to y.

To add an activation, extend :func:`evidence` and :func:`evidence_slope`; to add a rule, :func:`fuse_linear`,
:func:`leave_linear`, :func:`fuse`, :func:`fused` and :func:`fuse_slope`. No kernel changes.
"""

import triton
import triton.language as tl

from cdc_kernels.special import (
    LN_4,
    NOTHING,
    digamma,
    lgamma,
    log1p,
    log_expm1,
    log_or_nothing,
    logaddexp,
    sigmoid,
    softplus,
    trigamma,
)

ACTIVATIONS = ("exp", "softplus", "relu")
RULES = ("dempster", "cumulative", "averaging", "weighted")
#: No L above this is kept in linear space: e^69 is 1e30, so that a row sum of V stays finite.
LINEAR_LIMIT = tl.constexpr(69.0)


# ---- activation -------------------------------------------------------------------------------------------------


@triton.jit
def _log_softplus(z):
    """``ln ln(1 + exp(z))``, which is z - exp(z) / 2 far to the left."""
    e = softplus(tl.maximum(z, -15.0))
    return tl.where(z < -15.0, z - 0.5 * tl.exp(z), tl.log(e))


@triton.jit
def evidence(z, log_w, ACTIVATION: tl.constexpr):
    """y and l of ``e = activation(z)``."""
    if ACTIVATION == "exp":
        y = z - log_w
        return y, softplus(y)
    elif ACTIVATION == "softplus":
        return _log_softplus(z) - log_w, log1p(softplus(z) * tl.exp(-log_w))
    else:
        e = tl.maximum(z, 0.0)
        return log_or_nothing(e) - log_w, log1p(e * tl.exp(-log_w))


@triton.jit
def evidence_slope(z, ACTIVATION: tl.constexpr):
    """``dy/dz``."""
    if ACTIVATION == "exp":
        return z * 0 + 1.0
    elif ACTIVATION == "softplus":
        return tl.where(z < -15.0, 1.0, sigmoid(z) / softplus(tl.maximum(z, -15.0)))
    else:
        return tl.where(z > 0, 1.0 / tl.maximum(z, 1e-37), 0.0)


# ---- fusion rule ------------------------------------------------------------------------------------------------
# The running state is V in linear space; in logarithms sum_m l_m for Dempster's rule, ln(sum_m w_m v_m) for the others.


@triton.jit
def fuse_linear(state, v, log_weight, RULE: tl.constexpr):
    """The state after one more prompt, in linear space; exact for tiny evidence too."""
    if RULE == "dempster":
        return state + (v + state * v)
    else:
        return state + v * tl.exp(log_weight)


@triton.jit
def leave_linear(state, RULE: tl.constexpr):
    """The state in logarithms; of 0, the state before the first prompt."""
    if RULE == "dempster":
        return log1p(state)
    else:
        return log_or_nothing(state)


@triton.jit
def fuse(state, y, l, log_weight, RULE: tl.constexpr):  # noqa: E741
    """The state after one more prompt; log_weight broadcasts, Dempster's rule has none."""
    if RULE == "dempster":
        return state + l
    else:
        return logaddexp(state, y + log_weight)


@triton.jit
def fused(state, RULE: tl.constexpr):
    """Y and L of the fused opinion."""
    if RULE == "dempster":
        return log_expm1(state), state
    else:
        return state, softplus(state)


@triton.jit
def fuse_slope(y, log_weight, L, RULE: tl.constexpr):
    """``dL/dy`` of one prompt."""
    if RULE == "dempster":
        return sigmoid(y)
    else:
        return tl.exp(y + log_weight - L)


# ---- row sums ---------------------------------------------------------------------------------------------------


@triton.jit
def log_alpha_of(x, log_share_of_class, LINEAR: tl.constexpr):
    """``ln(alpha / W) = ln(v + 1 / K)`` from v or y."""
    if LINEAR:
        return tl.log(x + tl.exp(log_share_of_class))
    else:
        return logaddexp(x, log_share_of_class)


@triton.jit
def log_sum(x, live, LINEAR: tl.constexpr):
    """``ln sum v`` along a row over the live columns, from v or y; NOTHING where there is none."""
    if LINEAR:
        return log_or_nothing(tl.sum(tl.where(live, x, 0.0), 1))
    else:
        return _log_sum_exp(tl.where(live, x, NOTHING))


@triton.jit
def _log_sum_exp(x):
    """``ln sum exp(x)`` along a row."""
    top = tl.max(x, 1)
    total = tl.sum(tl.exp(x - top[:, None]), 1)
    return tl.where(top > 0.5 * NOTHING, top + tl.log(total), NOTHING)


@triton.jit
def kl_element(log_a):
    """``(a - 1) psi(a) - lnG(a) - a + 1`` from ``ln a``: one class's share of KL(Dir(a) || Dir(1)).

    What grows linearly with a is left out here and in :func:`kl_total`, where it cancels.
    """
    small = tl.exp(tl.minimum(log_a, LN_4))
    near = (small - 1.0) * digamma(small) - lgamma(small) - small + 1.0
    log_a = tl.maximum(log_a, LN_4)
    inverse = tl.exp(-log_a)
    q = inverse * inverse
    odd = -0.16666666666666666 + q * (0.011111111111111112 - q * (0.004761904761904762 - q * 0.004761904761904762))
    even = 0.08333333333333333 - q * (0.008333333333333333 - q * (0.003968253968253968 - q * 0.004166666666666667))
    far = -0.4189385332046727 - 0.5 * log_a + inverse * (0.5 + odd + inverse * even)
    return tl.where(log_a > LN_4, far, near)


@triton.jit
def kl_slope(log_a):
    """Derivative of :func:`kl_element` by ``ln a``: ``a ((a - 1) psi'(a) - 1)``."""
    small = tl.exp(tl.minimum(log_a, LN_4))
    near = small * ((small - 1.0) * trigamma(small) - 1.0)
    log_a = tl.maximum(log_a, LN_4)
    inverse = tl.exp(-log_a)
    q = inverse * inverse
    odd = 0.16666666666666666 - q * (
        0.03333333333333333 - q * (0.023809523809523808 - q * (0.03333333333333333 - q * 0.07575757575757576))
    )
    even = -0.16666666666666666 + q * (
        0.03333333333333333 - q * (0.023809523809523808 - q * (0.03333333333333333 - q * 0.07575757575757576))
    )
    far = -0.5 + inverse * (-0.5 + odd + inverse * even)
    return tl.where(log_a > LN_4, far, near)


@triton.jit
def row_slope(
    lead, log_alpha, is_target,
    total, log_target, log_square, g_total, g_target, g_square, g_kl,
    log_w, TARGET: tl.constexpr, SQUARE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Gradient of the row sums with respect to ``lead``, which is y for a prompt and L for the fused opinion.

    The derivative of v by either is ``exp(lead)``. Row sums and their gradients [b] broadcast over the classes.
    """
    # off the target no exponent exceeds ln 2, or ln K; on it, where these slopes are dropped, exp may not overflow
    slope = tl.exp(tl.minimum(lead - total[:, None], 1.0)) * g_total[:, None]
    if KL:
        slope += kl_slope(log_alpha + log_w) * tl.exp(lead - log_alpha) * g_kl[:, None]
    if SQUARE:
        slope += 2.0 * tl.exp(tl.minimum(log_alpha + lead - log_square[:, None], 80.0)) * g_square[:, None]
    if TARGET:
        slope = tl.where(is_target, tl.exp(tl.minimum(lead - log_target[:, None], 80.0)) * g_target[:, None], slope)
    return slope


# ---- losses from row sums ---------------------------------------------------------------------------------------


@triton.jit
def digamma_gap(log_a, log_rest):
    """``psi(a + r) - psi(a)``, and its derivatives by ``ln a`` and ``ln r``, as sums of terms of one sign.

    No subtraction of nearly equal numbers, however confident the opinion: ``r / (a + r + i)`` is a sigmoid.
    """
    gap = log_a * 0
    by_a = log_a * 0  # r-dependence of a psi'(a), with a minus sign
    by_rest = log_a * 0  # r psi'(a + r)
    for i in tl.static_range(9):
        if i == 0:  # noqa: SIM108 (a branch at compile time)
            log_ai = log_a
        else:
            log_ai = logaddexp(log_a, tl.log(log_a * 0 + i))
        inverse = tl.exp(-log_ai)
        share = sigmoid(log_rest - log_ai)  # r / (a + r + i)
        rest = sigmoid(log_ai - log_rest)  # (a + i) / (a + r + i)
        near = tl.exp(log_a - log_ai)  # a / (a + i)
        if i < 8:
            gap += inverse * share
            by_a += near * inverse * share * (1.0 + rest)
            by_rest += share * rest * inverse
        else:
            q = inverse * inverse
            c = rest * rest
            gap += softplus(log_rest - log_ai) + 0.5 * inverse * share
            # 1/x^n - 1/y^n with x/y = rest: share (1 + rest + .. + rest^(n - 1)) / x^n
            two = 1.0 + rest
            four = two * (1.0 + c)
            six = two * (1.0 + c + c * c)
            gap += (
                q
                * share
                * (0.08333333333333333 * two - q * (0.008333333333333333 * four - q * 0.003968253968253968 * six))
            )
            three = two + c
            five = three + c * rest + c * c
            seven = five + c * c * rest + c * c * c
            odd = 0.16666666666666666 * three - q * (0.03333333333333333 * five - q * 0.023809523809523808 * seven)
            by_a += near * share * (1.0 + inverse * (0.5 * two + inverse * odd))
            small = inverse * rest  # 1 / (a + r + 8)
            p = small * small
            odd = 0.16666666666666666 - p * (0.03333333333333333 - p * 0.023809523809523808)
            by_rest += share * (1.0 + small * (0.5 + small * odd))
    return gap, -by_a, by_rest


@triton.jit
def kl_total(log_total, K):
    """``lnG(S) - (S - K) psi(S) + S - (lnG(K) + K)`` and its derivative by ``ln S``."""
    small = tl.exp(tl.minimum(log_total, LN_4))
    classes = log_total * 0 + K
    near = lgamma(small) - (small - classes) * digamma(small) + small
    near_slope = small * (1.0 - (small - classes) * trigamma(small))
    far_log = tl.maximum(log_total, LN_4)
    inverse = tl.exp(-far_log)
    q = inverse * inverse
    odd = 0.16666666666666666 - q * (0.011111111111111112 - q * (0.004761904761904762 - q * 0.004761904761904762))
    even = 0.08333333333333333 - q * (0.008333333333333333 - q * (0.003968253968253968 - q * 0.004166666666666667))
    far = (classes - 0.5) * far_log + 1.4189385332046727 + inverse * (odd - classes * (0.5 + inverse * even))
    odd = 0.16666666666666666 - q * (
        0.03333333333333333 - q * (0.023809523809523808 - q * (0.03333333333333333 - q * 0.07575757575757576))
    )
    # S (1 - (S - K) psi'(S)) = K - 1/2 + (K / 2 - 1/6 ..) / S + ..
    far_slope = classes - 0.5 + inverse * (classes * (0.5 + inverse * odd) - odd)
    value = tl.where(log_total > LN_4, far, near)
    constant = lgamma(classes) + classes
    return value - constant, tl.where(log_total > LN_4, far_slope, near_slope)


@triton.jit
def dirichlet_loss(
    log_target, log_rest, log_square, kl_sum, log_w, K, kl_weight, FORM: tl.constexpr, KL: tl.constexpr
):  # fmt: skip
    """The loss of opinions from their row sums, and its derivatives by log_rest, log_target and log_square."""
    miss = sigmoid(log_rest - log_target)  # 1 - p_y
    hit = sigmoid(log_target - log_rest)
    g_square = log_target * 0
    if FORM == "digamma":
        loss, g_target, g_rest = digamma_gap(log_target + log_w, log_rest + log_w)
    elif FORM == "log":
        loss = softplus(log_rest - log_target)
        g_target = -miss
        g_rest = miss
    else:
        log_total = logaddexp(log_rest, log_target)
        rest_square = tl.exp(log_square - 2.0 * log_total)
        spread = miss * (2.0 - miss) - rest_square  # 1 - sum_k p_k^2
        fall = sigmoid(-log_total - log_w)  # 1 / (S + 1)
        loss = miss * miss + rest_square + spread * fall
        # d miss / d log_rest = miss hit = -d miss / d log_target
        by_miss = 2.0 * miss + fall * (2.0 - 2.0 * miss)
        by_total = -2.0 * rest_square * (1.0 - fall) - spread * fall * (1.0 - fall)
        g_rest = by_miss * miss * hit + by_total * miss
        g_target = -by_miss * miss * hit + by_total * hit
        g_square = rest_square * (1.0 - fall)
    g_kl = log_target * 0
    if KL:
        log_total = softplus(log_rest + log_w)  # of a~, whose target is 1
        value, slope = kl_total(log_total, K)
        loss += kl_weight * (value + kl_sum)
        g_rest += kl_weight * slope * sigmoid(log_rest + log_w)
        g_kl += kl_weight
    return loss, g_rest, g_target, g_square, g_kl
