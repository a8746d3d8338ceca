"""Every fused operation of backend "triton" against the reference in float64, in the interpreter.

The kernel's error may not exceed twice PyTorch's own error in the same dtype, plus ``EPS (3 + |z|)`` of the largest
value (and the rounding of a result in half precision): a logit of 100 is known to float32 no better than 4e-6,
and evidence is its exponential.
"""

import contextlib
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cdc_kernels import configs, launch

from cdc_ops import evidential_cross_entropy, fused_opinion, fused_topk

EPS = 3e-7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = ["dempster", "cumulative", "averaging", "weighted"]
ACTIVATIONS = ["exp", "softplus", "relu"]
few = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@contextlib.contextmanager
def along(path, cut=False):
    """Force a path; ``cut``: with so little memory that classes are taken one tile (of 16) at a time."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(configs.force_path(path))
        if cut:
            stack.enter_context(mock.patch.object(configs, "WORKSPACE", 16))
            stack.enter_context(mock.patch.multiple(launch, RATIO_NUMBERS=16, PARTIAL_NUMBERS=16))
        yield


both_paths = pytest.mark.parametrize("path", configs.PATHS)


class Case:
    """Random features and how they become opinions."""

    def __init__(
        self, B=5, M=3, K=19, D=21, *, scale=10.0, bias=True, shared=True, dtype=torch.float32, activation="exp",
        rule="dempster", prior_weight=None, normalize=True, confident=False, layout="plain", seed=0,
        path="tiles", cut=False,
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
        self.scale, self.path, self.cut = scale, path, cut
        self.slope_size = 1.0  # of a logit, before it is multiplied by what made the logit
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
        return float(sizes[name]) * self.slope_size if name in sizes else 1.0

    def leaves(self, dtype):
        """The inputs, layout kept, in the dtype (None: as they are), asking for gradients."""
        return [None if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for v in self.inputs]

    def compare(self, compute, names):
        """compute(inputs, backend) -> values; values and the gradients of each float value's weighted sum."""
        truth = compute(self.leaves(torch.float64), "reference")
        plain = compute(self.leaves(None), "reference")
        with along(self.path, self.cut):
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
    # the KL's gradient, (alpha - 1) trigamma(alpha) without evidence, is large where W / K is small
    alpha = torch.tensor((case.options["prior_weight"] or case.inputs[1].shape[1]) / case.inputs[1].shape[1])
    case.slope_size = 1.0 + form.get("kl_weight", 0.0) * float((alpha - 1).abs() * torch.polygamma(1, alpha))

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
    path=st.sampled_from(configs.PATHS),
    cut=st.booleans(),
)
CORNERS = {
    "one of each": {"B": 1, "M": 1, "K": 1, "D": 1},
    "one class": {"B": 2, "M": 2, "K": 1, "D": 5, "rule": "weighted"},
    "one prompt": {"B": 3, "M": 1, "K": 17, "D": 16, "scale": 100.0, "confident": True},
    "confident": {"B": 4, "M": 3, "K": 7, "scale": 100.0, "confident": True, "dtype": torch.bfloat16, "shared": False},
    "no evidence": {"B": 4, "M": 2, "K": 9, "activation": "relu", "bias": False, "normalize": False, "scale": 0.0},
    # tiles of 16 classes, some of which leave linear space at the first prompt, some later, some never
    "in and out of linear space": {"B": 20, "M": 4, "K": 40, "D": 2, "scale": 45.0, "confident": True},
    "tiny evidence": {"B": 4, "M": 4, "K": 20, "scale": 0.1, "prior_weight": 1e30},
}


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
@example(
    Case(
        5, 2, 17, 1, scale=0.1, shared=False, activation="relu", rule="averaging", prior_weight=2.0, confident=True,
        layout="expanded", seed=156, path="chunks", cut=True,
    ), "log", 0.4, (0.5, 0.0),
)  # fmt: skip
def test_evidential_loss(case, form, kl_weight, weights):
    run_loss(case, form=form, kl_weight=kl_weight, prompt_weight=weights[0], fused_weight=weights[1])


