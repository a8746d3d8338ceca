"""Every fused operation of backend "triton" against the reference in float64, in the interpreter.

The kernel's error may not exceed twice PyTorch's own error in the same dtype, plus ``EPS (3 + |z|)`` of the largest
value (and the rounding of a result in half precision): a logit of 100 is known to float32 no better than 4e-6,
and evidence is its exponential.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cdc_kernels import launch

from cdc_ops import evidential_cross_entropy, fused_opinion, fused_topk

EPS = 3e-7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = ["dempster", "cumulative", "averaging", "weighted"]
ACTIVATIONS = ["exp", "softplus", "relu"]
few = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


class Case:
    """Random features and how they become opinions."""

    def __init__(
        self, B=5, M=3, K=19, D=21, *, scale=10.0, bias=True, shared=True, dtype=torch.float32, activation="exp",
        rule="dempster", prior_weight=None, normalize=True, confident=False, layout="plain", seed=0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        t = torch.randn(M, K, D, generator=g)
        x = torch.randn((B, D) if shared else (B, M, D), generator=g)
        self.target = torch.randint(0, K, (B,), generator=g).to(DEVICE)
        if confident:  # images lie next to their class
            at = t[:, self.target.cpu()].transpose(0, 1)  # [B, M, D]
            x = 0.1 * x + (at.mean(1) if shared else at)
        if not normalize:
            x, t = x / D**0.5, t / D**0.5
        if layout == "strided":
            t = torch.stack([t, t], -1).flatten(-2)[..., ::2]
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "expanded":
            x, t = x[:1].expand_as(x), t[:1].expand_as(t)
        self.scale = scale
        self.product_size = 1.0 if normalize else float(x.norm(dim=-1).max() * t.norm(dim=-1).max())
        self.logit_size = scale * self.product_size
        self.inputs = [
            x.to(dtype).to(DEVICE),
            t.to(dtype).to(DEVICE),
            (scale * torch.linspace(1, 0.5, M)).to(DEVICE),
            torch.linspace(-0.5, 0.5, M).to(DEVICE) if bias else None,
        ]
        self.options = {
            "activation": activation, "rule": rule, "prior_weight": prior_weight, "normalize": normalize
        }  # fmt: skip

    def natural_size(self, name):
        """What a value is made of, where its parts cancel: each is a sum over prompts or images."""
        x, t = (v.double().norm(dim=-1) for v in self.inputs[:2])
        B, M = len(self.target), len(t)
        if self.options["normalize"]:
            image, text = 1 / x.min(), 1 / t.min()
        else:
            image, text = t.max(), x.max()
        sizes = {
            "image": M * self.scale * image,
            "text": B * self.scale * text,
            "scale": B * self.product_size,
            "bias": B,
        }
        return float(sizes.get(name, 1.0))

    def leaves(self, dtype):
        """The inputs, layout kept, in the dtype (None: as they are), asking for gradients."""
        return [None if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for v in self.inputs]

    def compare(self, compute, names):
        """compute(inputs, backend) -> values; values and the gradients of each float value's weighted sum."""
        truth = compute(self.leaves(torch.float64), "reference")
        plain = compute(self.leaves(None), "reference")
        mine = compute(self.leaves(None), "triton")
        for name, right, theirs, ours in zip(names, truth, plain, mine, strict=True):
            if right is None:
                assert ours is None or float(ours.abs().max()) == 0, name
                continue
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
            size = right.abs().max().clamp_min(self.natural_size(name))
            allowed = 2 * (theirs.double() - right).abs().max() + EPS * (3 + self.logit_size) * size
            if ours.dtype != torch.float32:  # rounded once at the end; the interpreter truncates
                allowed += torch.finfo(ours.dtype).eps * right.abs().max()
            error = (ours.double() - right).abs().max()
            assert error <= allowed, (name, error.item(), allowed.item())


def run_opinion(case):
    def compute(inputs, backend):
        o = fused_opinion(*inputs[:2], scale=inputs[2], bias=inputs[3], backend=backend, **case.options)
        values = [o.log_ratio, o.log_partition, o.prompt_log_partition]
        g = torch.Generator().manual_seed(1)
        total = sum(
            (v.double() * torch.rand(v.shape, generator=g, dtype=torch.float64).to(v.device)).sum() for v in values
        )
        wanted = [v for v in inputs if v is not None]
        gradients = iter(torch.autograd.grad(total, wanted))
        return [*values, *(None if v is None else next(gradients) for v in inputs)]

    case.compare(compute, ["log_ratio", "total", "prompts", "image", "text", "scale", "bias"])


