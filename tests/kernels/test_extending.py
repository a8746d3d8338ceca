"""A new activation needs one change in one place: two small functions of the epilogue."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from cdc_kernels import epilogue, fused_opinion, launch  # noqa: E402
from cdc_kernels.special import NOTHING, log1p  # noqa: E402

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels are cached by their source")


@triton.jit
def square_evidence(z, log_w, ACTIVATION: tl.constexpr):
    e = z * z
    return tl.where(e > 0, tl.log(tl.maximum(e, 1e-37)) - log_w, NOTHING), log1p(e * tl.exp(-log_w))


@triton.jit
def square_slope(z, ACTIVATION: tl.constexpr):
    return 2.0 / z


@needs_interpreter
def test_evidence_of_squared_logits(monkeypatch):
    monkeypatch.setattr(fused_opinion, "evidence", square_evidence)
    monkeypatch.setattr(fused_opinion, "evidence_slope", square_slope)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 5, generator=g), torch.randn(2, 7, 5, generator=g)
    scale = torch.tensor([1.0, 2.0])
    leaves = [v.clone().requires_grad_() for v in (x, t, scale)]
    z = torch.einsum("bd,mkd->bmk", leaves[0], leaves[1]) * leaves[2][:, None]
    right = torch.log1p(z * z / 7).sum(1)
    gradients = torch.autograd.grad(right.sum(), leaves)

    i = launch.Inputs(x, t, scale, None, None, None, None, None, "square", "dempster", 7.0)
    ratio, sums = launch.row_sums(i, True)
    torch.testing.assert_close(ratio, right.detach())
    planes = torch.cat([sums[:3], torch.zeros_like(sums)])
    mine = launch.gradients(i, planes, ratio, torch.ones_like(ratio), True, True, True)
    for ours, theirs in zip((mine[0], mine[1], mine[2][0].sum(1)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_names_agree_with_cdc_ops():
    from cdc_ops.evidence import ACTIVATIONS
    from cdc_ops.fusion import RULES

    assert epilogue.ACTIVATIONS == ACTIVATIONS and epilogue.RULES == RULES
