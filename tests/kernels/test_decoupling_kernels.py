"""The decoupling loss by one kernel, through the public function, against the reference in float64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cdc_kernels import launch_small, ops

from cdc_ops import DecouplingLoss, decoupling_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 40), st.sampled_from(["cosine", "cosine_squared"]),
    st.sampled_from(["plain", "transposed", "expanded", "zero"]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_pairs_are_pushed_apart_as_by_the_reference(M, K, D, kind, layout, dtype):
    g = torch.Generator().manual_seed(M + 10 * K + 100 * D)
    t = torch.randn(M, K, D, generator=g).to(dtype).to(DEVICE)
    if layout == "transposed":
        t = t.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "expanded":
        t = t[:, :1].expand(M, K, D)
    elif layout == "zero":
        t[0] = 0
    mine_in, right_in = t.clone().requires_grad_(), t.double().requires_grad_()
    mine, right = decoupling_loss(mine_in, kind, backend="triton"), decoupling_loss(right_in, kind)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-6)
    (mine + 0 * mine_in.float().sum()).backward()
    (right + 0 * right_in.sum()).backward()
    if layout == "zero":  # the reference divides by 1e-12 there, a number of 1e12 that means nothing
        mine_in.grad[0] = right_in.grad[0] = 0
    size = float((1 / right_in.detach().norm(dim=-1).clamp_min(1e-3)).max())
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mine_in.grad.double(), right_in.grad, rtol=rtol, atol=rtol / 3 * size)


def test_the_kernel_runs_when_asked_and_only_then(monkeypatch):
    calls = []
    original = launch_small.decoupling
    monkeypatch.setattr(launch_small, "decoupling", lambda *a: calls.append(a) or original(*a))
    t = torch.rand(2, 3, 4)
    decoupling_loss(t)
    decoupling_loss(t, backend="reference")
    assert not calls
    decoupling_loss(t, backend="triton")
    DecouplingLoss(backend="triton")(t)
    assert len(calls) == 2


def test_opcheck():
    t = torch.randn(3, 2, 5, requires_grad=True)
    torch.library.opcheck(ops.decoupling, (t, True))
    torch.library.opcheck(ops.decoupling_backward, (t.detach(), torch.rand(2), False))


def test_too_much_for_one_program_is_refused():
    with pytest.raises(ValueError, match="text must have at most"):
        ops.decoupling(torch.rand(64, 1, 1024), False)


def test_text_not_finite_is_refused():
    with pytest.raises(ValueError, match="text must be finite"):
        decoupling_loss(torch.full((2, 3, 4), torch.nan), backend="triton")
