"""Front-door adjustment against causal models solved by enumeration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_ops import FrontDoorAggregator, frontdoor_adjust


def draw_model(seed, U, X, S, Y, sharpness):
    """A discrete model u -> x -> s -> y <- u with hidden u: its four tables, float64."""
    generator = torch.Generator().manual_seed(seed)

    def table(*shape):
        return (sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)

    return table(U), table(U, X), table(X, S), table(S, U, Y)


def solve(p_u, p_x_u, p_s_x, p_y_su):
    """Enumerate: the truth P(y | do(x)), what can be observed, and plain conditioning P(y | x)."""
    truth = torch.einsum("u,xs,suy->xy", p_u, p_s_x, p_y_su)
    p_ux = p_u[:, None] * p_x_u
    p_x = p_ux.sum(0)
    p_y_sx = torch.einsum("ux,suy->xsy", p_ux / p_x, p_y_su)
    naive = torch.einsum("xs,xsy->xy", p_s_x, p_y_sx)
    return truth, p_x, p_y_sx, naive


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(2, 4),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(2, 4),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_gives_the_interventional_distribution(seed, U, X, S, Y, sharpness):
    model = draw_model(seed, U, X, S, Y, sharpness)
    truth, p_x, p_y_sx, _ = solve(*model)
    torch.testing.assert_close(frontdoor_adjust(model[2], p_y_sx, p_x), truth, rtol=1e-9, atol=1e-12)


def test_plain_conditioning_does_not():
    gaps, errors = [], []
    for seed in range(50):
        model = draw_model(seed, 3, 3, 3, 3, 3.0)
        truth, p_x, p_y_sx, naive = solve(*model)
        gaps.append((naive - truth).abs().max())
        errors.append((frontdoor_adjust(model[2], p_y_sx, p_x) - truth).abs().max())
    assert torch.stack(gaps).median() > 0.1
    assert torch.stack(errors).max() < 1e-12


def test_weights_are_scaled_and_default_to_uniform():
    p_s, p_y = torch.rand(4, 3).softmax(-1), torch.rand(5, 3, 6).softmax(-1)
    uniform = frontdoor_adjust(p_s, p_y)
    torch.testing.assert_close(frontdoor_adjust(p_s, p_y, torch.full((5,), 7.0)), uniform)
    torch.testing.assert_close(uniform.sum(-1), torch.ones(4))


def test_gradients():
    p_s = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    p_y = torch.rand(4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frontdoor_adjust, (p_s, p_y, weight))


def test_aggregator_marginals():
    p_s, p_y = torch.rand(4, 3).softmax(-1), torch.rand(4, 3, 5).softmax(-1)
    torch.testing.assert_close(FrontDoorAggregator("batch")(p_s, p_y), frontdoor_adjust(p_s, p_y))
    own = torch.stack([p_s[b] @ p_y[b] for b in range(4)])
    torch.testing.assert_close(FrontDoorAggregator("self")(p_s, p_y), own)
    bank = FrontDoorAggregator("bank", bank_size=6, semantics=3, classes=5)
    bank.update(p_y)
    torch.testing.assert_close(bank(p_s), frontdoor_adjust(p_s, p_y))


def test_bank_keeps_the_newest_and_is_saved():
    bank = FrontDoorAggregator("bank", bank_size=3, semantics=1, classes=1)
    for value in range(5):
        bank.update(torch.full((1, 1, 1), float(value)))
    assert sorted(bank.memory.flatten().tolist()) == [2.0, 3.0, 4.0]
    bank.update(torch.arange(10.0).reshape(10, 1, 1))
    assert sorted(bank.memory.flatten().tolist()) == [7.0, 8.0, 9.0]
    other = FrontDoorAggregator("bank", bank_size=3, semantics=1, classes=1)
    other.load_state_dict(bank.state_dict())
    torch.testing.assert_close(other(torch.ones(1, 1)), bank(torch.ones(1, 1)))


@pytest.mark.parametrize("marginal", ["batch", "self"])
def test_empty_batch_for_the_asked(marginal):
    p_y = torch.rand(2, 3, 4).softmax(-1)
    if marginal == "batch":
        assert frontdoor_adjust(torch.ones(0, 3), p_y).shape == (0, 4)
    else:
        assert FrontDoorAggregator("self")(torch.ones(0, 3), p_y[:0]).shape == (0, 4)
