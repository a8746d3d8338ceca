"""Uncertainty measures against torch.distributions.Dirichlet, sampling, and the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_ops import Opinion, evidence_from_logits

laws = settings(max_examples=40, deadline=None)


@st.composite
def evidences(draw):
    K = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([0.0, 0.01, 1.0, 30.0, 1e4]))
    return size * torch.rand(3, K, generator=generator, dtype=torch.float64)


@laws
@given(evidences(), st.sampled_from([None, 0.5, 3.0]))
def test_probability_and_entropy_are_those_of_the_dirichlet(e, W):
    opinion = Opinion.from_evidence(e, W)
    K = e.shape[-1]
    alpha = e + (1.0 if W is None else W / K)
    torch.testing.assert_close(opinion.alpha, alpha)
    torch.testing.assert_close(opinion.prob, torch.distributions.Dirichlet(alpha).mean)
    expected = torch.distributions.Categorical(opinion.prob).entropy()
    torch.testing.assert_close(opinion.entropy(), expected)
    S = alpha.sum(-1)
    mean_entropy = torch.digamma(S + 1) - (alpha / S[:, None] * torch.digamma(alpha + 1)).sum(-1)
    torch.testing.assert_close(opinion.expected_entropy(), mean_entropy, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(opinion.mutual_information(), expected - mean_entropy, rtol=1e-6, atol=1e-9)


def test_expected_entropy_is_the_mean_over_samples():
    torch.manual_seed(0)
    opinion = Opinion.from_evidence(torch.tensor([3.0, 1.0, 0.0]))
    sampled = torch.distributions.Dirichlet(opinion.alpha).sample((40_000,))
    entropy = torch.distributions.Categorical(sampled).entropy()
    assert abs(entropy.mean() - opinion.expected_entropy()) < 4 * entropy.std() / 200


@laws
@given(evidences())
def test_dissonance_is_its_definition(e):
    b = Opinion.from_evidence(e).belief
    K = b.shape[-1]
    expected = torch.zeros(len(b), dtype=b.dtype)
    for i, row in enumerate(b):
        for k in range(K):
            others = [j for j in range(K) if j != k]
            weight = sum(float(row[j]) for j in others)
            if weight == 0:
                continue
            balanced = sum(
                float(row[j] * (1 - (row[j] - row[k]).abs() / (row[j] + row[k]))) for j in others if row[j] * row[k] > 0
            )
            expected[i] += float(row[k]) * balanced / weight
    torch.testing.assert_close(Opinion.from_evidence(e).dissonance(), expected)


def test_dissonance_in_pieces_equals_dissonance_at_once(monkeypatch):
    opinion = Opinion.from_evidence(10 * torch.rand(3, 11, dtype=torch.float64))
    whole = opinion.dissonance()
    monkeypatch.setattr("cdc_ops.opinion._PAIR_BLOCK", 3 * 11 * 4)
    torch.testing.assert_close(opinion.dissonance(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e8, 1e30])
@pytest.mark.parametrize("K", [1, 2, 1000])
def test_measures_are_finite_with_finite_gradients(dtype, size, K):
    for e in (torch.full((K,), size), size * torch.eye(1, K)[0]):
        e = e.to(dtype).requires_grad_()
        opinion = Opinion.from_evidence(e)
        for measure in (
            opinion.uncertainty,
            opinion.entropy(),
            opinion.expected_entropy(),
            opinion.mutual_information(),
            opinion.dissonance(),
        ):
            (gradient,) = torch.autograd.grad(measure, e, retain_graph=True)
            assert measure.isfinite() and gradient.isfinite().all()
            assert measure > -1e-6


def test_vacuous_and_certain_opinions():
    vacuous = Opinion.from_evidence(torch.zeros(4, dtype=torch.float64))
    assert vacuous.uncertainty == 1 and vacuous.dissonance() == 0
    torch.testing.assert_close(vacuous.entropy().exp(), torch.tensor(4.0, dtype=torch.float64))
    certain = Opinion.from_evidence(1e30 * torch.eye(1, 4, dtype=torch.float64)[0])
    assert certain.uncertainty < 1e-29 and certain.entropy() < 1e-20 and certain.mutual_information() < 1e-20


def test_mutual_information_of_strong_evidence_does_not_cancel():
    """(K - 1) / (2 S) to leading order: far below the rounding of the entropies it is a difference of."""
    opinion = Opinion.from_evidence(torch.full((3,), 1e12, dtype=torch.float64))
    torch.testing.assert_close(
        opinion.mutual_information(), torch.tensor(2 / (2 * 3e12), dtype=torch.float64), rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("activation", ["exp", "softplus", "relu"])
def test_activations(activation):
    z = torch.linspace(-50, 50, 23, dtype=torch.float64)
    expected = {"exp": z.exp(), "softplus": torch.log1p(z.exp()), "relu": z.clamp(min=0)}[activation]
    torch.testing.assert_close(evidence_from_logits(z, activation), expected)
    extreme = torch.tensor([-1e4, 1e4], requires_grad=True)
    e = evidence_from_logits(extreme, activation)
    assert e.isfinite().all() and (e >= 0).all()
    assert torch.autograd.grad(e.sum(), extreme)[0].isfinite().all()


def test_half_precision_is_computed_in_float32():
    z = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    e = evidence_from_logits(z)
    assert e.dtype == torch.float32
    torch.testing.assert_close(e, z.float().exp())
    assert Opinion.from_evidence(e.half()).belief.dtype == torch.float32


def test_evidence_where_the_strength_leaves_the_dtype():
    opinion = Opinion.from_log_ratio(torch.tensor([[130.0, 60.0], [60.0, 20.0]]))
    largest = torch.finfo(torch.float32).max
    expected = [[largest, 2 * torch.tensor(60.0, dtype=torch.float64).expm1().item()], [2.2840e26, 2 * 485165194.4]]
    torch.testing.assert_close(
        opinion.evidence.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0
    )
