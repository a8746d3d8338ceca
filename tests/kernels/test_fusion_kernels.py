"""Fusion of ready-made evidence by one kernel, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cdc_kernels import ops

from cdc_ops import fuse_evidence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = ["dempster", "cumulative", "averaging"]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 7), st.integers(1, 4), st.integers(1, 300), st.sampled_from(RULES),
    st.sampled_from([0.0, 1e-6, 1.0, 1e6]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_evidence_is_fused_as_by_the_reference(N, M, K, rule, size, dtype, transposed):
    g = torch.Generator().manual_seed(N + 10 * M + 100 * K)
    e = (size * torch.rand(N, M, K, generator=g)).to(dtype).to(DEVICE)
    if transposed:
        e = e.transpose(0, 2).contiguous().transpose(0, 2)
    upstream = torch.rand(N, K, generator=g).to(DEVICE)
    mine_in, right_in = e.clone().requires_grad_(), e.double().requires_grad_()
    mine, right = ops.fuse_evidence(mine_in, rule, 2.0), fuse_evidence(right_in, 1, rule, 2.0)
    torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-12)
    mine.backward(upstream)
    right.backward(upstream.double())
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mine_in.grad.double(), right_in.grad, rtol=rtol, atol=1e-12)


def test_saturates_like_the_reference():
    e = torch.full((1, 3, 2), 1e20, device=DEVICE)
    torch.testing.assert_close(
        ops.fuse_evidence(e, "dempster", 2.0), fuse_evidence(e, 1, "dempster", 2.0), rtol=1e-4, atol=0
    )


def test_opcheck():
    e = torch.rand(2, 3, 5, requires_grad=True)
    torch.library.opcheck(ops.fuse_evidence, (e, "dempster", 5.0))
    torch.library.opcheck(ops.fuse_evidence_backward, (e.detach(), torch.rand(2, 5), "averaging", 5.0))


def test_the_weighted_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be"):
        ops.fuse_evidence(torch.rand(1, 2, 3), "weighted", 3.0)
