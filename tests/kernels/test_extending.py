"""A new activation, or a new rule, needs one change in one place: a few small functions of the epilogue.

The page that says how is kernels/README.md.
"""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from cdc_kernels import configs, epilogue, fused_opinion, launch  # noqa: E402
from cdc_kernels.special import NOTHING, log1p, log_or_nothing, sigmoid, softplus  # noqa: E402

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels are cached by their source")


@triton.jit
def square_evidence(z, log_w, ACTIVATION: tl.constexpr):
    e = z * z
    return tl.where(e > 0, tl.log(tl.maximum(e, 1e-37)) - log_w, NOTHING), log1p(e * tl.exp(-log_w))


@triton.jit
def square_slope(z, ACTIVATION: tl.constexpr):
    return 2.0 / z


@triton.jit
def strongest_linear(state, v, log_weight, RULE: tl.constexpr):
    return tl.maximum(state, v)


@triton.jit
def strongest_leave(state, RULE: tl.constexpr):
    return log_or_nothing(state)


@triton.jit
def strongest(state, y, l, log_weight, RULE: tl.constexpr):  # noqa: E741
    return tl.maximum(state, y)


@triton.jit
def strongest_fused(state, RULE: tl.constexpr):
    return state, softplus(state)


@triton.jit
def strongest_slope(y, log_weight, L, RULE: tl.constexpr):
    return tl.where(softplus(y) > L * 0.9999, sigmoid(y), 0.0)


def compare(activation, rule, evidence, fuse, scale):
    """Values and gradients of the new formula, written in PyTorch, against the kernels with it, on both paths."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 5, generator=g), torch.randn(2, 7, 5, generator=g)
    leaves = [v.clone().requires_grad_() for v in (x, t, scale)]
    z = torch.einsum("bd,mkd->bmk", leaves[0], leaves[1]) * leaves[2][:, None]
    right = fuse(torch.log1p(evidence(z) / 7))
    gradients = torch.autograd.grad(right.sum(), leaves)
    for path in configs.PATHS:
        with configs.force_path(path):
            i = launch.Inputs(x, t, scale, None, None, None, None, None, activation, rule, 7.0)
            ratio, sums = launch.row_sums(i, True)
            torch.testing.assert_close(ratio, right.detach())
            planes = torch.cat([sums[:3], torch.zeros_like(sums)])
            mine = launch.gradients(i, planes, ratio, torch.ones_like(ratio), True, True, True)
        for ours, theirs in zip((mine[0], mine[1], mine[2][0].sum(1)), gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


@needs_interpreter
def test_a_new_activation(monkeypatch):
    """Evidence z^2: two functions."""
    monkeypatch.setattr(fused_opinion, "evidence", square_evidence)
    monkeypatch.setattr(fused_opinion, "evidence_slope", square_slope)
    compare("square", "dempster", lambda z: z * z, lambda log_ratio: log_ratio.sum(1), torch.tensor([1.0, 2.0]))


@needs_interpreter
@pytest.mark.parametrize("scale", [1.0, 60.0])  # in linear space, and in logarithms
def test_a_new_rule(monkeypatch, scale):
    """Only the prompt with the most evidence for a class counts: five functions of one line."""
    monkeypatch.setattr(fused_opinion, "fuse_linear", strongest_linear)
    monkeypatch.setattr(fused_opinion, "leave_linear", strongest_leave)
    monkeypatch.setattr(fused_opinion, "fuse", strongest)
    monkeypatch.setattr(fused_opinion, "fused", strongest_fused)
    monkeypatch.setattr(fused_opinion, "fuse_slope", strongest_slope)
    scales = scale * torch.tensor([0.2, 0.3])
    compare("exp", "strongest", torch.exp, lambda log_ratio: log_ratio.amax(1), scales)


def test_names_agree_with_cdc_ops():
    from cdc_ops.evidence import ACTIVATIONS
    from cdc_ops.fusion import RULES

    assert epilogue.ACTIVATIONS == ACTIVATIONS and epilogue.RULES == RULES