@pytest.mark.parametrize("corner", CORNERS)
@both_paths
def test_corners(corner, path):
    case = Case(**CORNERS[corner], path=path)
    run_opinion(case)
    run_loss(case, kl_weight=0.2)
    run_loss(case)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@both_paths
def test_every_activation_with_every_rule(activation, rule, path):
    run_opinion(Case(4, 2, 17, 5, activation=activation, rule=rule, path=path))


@pytest.mark.parametrize("form", ["digamma", "log", "mse"])
@both_paths
def test_every_form(form, path):
    run_loss(Case(3, 2, 17, 7, path=path), form=form)
    run_loss(Case(3, 2, 17, 7, confident=True, scale=100.0, path=path), form=form, kl_weight=0.5)


@pytest.mark.parametrize("form", ["digamma", "log", "mse"])
@pytest.mark.parametrize("rule", ["dempster", "weighted"])
@both_paths
def test_a_loss_that_needs_no_fused_opinion(rule, form, path):
    run_loss(Case(4, 1, 17, 7, rule=rule, path=path, cut=True), form=form, fused_weight=2.0)
    run_loss(Case(4, 1, 17, 7, rule=rule, path=path, shared=False), form=form, kl_weight=0.5)
    run_loss(Case(3, 3, 20, 5, rule=rule, path=path, dtype=torch.bfloat16), form=form, fused_weight=0.0)


@both_paths
def test_classes_chunk_by_chunk(path):
    run_opinion(Case(3, 2, 40, 5, path=path, cut=True))
    run_loss(Case(3, 2, 40, 5, path=path, cut=True), kl_weight=0.1, form="mse")
    run_loss(Case(3, 2, 40, 5, rule="weighted", shared=False, path=path, cut=True))


@pytest.mark.parametrize("M", [2, 4, 6, 8])
def test_several_prompts_in_one_product(M):
    """Side by side where images are the same for all prompts, 2 or 4 of them; in and out of linear space among them."""
    run_opinion(Case(20, M, 40, 5))
    run_opinion(Case(20, M, 40, 2, scale=45.0, confident=True))
    run_opinion(Case(5, M, 20, 19, layout="strided", dtype=torch.float16, normalize=False, rule="averaging"))
    run_loss(Case(5, M, 20, 7, dtype=torch.bfloat16), form="mse")
    run_loss(Case(5, M, 20, 7, shared=False, rule="weighted"))


@pytest.mark.parametrize("programs", [1, 3, 7, 1000])
def test_classes_of_few_images_are_split_over_programs(programs, monkeypatch):
    """In parts of any number, some of which are empty, all classes at once or in chunks of three tiles."""
    monkeypatch.setattr(configs, "PROGRAMS", programs)
    run_loss(Case(3, 2, 140, 5), kl_weight=0.1)
    monkeypatch.setattr(launch, "RATIO_NUMBERS", 3 * 16 * 3)
    run_loss(Case(3, 2, 140, 5), form="mse")
    run_loss(Case(3, 2, 140, 5, rule="weighted", shared=False))


@pytest.mark.parametrize("needed", [[0], [1], [2], [3], [0, 2]])
@both_paths
def test_only_the_gradients_asked_for(needed, path, monkeypatch):
    case = Case(4, 2, 17, 5)
    inputs = case.inputs
    whole = case.leaves(None)
    with along(path):
        evidential_cross_entropy(*whole[:2], case.target, scale=whole[2], bias=whole[3], backend="triton").backward()
    some = [v.detach().requires_grad_(n in needed) for n, v in enumerate(inputs)]
    made = []
    gradients = launch.gradients
    monkeypatch.setattr(launch, "gradients", lambda *a: made.extend(gradients(*a)) or tuple(made))
    with along(path):
        evidential_cross_entropy(*some[:2], case.target, scale=some[2], bias=some[3], backend="triton").backward()
    assert [v.numel() > 0 for v in made] == [0 in needed, 1 in needed, 2 in needed or 3 in needed]
    for n, (part, all_) in enumerate(zip(some, whole, strict=True)):
        if n in needed:
            torch.testing.assert_close(part.grad, all_.grad, rtol=1e-5, atol=1e-7)
        else:
            assert part.grad is None


