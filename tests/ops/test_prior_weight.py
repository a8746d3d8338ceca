"""Any prior weight with any evidence, both from 1e-30 to 1e30: float32 against the plain formulas in float64.

What float32 cannot hold is 0 or the largest number; what it can hold is right to the rounding of its logarithms.
"""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cdc_ops import (
    BackendUnavailableError,
    Opinion,
    conflict,
    dirichlet_cross_entropy,
    discount,
    evidential_cross_entropy,
    fuse_evidence,
    fused_opinion,
)

f64 = torch.float64
LARGEST = torch.finfo(torch.float32).max * (1 - 1e-4)  # where evidence saturates: special.largest_log leaves room
laws = settings(max_examples=150, deadline=None)
powers = st.floats(-30, 30)


@st.composite
def cases(draw):
    """Evidence [M, K], some of it 0, and a prior weight; every number of its own magnitude."""
    M, K = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    drawn = draw(st.lists(st.none() | powers, min_size=M * K, max_size=M * K))
    e = torch.tensor([0.0 if p is None else 10.0**p for p in drawn]).reshape(M, K)
    return e, 10.0 ** draw(powers)


def close(got, exact):
    """To 1e-4 of the number, or below what float32 holds with all its digits; saturated where float32 ends."""
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got.double(), exact.clamp(max=LARGEST), rtol=1e-4, atol=1e-37)


def plain(e, W):
    """Belief and uncertainty in linear space."""
    S = e.sum(-1) + W
    return e / S.unsqueeze(-1), W / S


def plain_fusion(e, rule, W):
    if rule == "dempster":
        # prod (1 + x) - 1 without its cancellation
        total = torch.zeros_like(e[0])
        for x in e / W:
            total = total + x + total * x
        return W * total
    confidence = e.sum(-1) / (e.sum(-1) + W)
    weight = {"cumulative": 1.0, "averaging": 1 / len(e), "weighted": confidence / confidence.sum().clamp_min(1e-300)}
    return (e.T * weight[rule]).sum(-1)


@laws
@given(cases())
def test_opinion(case):
    e, W = case
    opinion = Opinion.from_evidence(e, W)
    belief, u = plain(e.double(), W)
    close(opinion.belief, belief)
    close(opinion.uncertainty, u)
    # a belief that float32 holds with all its digits gives its evidence back, however small u
    held = belief > 1e-37
    close(opinion.evidence[held], e.double()[held])
    close(opinion.alpha[held], (e.double() + W / e.shape[-1])[held])
    for measure in (opinion.entropy(), opinion.mutual_information(), opinion.dissonance()):
        assert measure.isfinite().all() and (measure >= -1e-6).all()


@laws
@given(cases(), st.sampled_from(["dempster", "cumulative", "averaging", "weighted"]))
@example((torch.tensor([[1e28], [0.0], [1e12]]), 10.0), "dempster")  # saturates
def test_fusion(case, rule):
    e, W = case
    exact = plain_fusion(e.double(), rule, W)
    got = fuse_evidence(e, 0, rule, W)
    if rule == "dempster":  # e / W below float32's range counts as no evidence
        torch.testing.assert_close(got.double(), exact.clamp(max=LARGEST), rtol=1e-4, atol=len(e) * W * 2e-38)
    else:
        close(got, exact)


@settings(max_examples=40, deadline=None)
@given(cases(), st.floats(-6, 30), st.sampled_from(["dempster", "cumulative", "averaging", "weighted"]))
def test_fusion_by_the_kernel(case, power, rule):
    """Which sums logarithms, for every rule, and refuses the prior weights that it has no numbers for."""
    e, W = case[0], 10.0**power
    with pytest.raises(BackendUnavailableError, match=r"prior_weight of at least 2\^-20.*got 1e-07"):
        fuse_evidence(e, 0, rule, 1e-7, backend="triton")
    exact = plain_fusion(e.double(), rule, W)
    got = fuse_evidence(e, 0, rule, W, backend="triton")
    most = LARGEST * min(W, 1.0)  # where the kernel saturates
    torch.testing.assert_close(
        got.double().clamp(max=0.99 * most), exact.clamp(max=0.99 * most), rtol=1e-4, atol=len(e) * W * 2e-38
    )