def run_loss(case, **form):
    def compute(inputs, backend):
        options = {**case.options, **form, "reduction": "none", "backend": backend}
        loss = evidential_cross_entropy(*inputs[:2], case.target, scale=inputs[2], bias=inputs[3], **options)
        wanted = [v for v in inputs if v is not None]
        upstream = torch.linspace(0.5, 1.5, len(loss), device=loss.device, dtype=loss.dtype)
        gradients = iter(torch.autograd.grad(loss, wanted, upstream))
        return [loss, *(None if v is None else next(gradients) for v in inputs)]

    case.compare(compute, ["loss", "image", "text", "scale", "bias"])


sizes = {"B": st.integers(1, 18), "M": st.integers(1, 3), "K": st.integers(1, 20), "D": st.integers(1, 20)}
cases = st.builds(
    Case,
    **sizes,
    scale=st.sampled_from([0.1, 10.0, 100.0]),
    bias=st.booleans(),
    shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(ACTIVATIONS),
    rule=st.sampled_from(RULES),
    prior_weight=st.sampled_from([None, 2.0]),
    normalize=st.booleans(),
    confident=st.booleans(),
    layout=st.sampled_from(["plain", "strided", "expanded"]),
    seed=st.integers(0, 1000),
)
CORNERS = [
    Case(1, 1, 1, 1),
    Case(2, 2, 1, 5, rule="weighted"),
    Case(3, 1, 17, 16, scale=100.0, confident=True),
    Case(4, 3, 7, 6, scale=100.0, confident=True, dtype=torch.bfloat16, shared=False),
    Case(4, 2, 9, 5, activation="relu", bias=False, normalize=False, scale=0.0),  # evidence 0 everywhere
]


@few
@given(cases)
def test_fused_opinion(case):
    run_opinion(case)


@few
@given(
    cases,
    st.sampled_from(["digamma", "log", "mse"]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([(1.0, 1.0), (0.0, 1.0), (0.5, 0.0)]),
)
def test_evidential_loss(case, form, kl_weight, weights):
    run_loss(case, form=form, kl_weight=kl_weight, prompt_weight=weights[0], fused_weight=weights[1])


@pytest.mark.parametrize("case", CORNERS)
def test_corners(case):
    run_opinion(case)
    run_loss(case, kl_weight=0.2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_every_rule(activation, rule):
    run_opinion(Case(4, 2, 17, 5, activation=activation, rule=rule))


@pytest.mark.parametrize("form", ["digamma", "log", "mse"])
def test_every_form(form):
    run_loss(Case(3, 2, 17, 7), form=form)
    run_loss(Case(3, 2, 17, 7, confident=True, scale=100.0), form=form, kl_weight=0.5)


def test_the_loss_takes_classes_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(launch, "RATIO_NUMBERS", 16)
    run_loss(Case(3, 2, 40, 5), kl_weight=0.1)
    run_loss(Case(3, 2, 40, 5, rule="weighted", shared=False))


@pytest.mark.parametrize("needed", [[0], [1], [2], [3], [0, 2]])
def test_only_the_gradients_asked_for(needed):
    case = Case(4, 2, 17, 5)
    inputs = case.inputs
    whole = case.leaves(None)
    evidential_cross_entropy(*whole[:2], case.target, scale=whole[2], bias=whole[3], backend="triton").backward()
    some = [v.detach().requires_grad_(n in needed) for n, v in enumerate(inputs)]
    evidential_cross_entropy(*some[:2], case.target, scale=some[2], bias=some[3], backend="triton").backward()
    for n, (part, all_) in enumerate(zip(some, whole, strict=True)):
        if n in needed:
            torch.testing.assert_close(part.grad, all_.grad, rtol=1e-5, atol=1e-7)
        else:
            assert part.grad is None


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.data(), st.sampled_from(RULES))
def test_fused_topk(B, M, K, data, rule):
    k = data.draw(st.integers(1, K))
    case = Case(B, M, K, 7, rule=rule, shared=data.draw(st.booleans()))
    x, t, scale, bias = case.inputs
    mine = fused_topk(x, t, k, scale=scale, bias=bias, backend="triton", **case.options)
    right = fused_topk(
        *(v.double() for v in (x, t)), k, scale=scale.double(), bias=bias.double(), backend="reference", **case.options
    )
    for name in ("prob", "belief", "uncertainty", "prompt_uncertainty"):
        torch.testing.assert_close(getattr(mine, name).double(), getattr(right, name), rtol=1e-4, atol=1e-6)
    assert (mine.classes == right.classes).float().mean() > 0.99 or rule != "dempster"


def test_twice_is_bitwise_the_same():
    case = Case(6, 3, 20, 9, scale=100.0)

    def once():
        x, t, scale, bias = case.leaves(None)
        loss = evidential_cross_entropy(x, t, case.target, scale=scale, bias=bias, kl_weight=0.1, backend="triton")
        return [loss, *torch.autograd.grad(loss, [x, t, scale, bias])]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)