@few
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.data(), st.sampled_from(RULES))
def test_fused_topk(B, M, K, data, rule):
    k = data.draw(st.integers(1, K))
    case = Case(B, M, K, 7, rule=rule, shared=data.draw(st.booleans()))
    x, t, scale, bias = case.inputs
    with along(data.draw(st.sampled_from(configs.PATHS)), data.draw(st.booleans())):
        mine = fused_topk(x, t, k, scale=scale, bias=bias, backend="triton", **case.options)
    right = fused_topk(
        *(v.double() for v in (x, t)), k, scale=scale.double(), bias=bias.double(), backend="reference", **case.options
    )
    for name in ("prob", "belief", "uncertainty", "prompt_uncertainty"):
        torch.testing.assert_close(getattr(mine, name).double(), getattr(right, name), rtol=1e-4, atol=1e-6)
    assert (mine.classes == right.classes).float().mean() > 0.99 or rule != "dempster"


@pytest.mark.parametrize("fast", configs.PATHS)
def test_autotuning_takes_what_is_fastest_here_and_remembers(fast, monkeypatch):
    """Both paths really run; only the clock is ours, so that the test knows which is the faster."""
    tried, measured = [], configs._time

    def clock(run, device):
        choice = run.args[0]
        tried.append(choice[0])
        assert measured(run, device) > 0
        return 1.0 if choice[0] == fast else 2.0

    taken = {"forward": [], "backward": []}
    forward, gradients = launch.forward, {name: getattr(launch, f"{name[:-1]}_gradients") for name in configs.PATHS}
    monkeypatch.setattr(
        launch, "forward", lambda c, f, path, *a: taken["forward"].append(path) or forward(c, f, path, *a)
    )
    for name, made in gradients.items():
        watched = partial(lambda name, made, *a: taken["backward"].append(name) or made(*a), name, made)
        monkeypatch.setattr(launch, f"{name[:-1]}_gradients", watched)
    monkeypatch.setattr(configs, "_time", clock)
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setenv(configs.AUTOTUNE, "1")
    run_loss(Case(3, 2, 40, 5, path=None))
    assert tried == list(configs.paths("forward", 3, 2, 40, 5, torch.float32)) + list(
        configs.paths("backward", 3, 2, 40, 5, torch.float32)
    )
    assert {name: each[-1] for name, each in taken.items()} == {"forward": fast, "backward": fast}
    run_loss(Case(3, 2, 40, 5, seed=1, path=None))  # of the same sizes
    assert len(tried) == 4
    run_opinion(Case(3, 2, 40, 5, path=None))
    found = fused_topk(*Case(3, 2, 40, 5).inputs[:2], 4, scale=10.0, backend="triton")
    right = fused_topk(*Case(3, 2, 40, 5).inputs[:2], 4, scale=10.0, backend="reference")
    assert torch.equal(found.classes, right.classes)
    assert len(tried) == 10  # the opinion both ways, and the top-k


@both_paths
def test_a_forced_path_is_not_timed(path, monkeypatch):
    monkeypatch.setenv(configs.AUTOTUNE, "1")
    monkeypatch.setattr(configs, "_tuned", {})
    run_loss(Case(3, 2, 17, 5, path=path))
    assert {key[1] for key in configs._tuned} == {(path,)}
    assert {choice[0] for choice in configs._tuned.values()} == {path}


@both_paths
def test_twice_is_bitwise_the_same(path):
    case = Case(6, 3, 40, 9, scale=100.0)

    def once():
        x, t, scale, bias = case.leaves(None)
        with along(path, cut=True):
            loss = evidential_cross_entropy(x, t, case.target, scale=scale, bias=bias, kl_weight=0.1, backend="triton")
            return [loss, *torch.autograd.grad(loss, [x, t, scale, bias])]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)
