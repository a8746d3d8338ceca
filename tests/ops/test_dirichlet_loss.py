"""The evidential loss against the textbook formula, scipy, and torch.distributions.Dirichlet."""

import functools
import itertools

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Dirichlet, kl_divergence

from cdc_ops import dirichlet_cross_entropy
from cdc_ops.dirichlet import dirichlet_loss
from cdc_ops.special import (
    digamma_excess,
    digamma_gap,
    digamma_gap_and_slopes,
    kl_element,
    kl_slope,
    kl_total,
    log_alpha_ratio,
    log_row_sum,
)

FORMS = ["digamma", "log", "mse"]
f64 = torch.float64


def textbook(e, y, form, kl_weight=0.0, W=None):
    """The loss as the papers write it, in linear space."""
    K = e.shape[-1]
    alpha = e + (1.0 if W is None else W / K)
    S = alpha.sum(-1)
    alpha_y = alpha.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    one_hot = F.one_hot(y, K)
    if form == "digamma":
        loss = torch.digamma(S) - torch.digamma(alpha_y)
    elif form == "log":
        loss = S.log() - alpha_y.log()
    else:
        p = alpha / S.unsqueeze(-1)
        loss = ((one_hot - p) ** 2 + p * (1 - p) / (S + 1).unsqueeze(-1)).sum(-1)
    if kl_weight:
        rest = one_hot + (1 - one_hot) * alpha
        loss = loss + kl_weight * kl_divergence(Dirichlet(rest), Dirichlet(torch.ones_like(rest)))
    return loss


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 8),
    st.sampled_from(FORMS),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([None, 0.4, 5.0]),
    st.sampled_from([0.0, 0.01, 1.0, 20.0, 300.0]),
)
def test_value_and_gradient_are_the_textbooks(seed, K, form, kl_weight, W, size):
    generator = torch.Generator().manual_seed(seed)
    e = (size * torch.rand(4, K, generator=generator, dtype=f64)).requires_grad_()
    y = torch.randint(K, (4,), generator=generator)
    kwargs = {"form": form, "kl_weight": kl_weight, "prior_weight": W, "reduction": "none"}
    ours, theirs = dirichlet_cross_entropy(e, y, **kwargs), textbook(e, y, form, kl_weight, W)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    (g,) = torch.autograd.grad(ours.sum(), e)
    (expected,) = torch.autograd.grad(theirs.sum(), e)
    torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
@pytest.mark.parametrize("K", [1, 5])
def test_gradcheck(form, kl_weight, K):
    torch.manual_seed(0)
    e = (3 * torch.rand(3, K, dtype=f64) + 0.1).requires_grad_()
    y = torch.randint(K, (3,))
    kwargs = {"form": form, "kl_weight": kl_weight, "reduction": "none", "prior_weight": 2.5}
    assert torch.autograd.gradcheck(lambda e: dirichlet_cross_entropy(e, y, **kwargs), e)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
@pytest.mark.parametrize("miss", [1e-3, 1e-6])
@pytest.mark.parametrize("K", [2, 1000])
def test_confident_target_keeps_its_precision_in_float32(form, kl_weight, miss, K):
    """p = 0.999 and 0.999999: the textbook formula in float32 has no correct digit left; ours keeps six."""
    e64 = torch.zeros(1, K, dtype=f64)
    e64[0, 0] = (K - 1) / miss
    y = torch.tensor([0])
    e64.requires_grad_()
    truth = textbook(e64, y, form, kl_weight)
    (g_truth,) = torch.autograd.grad(truth.sum(), e64)
    e = e64.detach().float().requires_grad_()
    ours = dirichlet_cross_entropy(e, y, form=form, kl_weight=kl_weight, reduction="none")
    (g,) = torch.autograd.grad(ours.sum(), e)
    # with all evidence on the target the KL is 0 in truth, and float32 leaves 1e-7 K of it (documented)
    torch.testing.assert_close(ours.double(), truth, rtol=3e-6, atol=1e-6 * K * kl_weight)
    torch.testing.assert_close(g[:, 0].double(), g_truth[:, 0], rtol=3e-6, atol=0.0)
    torch.testing.assert_close(g[:, 1:].double(), g_truth[:, 1:], rtol=3e-6, atol=2e-6 * kl_weight)


def test_textbook_does_lose_it():
    """The test above can fail: the textbook in float32 does."""
    e = torch.zeros(1, 2)
    e[0, 0] = 1e6
    truth = textbook(e.double(), torch.tensor([0]), "digamma")
    assert abs(textbook(e, torch.tensor([0]), "digamma") / truth - 1) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 2, 300])
