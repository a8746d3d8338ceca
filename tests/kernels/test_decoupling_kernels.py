"""The decoupling loss by one kernel, against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cdc_kernels import ops

from cdc_ops import decoupling_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 40), st.booleans(), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_pairs_are_pushed_apart_as_by_the_reference(M, K, D, squared, transposed, dtype):
    g = torch.Generator().manual_seed(M + 10 * K + 100 * D)
    t = torch.randn(M, K, D, generator=g).to(dtype).to(DEVICE)
    if transposed:
        t = t.transpose(0, 2).contiguous().transpose(0, 2)
    mine_in, right_in = t.clone().requires_grad_(), t.double().requires_grad_()
    mine = ops.decoupling(mine_in, squared).sum() / max(1, K * M * (M - 1) // 2)
    right = decoupling_loss(right_in, "cosine_squared" if squared else "cosine")
    torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-6)
    (mine + 0 * mine_in.float().sum()).backward()
    (right + 0 * right_in.sum()).backward()
    size = float((1 / right_in.detach().norm(dim=-1)).max())
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mine_in.grad.double(), right_in.grad, rtol=rtol, atol=rtol / 3 * size)


def test_opcheck():
    t = torch.randn(3, 2, 5, requires_grad=True)
    torch.library.opcheck(ops.decoupling, (t, True))
    torch.library.opcheck(ops.decoupling_backward, (t.detach(), torch.rand(2), False))


def test_too_much_for_one_program_is_refused():
    with pytest.raises(ValueError, match="text must have at most"):
        ops.decoupling(torch.rand(64, 1, 1024), False)