@laws
@given(cases(), st.sampled_from([0.0, 1e-6, 0.3, 1 - 2**-20, 1.0]))
def test_discount(case, r):
    e, W = case
    belief, u = plain(e.double(), W)
    r = float(torch.tensor(r))  # as float32 has it
    close(discount(e, r, W), W * r * belief / (1 - r + r * u).unsqueeze(-1))


@laws
@given(cases())
def test_conflict(case):
    e, W = case
    _, separate = plain(e.double(), W)
    _, fused = plain(plain_fusion(e.double(), "dempster", W), W)
    exact = -torch.expm1(separate.log().sum() - fused.log())
    torch.testing.assert_close(conflict(e, 0, W).double(), exact, rtol=1e-4, atol=1e-4)


@laws
@given(cases(), st.sampled_from(["digamma", "log", "mse"]))
def test_loss(case, form):
    e, W = case
    y = torch.zeros(len(e), dtype=torch.long)
    loss = dirichlet_cross_entropy(e, y, form=form, prior_weight=W)
    exact = dirichlet_cross_entropy(e.double(), y, form=form, prior_weight=W)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=1e-6)


RULES = ["dempster", "cumulative", "averaging", "weighted"]
EVERY = itertools.product(
    ["reference", "blocked"], RULES, ["exp", "softplus", "relu"], [1e-30, 1e-10, 1.0, 1e10, 1e30], [1.0, 100.0, 1e30]
)
BY_KERNEL = [
    *itertools.product(["triton"], ["dempster"], ["softplus", "relu"], [1e-6, 1e30], [1.0, 1e30]),
    *itertools.product(["triton"], ["dempster"], ["exp"], [1e-30, 1e30], [1.0, 1e30]),
]


@pytest.mark.parametrize("backend, rule, activation, W, size", [*EVERY, *BY_KERNEL])
def test_fused_operations(backend, rule, activation, W, size):
    torch.manual_seed(0)
    image, text = torch.randn(3, 8), torch.randn(2, 5, 8)
    y = torch.arange(3)

    def run(dtype, backend):
        x, t = image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()
        kwargs = {"scale": size, "activation": activation, "rule": rule, "prior_weight": W, "backend": backend}
        opinion = fused_opinion(x, t, **kwargs)
        loss = evidential_cross_entropy(x, t, y, form="log", **kwargs)
        return opinion.log_ratio, opinion.prompt_uncertainty, loss, *torch.autograd.grad(loss, (x, t))

    got, exact = run(torch.float32, backend), run(f64, "reference")
    for a, b in zip(got, exact, strict=True):
        assert a.isfinite().all() and b.isfinite().all()
    for a, b in zip(got[:3], exact[:3], strict=True):
        # logits of exp evidence are of the size of the scale, and rounded so
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 if size < 1e9 else 1e-6 * size)


def test_kernels_refuse_a_prior_weight_that_they_have_no_numbers_for():
    image, text = torch.randn(3, 8), torch.randn(2, 5, 8)
    for activation in ("softplus", "relu"):
        with pytest.raises(BackendUnavailableError, match=r"prior_weight of at least 2\^-20.*got 1e-07"):
            fused_opinion(image, text, scale=1.0, activation=activation, prior_weight=1e-7, backend="triton")


def test_the_case_that_was_found():
    opinion = Opinion.from_evidence(torch.tensor([1e30, 0.0]), 1e-10)
    assert opinion.belief.tolist() == [1.0, 0.0]
    assert math.isclose(float(opinion.uncertainty), 1e-40, rel_tol=1e-3)
    assert math.isclose(float(opinion.evidence[0]), 1e30, rel_tol=1e-4)


@pytest.mark.parametrize("M", [3, 8])
@pytest.mark.parametrize("rule", ["cumulative", "averaging", "dempster"])
def test_evidence_just_below_what_a_float_holds(M, rule):
    top = math.log(torch.finfo(torch.float32).max) - math.log(2) - 1.01  # of one prompt
    image, text = torch.ones(1, 1), torch.full((M, 2, 1), top)
    options = {"scale": 1.0, "rule": rule, "prior_weight": 1.0, "normalize": False}
    got = fused_opinion(image, text, backend="blocked", **options).log_ratio.double()
    exact = fused_opinion(image.double(), text.double(), backend="reference", **options).log_ratio
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=0)
