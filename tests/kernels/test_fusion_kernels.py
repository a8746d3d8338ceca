"""Fusion of ready-made evidence by one kernel, through the public function, against the reference in float64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cdc_kernels import launch_small, ops

from cdc_ops import BackendUnavailableError, EvidenceFusion, discount, fuse_evidence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = ["dempster", "cumulative", "averaging", "weighted"]
few = settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
half = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def compare(e, compute):
    """compute(evidence, backend) -> fused: values and gradients against float64."""
    mine_in, right_in = e.clone().requires_grad_(), e.double().requires_grad_()
    mine, right = compute(mine_in, "triton"), compute(right_in, "reference")
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), right, rtol=2e-5, atol=1e-12)
    upstream = torch.rand(mine.shape, generator=torch.Generator().manual_seed(0)).to(e.device)
    mine.backward(upstream)
    right.backward(upstream.double())
    assert mine_in.grad.dtype == e.dtype
    rtol = 2e-5 if e.dtype == torch.float32 else 1e-2
    size = float(right_in.grad.abs().max()) if e.numel() else 0.0
    atol = (3e-7 if e.dtype == torch.float32 else 1e-3) * size  # a weight's gradient cancels over the classes
    torch.testing.assert_close(mine_in.grad.double(), right_in.grad, rtol=rtol, atol=atol)


@few
@given(
    st.lists(st.integers(0, 3), max_size=2), st.integers(1, 4), st.integers(1, 300), st.sampled_from(RULES),
    st.sampled_from([0.0, 1e-3, 1.0, 1e4]), half, st.sampled_from(["plain", "transposed", "expanded"]), st.data(),
)  # fmt: skip
def test_evidence_is_fused_as_by_the_reference(batch, M, K, rule, size, dtype, layout, data):
    dim = data.draw(st.integers(0, len(batch)))
    if dtype == torch.float16:
        size = min(size, 1.0)  # gradients are products of M - 1 evidences: float16 ends at 65504
    shape = [*batch[:dim], M, *batch[dim:], K]
    e = (size * torch.rand(shape, generator=torch.Generator().manual_seed(M + 10 * K))).to(dtype).to(DEVICE)
    if layout == "transposed":
        e = e.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded" and e.numel():
        e = e[..., :1].expand(shape)
    compare(e, lambda e, backend: fuse_evidence(e, dim, rule, 2.0, backend=backend))


def test_prompts_further_apart_than_32_bits_count():
    """[M, B, K] of 6 GB fused over its first dimension: here memory that is reserved and hardly touched."""
    M, K, apart = 3, 5, 2**30 + 8
    room = torch.empty(2 * apart + K, dtype=torch.float16, device=DEVICE)
    e = room.as_strided((1, M, K), (K, apart, 1))
    e.copy_(torch.arange(M * K).view(1, M, K) / 8)
    torch.testing.assert_close(ops.fuse_evidence(e, "dempster", 2.0), fuse_evidence(e.float(), 1, "dempster", 2.0))
    g = torch.ones(1, K, device=DEVICE)
    mine = ops.fuse_evidence_backward(e, g, "cumulative", 2.0)
    torch.testing.assert_close(mine, torch.ones_like(mine))


@pytest.mark.parametrize("rule", RULES)
def test_discounted_before_fusion(rule):
    """Shafer's discounting is a pass of its own; a discounted opinion is fused by the kernel like any other."""
    e = 50 * torch.rand(5, 3, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    reliability = torch.tensor([1.0, 0.5, 0.0], device=DEVICE)
    compare(e, lambda e, backend: fuse_evidence(discount(e, reliability.to(e.dtype)), 1, rule, backend=backend))


@pytest.mark.parametrize("rule", RULES)
def test_saturates_like_the_reference(rule):
    e = torch.full((1, 3, 2), 1e20, device=DEVICE)
    e[0, 1] = 3e38
    torch.testing.assert_close(
        fuse_evidence(e, 1, rule, 2.0, backend="triton"), fuse_evidence(e, 1, rule, 2.0), rtol=1e-4, atol=0
    )


def count(monkeypatch, name):
    calls = []
    original = getattr(launch_small, name)
    monkeypatch.setattr(launch_small, name, lambda *a: calls.append(a) or original(*a))
    return calls


def test_the_kernel_runs_when_asked_and_only_then(monkeypatch):
    calls = count(monkeypatch, "fuse_evidence")
    e = torch.rand(2, 3, 4)
    fuse_evidence(e, 1)
    fuse_evidence(e, 1, backend="reference")
    assert not calls
    fuse_evidence(e, 1, backend="triton")
    EvidenceFusion(backend="triton")(e)
    assert len(calls) == 2


def test_what_the_kernel_cannot_take():
    with pytest.raises(BackendUnavailableError, match="float64"):
        fuse_evidence(torch.rand(2, 3, 4, dtype=torch.float64), 1, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'triton'; got 'blocked'"):
        fuse_evidence(torch.rand(2, 3, 4), 1, backend="blocked")
    for bad, words in ((-torch.ones(2, 3), "negative"), (torch.full((2, 3), torch.inf), "finite")):
        with pytest.raises(ValueError, match=f"evidence must .*{words}"):
            fuse_evidence(bad, 0, backend="triton")


def test_opcheck():
    e = torch.rand(2, 3, 5, requires_grad=True)
    torch.library.opcheck(ops.fuse_evidence, (e, "dempster", 5.0))
    torch.library.opcheck(ops.fuse_evidence_backward, (e.detach(), torch.rand(2, 5), "averaging", 5.0))


def test_the_operator_refuses_the_weighted_rule():
    with pytest.raises(ValueError, match="rule must be"):
        ops.fuse_evidence(torch.rand(1, 2, 3), "weighted", 3.0)
