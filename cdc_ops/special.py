"""Special functions in log space: what keeps evidence of 10^60 and evidence of 0 finite in float32.

Two quantities recur in every formula of evidential learning and overflow when taken literally:

- row sums of evidence, ``ln(c + sum_k expm1(l_k))`` with ``l = ln(1 + e / W)`` (:func:`log_row_sum`);
- digamma and log-gamma of Dirichlet parameters known by their logarithm ``t = ln alpha``
  (:func:`digamma_gap`, :func:`kl_element`, :func:`kl_total`, :func:`digamma_excess`).

Everything here is elementwise or a row sum, differentiable, works in any float dtype, and has no
data-dependent control flow, so ``torch.compile(fullgraph=True)`` and fake tensors are fine with it.
"""

import functools
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

#: Row sums are shifted only when their largest log ratio exceeds this: below, expm1 is exact and overflow
#: far away (e^60 after squaring, times any number of classes); above, the shifted terms lose nothing visible.
SHIFT = 30.0
#: From here on the asymptotic series below are exact to float64 rounding.
SERIES_FROM = 16.0
#: Bernoulli numbers B_2, B_4, ... B_14.
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)


@functools.cache
def map_constants(process: int) -> None:
    """Let a CPU with AVX-512 take ``log1p``, ``expm1`` and ``softplus`` at their own speed; once in a process.

    The last step of PyTorch's ``log1p`` loads the constant -0.0 for those of 16 numbers that are -0.0, usually none. As
    long as nobody has read the page of memory that holds it, a load for none takes the CPU hundreds of cycles, only to
    find that it need not fault: the page stays unread, and ``log1p`` takes ten times its time. One logarithm of -0.0
    reads the page. Measured by ``benches/log1p_page.py``.
    """
    zero = torch.full((64,), -0.0, dtype=torch.float32, device="cpu")
    torch.log1p(zero)
    torch.expm1(zero)


map_constants(os.getpid())


def softplus(x: Tensor) -> Tensor:
    """``ln(1 + exp(x))``, exact in float64 as well (PyTorch's default threshold of 20 is not)."""
    return F.softplus(x, threshold=50.0)


def shift_of(log_ratio: Tensor, dim: int = -1) -> Tensor:
    """The shift, kept-dim and without gradient, after which the row sums over ``dim`` cannot overflow."""
    return (log_ratio.detach().amax(dim, keepdim=True) - SHIFT).clamp_min(0)


def log_row_sum(log_ratio: Tensor, dim: int = -1, constant: float = 1.0, weight: Tensor | float = 1.0) -> Tensor:
    """``ln(constant + sum_j weight_j expm1(l_j))`` over ``dim``, without overflow or cancellation.

    With ``l = ln(1 + e / W)`` and constant 1 this is the log partition ``ln(S / W) = -ln u`` of an opinion.
    """
    shift = shift_of(log_ratio, dim)
    terms = torch.expm1(log_ratio - shift) - torch.expm1(-shift)
    total = (terms * weight).sum(dim)
    shift = shift.squeeze(dim)
    return shift + torch.log1p(total + (constant * torch.exp(-shift) - 1))


def log_alpha_ratio(log_ratio: Tensor, classes: int) -> Tensor:
    """``ln(alpha_k / W)`` from ``l_k = ln(1 + e_k / W)``, where ``alpha_k = e_k + W / K``."""
    return log_ratio + torch.log(torch.exp(-log_ratio) / classes - torch.expm1(-log_ratio))


def digamma_gap(log_a: Tensor, log_rest: Tensor) -> Tensor:
    """``psi(a + r) - psi(a)`` for ``a = exp(log_a)``, ``r = exp(log_rest)``: a sum of positive terms.

    The evidential cross-entropy ``psi(S) - psi(alpha_y)`` of a confident model is a difference of nearly
    equal numbers. Shifting both arguments by 8 (``psi(x) = psi(x + 1) - 1/x``) and writing the
    asymptotic series through ``r / (a + r + i) = sigmoid(ln r - ln(a + i))`` leaves no subtraction
    of close numbers, for any a from 1e-30 to 1e300 and any r, and no overflow.
    """
    log_a, log_rest = log_a.unsqueeze(-1), log_rest.unsqueeze(-1)
    shifts = torch.tensor([math.log(i) if i else -math.inf for i in range(8)], dtype=log_a.dtype, device=log_a.device)
    log_ai = torch.logaddexp(log_a, shifts)  # ln(a + i)
    gap = (torch.exp(-log_ai) * torch.sigmoid(log_rest - log_ai)).sum(-1)
    log_an = torch.logaddexp(log_a, torch.full_like(shifts[:1], math.log(8)))
    log_gap = softplus(log_rest - log_an)  # ln((a + r + 8) / (a + 8))
    # the series' terms c x^-p at x = a + 8 and at a + r + 8 differ by c (a + 8)^-p (1 - exp(-p log_gap))
    powers, factor = digamma_series(log_a)
    series = factor * torch.exp(-powers * log_an) * torch.expm1(-powers * log_gap)
    return gap + log_gap.squeeze(-1) - series.sum(-1)


