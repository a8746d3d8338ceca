"""Laws of opinions and their fusion, and agreement with a library of Dempster-Shafer theory nobody here wrote."""

import itertools
import math

import pyds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_ops import Opinion, conflict, discount, fuse_evidence, fuse_log_ratio

RULES = ["dempster", "cumulative", "averaging", "weighted"]
laws = settings(max_examples=40, deadline=None)


@st.composite
def evidences(draw, max_prompts=5, sizes=(0.0, 1e-6, 1.0, 50.0, 1e6)):
    """Evidence [M, K] in float64; every opinion has its own magnitude, some have none."""
    M, K = draw(st.integers(1, max_prompts)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    e = torch.rand(M, K, generator=generator, dtype=torch.float64)
    size = torch.tensor(draw(st.lists(st.sampled_from(sizes), min_size=M, max_size=M)), dtype=torch.float64)
    return e * size[:, None]


prior_weights = st.sampled_from([None, 0.3, 2.0, 40.0])


def close(a, b, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@laws
@given(evidences(sizes=(0.0, 1e-30, 1.0, 1e30)), prior_weights)
def test_masses_sum_to_one(e, W):
    opinion = Opinion.from_evidence(e, W)
    assert (opinion.belief >= 0).all() and (opinion.uncertainty >= 0).all()
    close(opinion.belief.sum(-1) + opinion.uncertainty, torch.ones(len(e), dtype=e.dtype))
    close(opinion.prob.sum(-1), torch.ones(len(e), dtype=e.dtype))
    close(opinion.evidence, e, rtol=1e-9, atol=1e-30)


@laws
@given(evidences(), prior_weights, st.sampled_from(RULES))
def test_order_of_opinions_does_not_matter(e, W, rule):
    fused = fuse_evidence(e, 0, rule, W)
    for order in itertools.islice(itertools.permutations(range(len(e))), 6):
        close(fuse_evidence(e[list(order)], 0, rule, W), fused)


@laws
@given(evidences(max_prompts=4), prior_weights, st.sampled_from(["dempster", "cumulative"]))
def test_fusion_is_associative(e, W, rule):
    W = float(e.shape[-1]) if W is None else W
    one_by_one = e[0]
    for other in e[1:]:
        one_by_one = fuse_evidence(torch.stack([one_by_one, other]), 0, rule, W)
    close(one_by_one, fuse_evidence(e, 0, rule, W))


@laws
@given(evidences(), prior_weights, st.sampled_from(["dempster", "cumulative", "weighted"]))
def test_vacuous_opinion_changes_nothing(e, W, rule):
    with_vacuous = torch.cat([e, torch.zeros_like(e[:1])])
    close(fuse_evidence(with_vacuous, 0, rule, W), fuse_evidence(e, 0, rule, W))


@laws
@given(evidences(), prior_weights, st.sampled_from(RULES))
def test_fusing_one_opinion_returns_it(e, W, rule):
    close(fuse_evidence(e[:1], 0, rule, W), e[0])


@laws
@given(evidences(), prior_weights)
def test_rules_are_their_formulas(e, W):
    K = e.shape[-1]
    weight = K if W is None else W
    confidence = 1 - weight / (e.sum(-1) + weight)
    close(fuse_evidence(e, 0, "dempster", W), weight * ((1 + e / weight).prod(0) - 1), rtol=1e-8, atol=1e-9)
    close(fuse_evidence(e, 0, "cumulative", W), e.sum(0))
    close(fuse_evidence(e, 0, "averaging", W), e.mean(0))
    expected = (e * confidence[:, None]).sum(0) / confidence.sum().clamp_min(1e-300)
    close(fuse_evidence(e, 0, "weighted", W), expected, rtol=1e-8, atol=1e-9)


@laws
@given(evidences(sizes=(0.0, 1e-6, 1.0, 1e30)), prior_weights)
def test_conflict_lies_between_zero_and_one(e, W):
    value = conflict(e, 0, W)
    assert 0 <= value <= 1
    close(conflict(e[:1], 0, W), torch.zeros((), dtype=e.dtype))
    close(conflict(e, 0, W), conflict(e.flip(0), 0, W))


def test_conflict_of_contradiction_and_of_agreement():
    against = torch.tensor([[1e6, 0.0], [0.0, 1e6]], dtype=torch.float64)
    assert conflict(against, 0) > 0.999
    close(conflict(against[:1].repeat(3, 1), 0), torch.zeros((), dtype=torch.float64))


@laws
@given(evidences(max_prompts=4, sizes=(0.0, 0.1, 1.0, 20.0)), prior_weights)
def test_agrees_with_py_dempster_shafer(e, W):
    M, K = e.shape
    separate = Opinion.from_evidence(e, W)
    masses = [
        pyds.MassFunction(
            [({k}, float(b[k])) for k in range(K)] + [(set(range(K)), float(u))]
            if K > 1
            else [({0}, float(b[0] + u))]  # on a frame of one class, the class is the frame
        )
        for b, u in zip(separate.belief, separate.uncertainty, strict=True)
    ]
    combined = masses[0]
    for other in masses[1:]:
        combined = combined.combine_conjunctive(other, normalization=True)
    ours = Opinion.from_evidence(fuse_evidence(e, 0, prior_weight=W), W)
    if K > 1:
        for k in range(K):
            assert math.isclose(combined[{k}], float(ours.belief[k]), rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(combined[set(range(K))], float(ours.uncertainty), rel_tol=1e-9, abs_tol=1e-12)
    if M > 1:
        weight_of_conflict = masses[0].conflict(masses[1:])
        assert math.isclose(-math.expm1(-weight_of_conflict), float(conflict(e, 0, W)), rel_tol=1e-9, abs_tol=1e-12)


def test_equals_the_pairwise_rule_of_trusted_multi_view_classification():
    """The K x K construction: beliefs multiplied out, conflicting pairs dropped, the rest scaled up."""
    generator = torch.Generator().manual_seed(0)
    e = 20 * torch.rand(5, 3, 7, generator=generator, dtype=torch.float64)
    opinion = Opinion.from_evidence(e)
    b, u = opinion.belief[:, 0], opinion.uncertainty[:, 0]
    for m in (1, 2):
        b2, u2 = opinion.belief[:, m], opinion.uncertainty[:, m]
        pairs = b.unsqueeze(2) * b2.unsqueeze(1)
        agreed = pairs.diagonal(dim1=1, dim2=2)
        scale = 1 / (1 - (pairs.sum((1, 2)) - agreed.sum(1)))
        b = scale[:, None] * (agreed + b * u2[:, None] + b2 * u[:, None])
        u = scale * u * u2
    fused = Opinion.from_evidence(fuse_evidence(e, 1))
    close(fused.belief, b)
    close(fused.uncertainty, u)


@laws
@given(evidences(), prior_weights, st.floats(0, 1))
def test_discount_is_shafers(e, W, r):
    before, after = Opinion.from_evidence(e, W), Opinion.from_evidence(discount(e, r, W), W)
    close(after.belief, r * before.belief)
    close(after.uncertainty, 1 - r + r * before.uncertainty)
    close(discount(e, 1.0, W), e)
    close(discount(e, 0.0, W), torch.zeros_like(e))


def test_discount_takes_one_reliability_per_prompt():
    e = torch.rand(4, 3, 5)
    reliability = torch.tensor([1.0, 0.5, 0.0])
    expected = torch.stack([discount(e[:, m], float(reliability[m])) for m in range(3)], 1)
    close(discount(e, reliability), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_any_dimension_but_the_last_can_be_fused(rule):
    e = torch.rand(2, 3, 4, 5)
    for dim in (0, 1, 2, -2, -3, -4):
        expected = fuse_evidence(e.movedim(dim, 0), 0, rule)
        close(fuse_evidence(e, dim, rule), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_fusion_is_finite_with_finite_gradients_at_the_extremes(rule):
    for size in (0.0, 1e-30, 1e30):
        e = torch.full((3, 4), size, requires_grad=True)
        fused = fuse_evidence(e, 0, rule)
        fused.clamp(max=1.0).sum().backward()
        assert fused.isfinite().all() and e.grad.isfinite().all()
    log_ratio = torch.tensor([[300.0, 0.0], [0.0, 300.0]], requires_grad=True)
    fused = fuse_log_ratio(log_ratio, 0, rule)
    fused.sum().backward()
    assert fused.isfinite().all() and log_ratio.grad.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_fusion_gradients(rule):
    e = (5 * torch.rand(2, 3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: fuse_evidence(e, 1, rule, 2.5), e)
    assert torch.autograd.gradcheck(lambda e: conflict(e, 1), e)
    assert torch.autograd.gradcheck(lambda e: discount(e, 0.7), e)
