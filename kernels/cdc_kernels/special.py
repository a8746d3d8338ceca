"""Special functions in plain ``tl``: what the epilogues need and libdevice lacks, or the interpreter cannot call.

All take and return float32. Maximum errors, against float64 over the range stated (tests/kernels/test_special.py
holds them to it); |f| is the true value:

    function            range                 maximum error
    log1p_unit(x)       0 .. 1                2e-7 |f|
    log1p(x)            0 .. 1e30             3e-7 |f|
    expm1(x)            -100 .. 88            (6e-7 + 6e-8 |x|) |f|
    softplus(x)         -87 .. 1e30           (6e-7 + 6e-8 |x|) |f|, for x < 0; else 6e-7 |f|
    log_expm1(x)        1e-30 .. 1e30         3e-7 max(|f|, 1)
    logaddexp(x, y)     -1e30 .. 1e30         6e-7 max(|f|, 1)
    lgamma(x)           1e-30 .. 1e30         4e-6 max(|f|, 1)
    digamma(x)          1e-30 .. 1e30         1e-6 max(|f|, 1)
    trigamma(x)         1e-19 .. 1e30         1e-6 |f|
    digamma_of_log(t)   exp(t) from 1e-30, t to 1e30      1e-6 max(|f|, 1)

What grows with |x| is what a GPU's exp, a power of 2, makes of rounding x log2(e); the interpreter's has none of it.
Below 1e-19 trigamma leaves float32 and is inf. ``NOTHING`` stands for ``ln 0``: a finite number, so that no
difference of two of them is nan.

The polynomials were fitted by us: Chebyshev interpolation of log1p(x)/x on [0, 1] and of expm1(x)/x on
[-1/2, 1/2]. Gamma functions shift their argument past 4 by the recurrence and take the asymptotic (Bernoulli)
series there, DLMF 5.11 and 5.15.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)
LN_2PI_HALF = tl.constexpr(0.9189385332046727)
LN_4 = tl.constexpr(1.3862943611198906)


@triton.jit
def log1p_unit(x):
    """``ln(1 + x)`` for x in [0, 1]: no special-function unit, eleven multiply-adds."""
    p = x * 0.0020376905615143537 - 0.01344483129704068
    p = p * x + 0.04155762321762388
    p = p * x - 0.08253533292526224
    p = p * x + 0.1242510299424684
    p = p * x - 0.1610863196019279
    p = p * x + 0.19891537487221295
    p = p * x - 0.24987392752999035
    p = p * x + 0.3333256918227744
    p = p * x - 0.4999998172449462
    p = p * x + 0.9999999992714395
    return p * x


@triton.jit
def log_or_nothing(x):
    """``ln x`` for x >= 0; NOTHING for 0 (and for numbers below 1e-37, which float32 hardly holds)."""
    return tl.where(x > 1e-37, tl.log(tl.maximum(x, 1e-37)), NOTHING)


@triton.jit
def log1p(x):
    """``ln(1 + x)`` for x >= 0."""
    return tl.where(x <= 1.0, log1p_unit(tl.minimum(x, 1.0)), tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """``exp(x) - 1``."""
    s = tl.minimum(tl.maximum(x, -0.5), 0.5)
    p = s * 0.0001997949769610834 + 0.001399778420013729
    p = p * s + 0.008333117122232331
    p = p * s + 0.04166530385532802
    p = p * s + 0.1666666774829782
    p = p * s + 0.5000000426131823
    p = (p * s + 0.9999999999154706) * s
    return tl.where(tl.abs(x) < 0.5, p, tl.exp(x) - 1.0)


@triton.jit
def softplus(x):
    """``ln(1 + exp(x))``."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``, without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def logaddexp(x, y):
    """``ln(exp(x) + exp(y))``."""
    return tl.maximum(x, y) + log1p_unit(tl.exp(-tl.abs(x - y)))


@triton.jit
def log_expm1(x):
    """``ln(exp(x) - 1)`` for x >= 0; NOTHING for 0."""
    y = x + tl.log(tl.maximum(-expm1(-x), 1e-37))
    return tl.where(x > 0, y, NOTHING)


@triton.jit
def _shift(x):
    """x + 4 where x is below 4, else x; and whether it was moved."""
    moved = x < 4.0
    return tl.where(moved, x + 4.0, x), moved


@triton.jit
def _digamma_tail(inverse):
    """``ln x - psi(x)`` from ``1 / x`` for x >= 4."""
    q = inverse * inverse
    series = q * (
        0.08333333333333333 - q * (0.008333333333333333 - q * (0.003968253968253968 - q * 0.004166666666666667))
    )
    return 0.5 * inverse + series


@triton.jit
def _lgamma_tail(inverse):
    """``lnG(x) - (x - 1/2) ln x + x - ln(2 pi) / 2`` from ``1 / x`` for x >= 4."""
    q = inverse * inverse
    return inverse * (
        0.08333333333333333 - q * (0.002777777777777778 - q * (0.0007936507936507937 - q * 0.0005952380952380953))
    )


@triton.jit
def _inverse_sum_to_4(x):
    """``1/x + 1/(x + 1) + 1/(x + 2) + 1/(x + 3)``."""
    return 1.0 / x + 1.0 / (x + 1.0) + 1.0 / (x + 2.0) + 1.0 / (x + 3.0)


@triton.jit
def lgamma(x):
    """Logarithm of the gamma function for x > 0."""
    large, moved = _shift(x)
    value = large * (tl.log(large) - 1.0) - 0.5 * tl.log(large) + LN_2PI_HALF + _lgamma_tail(1.0 / large)
    small = tl.minimum(x, 4.0)
    return tl.where(moved, value - tl.log(small * (small + 1.0) * (small + 2.0) * (small + 3.0)), value)


@triton.jit
def digamma(x):
    """``psi(x)`` for x > 0."""
    large, moved = _shift(x)
    value = tl.log(large) - _digamma_tail(1.0 / large)
    return tl.where(moved, value - _inverse_sum_to_4(tl.minimum(x, 4.0)), value)


@triton.jit
def trigamma(x):
    """``psi'(x)`` for x > 0."""
    large, moved = _shift(x)
    inverse = 1.0 / large
    q = inverse * inverse
    series = 0.16666666666666666 - q * (
        0.03333333333333333 - q * (0.023809523809523808 - q * (0.03333333333333333 - q * 0.07575757575757576))
    )
    value = inverse * (1.0 + inverse * (0.5 + inverse * series))
    small = tl.minimum(x, 4.0)
    for i in tl.static_range(4):
        value += tl.where(moved, (1.0 / (small + i)) * (1.0 / (small + i)), 0.0)
    return value


@triton.jit
def digamma_of_log(t):
    """``psi(exp(t))``: at any t that exp would overflow, ``t - exp(-t) / 2`` and what follows."""
    near = digamma(tl.exp(tl.minimum(t, LN_4)))
    far = tl.maximum(t, LN_4)
    return tl.where(t < LN_4, near, far - _digamma_tail(tl.exp(-far)))