def digamma_gap_and_slopes(log_a: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`digamma_gap` and its derivatives by ``ln a`` and ``ln r``, in half the calls that autograd takes."""
    log_a, log_rest = log_a.unsqueeze(-1), log_rest.unsqueeze(-1)
    shifts = torch.tensor([math.log(i) if i else -math.inf for i in range(9)], dtype=log_a.dtype, device=log_a.device)
    powers, factor = digamma_series(log_a)
    log_ai = torch.logaddexp(log_a, shifts)  # ln(a + i), i = 0 to 8
    apart = log_rest - log_ai
    ratio, other = torch.sigmoid(apart), torch.sigmoid(-apart)  # r / (a + r + i) and (a + i) / (a + r + i)
    by_log_a = torch.exp(log_a - log_ai)  # of ln(a + i)
    terms = torch.exp(-log_ai[..., :8]) * ratio[..., :8]
    by_terms = terms * other[..., :8]  # by ln r; by ln(a + i) less these and the terms themselves
    log_an, ratio_n, by_log_an = log_ai[..., 8:], ratio[..., 8:], by_log_a[..., 8:]
    log_gap = softplus(apart[..., 8:])
    power = factor * torch.exp(-powers * log_an)
    series = power * torch.expm1(-powers * log_gap)
    # of log_gap less the series, by ln r
    by_last = ratio_n * (1 + (powers * (power + series)).sum(-1, keepdim=True))
    value = terms.sum(-1) + (log_gap - series.sum(-1, keepdim=True)).squeeze(-1)
    slope_a = by_log_an * ((powers * series).sum(-1, keepdim=True) - by_last)
    slope_a = slope_a.squeeze(-1) - ((terms + by_terms) * by_log_a[..., :8]).sum(-1)
    return value, slope_a, by_terms.sum(-1) + by_last.squeeze(-1)


def digamma_series(like: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents p and factors c of ``psi(x) = ln x - sum c x^-p``, the asymptotic series."""
    powers = torch.tensor([1.0] + [2.0 * n for n in range(1, 8)], dtype=like.dtype, device=like.device)
    factors = [0.5] + [bernoulli / (2 * n) for n, bernoulli in enumerate(BERNOULLI, start=1)]
    return powers, torch.tensor(factors, dtype=like.dtype, device=like.device)


def kl_element(log_a: Tensor) -> Tensor:
    """``(a - 1) psi(a) - lnG(a) - a + 1`` from ``ln a``: one class's share of KL(Dir(a) || Dir(1)).

    The linear growth of the textbook terms is taken out here and in :func:`kl_total`, where it cancels
    exactly: what remains grows like ``-ln(a) / 2``, so the KL of any opinion, however certain, is finite.
    """
    small = torch.exp(log_a.clamp(max=math.log(SERIES_FROM)))
    near = (small - 1) * torch.digamma(small) - torch.lgamma(small) - small + 1
    inverse = torch.exp(-log_a.clamp(min=math.log(SERIES_FROM)))
    odd = even = torch.zeros_like(inverse)
    for n in reversed(range(1, len(BERNOULLI) + 1)):
        odd = odd * inverse * inverse - BERNOULLI[n - 1] / (2 * n - 1)
        even = even * inverse * inverse + BERNOULLI[n - 1] / (2 * n)
    far = 0.5 * (1 - math.log(2 * math.pi)) - 0.5 * log_a + inverse * (0.5 + odd + inverse * even)
    return torch.where(log_a < math.log(SERIES_FROM), near, far)


def kl_slope(log_a: Tensor) -> Tensor:
    """Derivative of :func:`kl_element` by ``ln a``: ``a ((a - 1) psi'(a) - 1)``, which tends to -1/2."""
    small = torch.exp(log_a.clamp(max=math.log(SERIES_FROM)))
    near = small * ((small - 1) * torch.polygamma(1, small) - 1)
    inverse = torch.exp(-log_a.clamp(min=math.log(SERIES_FROM)))
    odd = even = torch.zeros_like(inverse)
    for n in reversed(range(1, len(BERNOULLI) + 1)):
        odd = odd * inverse * inverse + BERNOULLI[n - 1]
        even = even * inverse * inverse - BERNOULLI[n - 1]
    far = -0.5 + inverse * (-0.5 + odd + inverse * even)
    return torch.where(log_a < math.log(SERIES_FROM), near, far)


def kl_total(log_total: Tensor, classes: int) -> Tensor:
    """``lnG(S) - (S - K) psi(S) + S - (lnG(K) + K)`` from ``ln S``: the row's share of KL(Dir(a) || Dir(1))."""
    small = torch.exp(log_total.clamp(max=math.log(SERIES_FROM)))
    near = torch.lgamma(small) - (small - classes) * torch.digamma(small) + small
    inverse = torch.exp(-log_total.clamp(min=math.log(SERIES_FROM)))
    odd = even = torch.zeros_like(inverse)
    for n in reversed(range(1, len(BERNOULLI) + 1)):
        odd = odd * inverse * inverse + BERNOULLI[n - 1] / (2 * n - 1)
        even = even * inverse * inverse + BERNOULLI[n - 1] / (2 * n)
    far = (classes - 0.5) * log_total + 0.5 * (math.log(2 * math.pi) + 1)
    far = far + inverse * (odd - classes * (0.5 + inverse * even))
    constant = math.lgamma(classes) + classes
    return torch.where(log_total < math.log(SERIES_FROM), near, far) - constant


def digamma_excess(inverse: Tensor) -> Tensor:
    """``psi(x + 1) - ln(x) > 0`` from ``1 / x``; it tends to ``1 / (2 x)``: no cancellation for large x."""
    small = 1 / inverse.clamp(min=1 / SERIES_FROM)
    near = torch.digamma(small + 1) - torch.log(small)
    inverse = inverse.clamp(max=1 / SERIES_FROM)
    series = torch.zeros_like(inverse)
    for n in reversed(range(1, len(BERNOULLI) + 1)):
        series = series * inverse * inverse + BERNOULLI[n - 1] / (2 * n)
    return torch.where(inverse < 1 / SERIES_FROM, inverse * (0.5 - inverse * series), near)


def largest_log(dtype: torch.dtype) -> float:
    """The largest logarithm whose ``exp`` is finite, with room for its rounding."""
    return math.log(torch.finfo(dtype).max) - 1e-4