def test_finite_at_the_extremes(dtype, form, K):
    """No evidence, evidence e^400 on the target, beside it, everywhere; with the KL, values and gradients."""
    rows = [torch.zeros(K), torch.full((K,), 400.0), 400 * torch.eye(1, K)[0], 400 * torch.eye(K)[K - 1]]
    log_ratio = torch.stack(rows).to(dtype).requires_grad_()
    for y, W in itertools.product((0, K - 1), (1e-3, 1.0, float(K))):
        loss = dirichlet_loss(log_ratio, torch.full((4,), y), W, form, 1.0)
        (g,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert loss.isfinite().all() and g.isfinite().all()
        assert (loss > -1e-4 * K).all()


def test_reductions_and_empty_batches():
    e, y = torch.rand(3, 4, 5), torch.randint(5, (3, 4))
    none = dirichlet_cross_entropy(e, y, reduction="none")
    assert none.shape == (3, 4)
    torch.testing.assert_close(dirichlet_cross_entropy(e, y), none.mean())
    torch.testing.assert_close(dirichlet_cross_entropy(e, y, reduction="sum"), none.sum())
    assert dirichlet_cross_entropy(e[:0], y[:0], reduction="sum") == 0
    with pytest.raises(ValueError, match="reduction"):
        dirichlet_cross_entropy(e[:0], y[:0])


# Special functions, against scipy in float64


def test_digamma_gap_against_scipy():
    a, r = np.meshgrid(np.logspace(-8, 6, 60), np.logspace(-2, 8, 60))
    ours = digamma_gap(torch.from_numpy(np.log(a)), torch.from_numpy(np.log(r))).numpy()
    psi = scipy.special.digamma
    tolerance = 1e-13 * (1 + (np.abs(psi(a + r)) + np.abs(psi(a))) / np.abs(psi(a + r) - psi(a)))
    assert (np.abs(ours / (psi(a + r) - psi(a)) - 1) < 3 * tolerance).all()


def test_digamma_gap_of_a_tiny_rest_is_its_derivative():
    """psi(a + r) - psi(a) -> r psi'(a): a relative error of 1e-12 where the plain difference keeps nothing."""
    a = torch.logspace(-3, 20, 50, dtype=f64)
    r = 1e-14 * a
    expected = r.numpy() * scipy.special.polygamma(1, a.numpy())
    np.testing.assert_allclose(digamma_gap(a.log(), r.log()).numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("dtype", [f64, torch.float32])
def test_digamma_gap_and_its_slopes_against_scipy(dtype):
    a, r = np.meshgrid(np.logspace(-8, 6, 60), np.logspace(-8, 8, 60))
    logs = [torch.from_numpy(np.log(x)).to(dtype) for x in (a, r)]
    a, r = (x.double().exp().numpy() for x in logs)
    psi, trigamma = scipy.special.digamma, functools.partial(scipy.special.polygamma, 1)
    rounding = 4e-6 if dtype == torch.float32 else 1e-12  # of logarithms up to 20, which become numbers
    value, slope_a, slope_r = (x.double().numpy() for x in digamma_gap_and_slopes(*logs))
    for ours, more, less in (
        (value, psi(a + r), psi(a)),
        (slope_a, a * trigamma(a + r), a * trigamma(a)),
        (slope_r, r * trigamma(a + r), 0 * a),
    ):
        exact = more - less
        # the exact difference is itself known but for the rounding of its terms
        assert (np.abs(ours - exact) < rounding * np.abs(exact) + 1e-14 * (np.abs(more) + np.abs(less))).all()


def test_digamma_gap_s_slopes_are_autograd_s_whatever_the_size():
    torch.manual_seed(0)
    log_a, log_rest = (160 * torch.rand(2, 10_000, dtype=f64) - 60).requires_grad_().unbind()
    gap = digamma_gap(log_a, log_rest)
    expected = gap, *torch.autograd.grad(gap.sum(), (log_a, log_rest))
    near = log_rest - log_a < 15  # beyond, nothing is left of the 1 - sigmoid(x) that autograd takes
    for ours, theirs in zip(digamma_gap_and_slopes(log_a, log_rest), expected, strict=True):
        torch.testing.assert_close(ours[near], theirs[near], rtol=1e-8, atol=0)


def test_kl_parts_against_scipy():
    a = np.logspace(-4, 5, 400)
    t = torch.from_numpy(np.log(a)).requires_grad_()
    psi, lgamma = scipy.special.digamma, scipy.special.gammaln
    exact = (a - 1) * psi(a) - lgamma(a) - a + 1
    size = np.abs((a - 1) * psi(a)) + np.abs(lgamma(a)) + a + 1
    ours = kl_element(t)
    assert (np.abs(ours.detach().numpy() - exact) < 1e-13 * size).all()
    slope = a * ((a - 1) * scipy.special.polygamma(1, a) - 1)
    np.testing.assert_allclose(kl_slope(t).detach().numpy(), slope, rtol=1e-9, atol=1e-9)
    (g,) = torch.autograd.grad(ours.sum(), t)
    np.testing.assert_allclose(g.numpy(), slope, rtol=1e-9, atol=1e-9)
    for K in (1, 2, 500):
        exact = lgamma(a) - (a - K) * psi(a) + a - lgamma(K) - K
        size = np.abs(lgamma(a)) + np.abs((a - K) * psi(a)) + a + abs(lgamma(K)) + K
        assert (np.abs(kl_total(t, K).detach().numpy() - exact) < 1e-13 * size).all()


def test_series_join_smoothly():
    """Both sides of the switch agree: the series is exact where it takes over."""
    for step in (-1e-9, 1e-9):
        x = 16.0 * (1 + step)
        t = torch.tensor(np.log(x), dtype=f64)
        psi, lgamma = scipy.special.digamma, scipy.special.gammaln
        assert abs(float(kl_element(t)) - ((x - 1) * psi(x) - lgamma(x) - x + 1)) < 1e-13
        assert abs(float(digamma_excess(1 / t.exp())) - (psi(x + 1) - np.log(x))) < 1e-14


def test_log_row_sum_and_log_alpha():
    for size in (0.0, 1e-12, 1.0, 29.0, 31.0, 500.0):
        log_ratio = size * torch.rand(5, 7, dtype=f64)
        exact = torch.tensor(
            [float(np.log(1 + np.expm1(row.numpy().astype(np.longdouble)).sum())) for row in log_ratio],
            dtype=f64,
        )
        torch.testing.assert_close(log_row_sum(log_ratio), exact, rtol=1e-13, atol=1e-15)
        exact = torch.from_numpy(
            np.log(np.expm1(log_ratio.numpy().astype(np.longdouble)) + np.longdouble(1) / 7).astype(float)
        )
        torch.testing.assert_close(log_alpha_ratio(log_ratio, 7), exact, rtol=1e-12, atol=1e-14)
