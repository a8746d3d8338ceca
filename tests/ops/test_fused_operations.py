"""fused_opinion, fused_topk and evidential_cross_entropy: every backend against float64 and the plain formulas."""

import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from cdc_ops import (
    BackendUnavailableError,
    Opinion,
    conflict,
    dirichlet_cross_entropy,
    evidence_from_logits,
    evidential_cross_entropy,
    fuse_evidence,
    fused_opinion,
    fused_topk,
)
from cdc_ops.backends import block_loss, block_slopes, block_sums, blocked, blocks

BACKENDS = ["reference", "blocked"]
ACTIVATIONS = ["exp", "softplus", "relu"]
RULES = ["dempster", "cumulative", "averaging", "weighted"]
FORMS = ["digamma", "log", "mse"]
f64 = torch.float64


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of at most 2 images by 3 classes, so that small problems have many, ragged at both edges."""
    small = {"BLOCK_ROWS": 2, "BLOCK_COLUMNS": 3, "LEAST_COLUMNS": 2, "LEAST_ROWS": 1, "VECTOR": 1, "FLOOR": 1}
    for name, value in small.items():
        monkeypatch.setattr(f"cdc_ops.backends.blocks.{name}", value)
    for cut in (blocks.cut, blocks.cut_of_all_classes):
        cut.cache_clear()  # they remember
    yield
    for cut in (blocks.cut, blocks.cut_of_all_classes):
        cut.cache_clear()


def features(B, M, K, D, *, per_prompt=False, dtype=f64, seed=0, layout="contiguous"):
    """Random features; the same numbers in several memory layouts."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(*((B, M, D) if per_prompt else (B, D)), generator=generator, dtype=f64)
    text = torch.randn(M, K, D, generator=generator, dtype=f64)
    if layout == "strided":
        image = image.transpose(0, -1).contiguous().transpose(0, -1)
        text = text.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "expanded":
        image, text = image[:1].expand_as(image), text[:1].expand_as(text)
    return image.to(dtype), text.to(dtype)


def results_and_gradients(function, inputs, dtype=None):
    """Outputs of ``function`` and gradients of a fixed mixture of them."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs)
    mixture = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).reshape(o.shape)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(mixture, inputs)]


def opinion_parts(opinion):
    return opinion.log_ratio, opinion.log_partition, opinion.prompt_log_partition


# Against the plain formulas in linear space


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_prompt", [False, True])
def test_fused_opinion_is_its_definition(backend, rule, activation, per_prompt):
    image, text = features(4, 3, 5, 6, per_prompt=per_prompt)
    scale, bias = torch.tensor([1.0, 2.0, 3.0], dtype=f64), torch.tensor([0.5, -0.5, 0.0], dtype=f64)
    W = 2.5
    kwargs = {
        "scale": scale,
        "bias": bias,
        "activation": activation,
        "rule": rule,
        "prior_weight": W,
        "backend": backend,
    }
    got = fused_opinion(image, text, **kwargs)
    x = F.normalize(image, dim=-1)
    x = x if per_prompt else x.unsqueeze(1).expand(-1, 3, -1)
    z = scale[:, None] * torch.einsum("bmd,mkd->bmk", x, F.normalize(text, dim=-1)) + bias[:, None]
    e = evidence_from_logits(z, activation)
    fused = fuse_evidence(e, 1, rule, W)
    expected = Opinion.from_evidence(fused, W)
    torch.testing.assert_close(got.evidence, fused)
    torch.testing.assert_close(got.belief, expected.belief)
    torch.testing.assert_close(got.prob, expected.prob)
    torch.testing.assert_close(got.uncertainty, expected.uncertainty)
    torch.testing.assert_close(got.prompt_uncertainty, Opinion.from_evidence(e, W).uncertainty)
    torch.testing.assert_close(got.opinion().entropy(), expected.entropy())
    if rule == "dempster":
        torch.testing.assert_close(got.conflict, conflict(e, 1, W))
    else:
        with pytest.raises(ValueError, match="conflict"):
            _ = got.conflict
    y = torch.randint(5, (4,))
    loss = evidential_cross_entropy(
        image, text, y, kl_weight=0.3, prompt_weight=0.7, fused_weight=1.5, reduction="none", **kwargs
    )
    each = dirichlet_cross_entropy(e, y[:, None].expand(4, 3), kl_weight=0.3, prior_weight=W, reduction="none")
    together = dirichlet_cross_entropy(fused, y, kl_weight=0.3, prior_weight=W, reduction="none")
    torch.testing.assert_close(loss, 0.7 * each.sum(1) + 1.5 * together)


# A loss that needs no fused opinion


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize(("M", "fused_weight"), [(1, 1.5), (1, 0.0), (3, 0.0)])
def test_the_loss_without_a_fused_opinion(small_blocks, backend, rule, activation, form, kl_weight, M, fused_weight):
    image, text = features(5, M, 7, 6)
    scale, bias = torch.linspace(3.0, 2.0, M, dtype=f64), torch.linspace(0.5, -0.5, M, dtype=f64)
    y = torch.randint(7, (5,), generator=torch.Generator().manual_seed(2))
    how = {"form": form, "kl_weight": kl_weight, "reduction": "none"}

    def plain(x, t, s, b):
        z = torch.einsum("bd,mkd->bmk", F.normalize(x, dim=-1), F.normalize(t, dim=-1))
        e = evidence_from_logits(s[:, None] * z + b[:, None], activation)
        each = dirichlet_cross_entropy(e, y[:, None].expand(5, M), **how).sum(1)
        return [(0.7 + (fused_weight if M == 1 else 0.0)) * each]

    def ours(x, t, s, b):
        kwargs = {"activation": activation, "rule": rule, "backend": backend, **how}
        return [
            evidential_cross_entropy(x, t, y, scale=s, bias=b, prompt_weight=0.7, fused_weight=fused_weight, **kwargs)
        ]

    for a, b in zip(*(results_and_gradients(f, (image, text, scale, bias)) for f in (plain, ours)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["dempster", "cumulative", "weighted"])  # where an opinion of nothing is neutral
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 50.0), K=st.integers(2, 9), form=st.sampled_from(FORMS))
def test_one_prompt_is_two_of_which_one_says_nothing(backend, rule, seed, scale, K, form):
    image, text = features(3, 1, K, 4, seed=seed)
    silent = {"scale": torch.tensor([scale, 1.0], dtype=f64), "bias": torch.tensor([1.5, -2.0], dtype=f64)}
    options = {"activation": "relu", "rule": rule, "form": form, "backend": backend, "reduction": "none"}
    y = torch.arange(3) % K
    one = evidential_cross_entropy(
        image, text, y, scale=scale, bias=1.5, prompt_weight=0.25, fused_weight=0.75, **options
    )
    two = evidential_cross_entropy(image, text.expand(2, -1, -1), y, prompt_weight=0.0, **silent, **options)
    torch.testing.assert_close(one, two)


# Blocked against reference, float64


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_blocked_equals_reference(small_blocks, data):
    B, M, K, D = (data.draw(st.integers(1, n), label=label) for n, label in zip((6, 4, 8, 5), "BMKD", strict=True))
    image, text = features(
        B,
        M,
        K,
        D,
        per_prompt=data.draw(st.booleans(), label="per prompt"),
        seed=data.draw(st.integers(0, 2**31), label="seed"),
        layout=data.draw(st.sampled_from(["contiguous", "strided", "expanded"]), label="layout"),
    )
    size = data.draw(st.sampled_from([0.0, 1.0, 20.0, 100.0, 1000.0]), label="scale")
    scale = size * torch.linspace(0.8, 1.0, M, dtype=f64)
    # off the round numbers, so that no relu logit is 0 to rounding, where its gradient jumps
    bias = torch.linspace(-0.93, 1.07, M, dtype=f64)
    bias = bias * data.draw(st.sampled_from([0.0, 1.0, 30.0]), label="bias")
    choices = {
        "activation": data.draw(st.sampled_from(ACTIVATIONS)),
        "rule": data.draw(st.sampled_from(RULES)),
        "prior_weight": data.draw(st.sampled_from([None, 0.5, 7.0])),
        "normalize": data.draw(st.booleans(), label="normalize"),
    }
    y = torch.randint(K, (B,), generator=torch.Generator().manual_seed(1))
    form = data.draw(st.sampled_from(FORMS))
    kl_weight = data.draw(st.sampled_from([0.0, 0.5]))

    def both(x, t, s, b, backend):
        kwargs = dict(scale=s, bias=b, backend=backend, **choices)
        loss = evidential_cross_entropy(
            x, t, y, form=form, kl_weight=kl_weight, prompt_weight=0.7, reduction="none", **kwargs
        )
        return [*opinion_parts(fused_opinion(x, t, **kwargs)), loss]

    inputs = image, text, scale, bias
    expected = results_and_gradients(lambda *i: both(*i, "reference"), inputs)
    got = results_and_gradients(lambda *i: both(*i, "blocked"), inputs)
    for a, b in zip(expected, got, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10 * max(1.0, float(a.detach().abs().max())))
    k = data.draw(st.integers(1, K), label="k")
    kwargs = dict(scale=scale, bias=bias, **choices)
    top = [fused_topk(image, text, k, backend=backend, **kwargs) for backend in BACKENDS]
    for name in ("prob", "belief", "uncertainty", "prompt_uncertainty"):
        torch.testing.assert_close(getattr(top[1], name), getattr(top[0], name), rtol=1e-9, atol=1e-12)
    opinion = fused_opinion(image, text, backend="reference", **kwargs)
    torch.testing.assert_close(opinion.prob.gather(1, top[1].classes), top[1].prob, rtol=1e-9, atol=1e-12)
    assert all(len(set(row.tolist())) == k for row in top[1].classes)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("rule", RULES)
def test_blocked_is_as_accurate_as_reference_in_float32(scale, rule):
    """Over several full-size blocks: the error against float64 is no worse than the plain formulas' own."""
    image, text = features(300, 3, 2100, 32)
    y = torch.randint(2100, (300,), generator=torch.Generator().manual_seed(0))

    def run(x, t, dtype, backend):
        opinion = fused_opinion(x, t, scale=scale, rule=rule, backend=backend)
        loss = evidential_cross_entropy(x, t, y, scale=scale, rule=rule, form="log", reduction="none", backend=backend)
        return *opinion_parts(opinion), loss

    truth = results_and_gradients(lambda x, t: run(x, t, f64, "reference"), (image, text))
    plain = results_and_gradients(lambda x, t: run(x, t, torch.float32, "reference"), (image, text), torch.float32)
    blocked = results_and_gradients(lambda x, t: run(x, t, torch.float32, "blocked"), (image, text), torch.float32)
    for exact, a, b in zip(truth, plain, blocked, strict=True):
        size = exact.abs().max()
        error_plain, error_blocked = (a - exact).abs().max(), (b - exact).abs().max()
        assert error_blocked <= 2 * error_plain + 2e-7 * size


# Gradients


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype, top", [(torch.float32, 65.0), (f64, 500.0)])
def test_one_prompt_may_be_far_surer_than_the_others(request, dtype, top, rule, small):
    """Their evidence together stays in linear space; as much from each of them would not."""
    if small:
        request.getfixturevalue("small_blocks")
    image, text = features(6, 4, 7, 5)
    image = image + 3 * text.mean(0)[:6]
    y = torch.arange(6) % 7

    def run(backend, dtype):
        x, t, s = image.to(dtype), text.to(dtype), torch.tensor([0.4 * top / 3, 1.0, 0.1 * top, top / 2], dtype=dtype)

        def parts(x, t, s):
            kwargs = {"scale": s, "rule": rule, "backend": backend}
            losses = [evidential_cross_entropy(x, t, y, form=form, reduction="none", **kwargs) for form in FORMS]
            return *opinion_parts(fused_opinion(x, t, **kwargs)), *losses

        return results_and_gradients(parts, (x, t, s), dtype)

    for got, exact in zip(run("blocked", dtype), run("reference", f64), strict=True):
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(
            got.double(), exact, rtol=tolerance, atol=tolerance * float(exact.detach().abs().max())
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation, rule", list(itertools.product(ACTIVATIONS, RULES)))
def test_gradcheck_of_the_opinion(small_blocks, backend, activation, rule):
    image, text = features(3, 2, 4, 3)
    scale, bias = torch.tensor([1.5, 2.0], dtype=f64), torch.tensor([0.2, -0.1], dtype=f64)
    inputs = [x.requires_grad_() for x in (image, text, scale, bias)]

    def function(x, t, s, b):
        return opinion_parts(fused_opinion(x, t, scale=s, bias=b, activation=activation, rule=rule, backend=backend))

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form, kl_weight", list(itertools.product(FORMS, [0.0, 0.5])))
@pytest.mark.parametrize("rule", ["dempster", "weighted"])
@pytest.mark.parametrize("per_prompt, normalize", [(False, True), (True, False)])
def test_gradcheck_of_the_loss(small_blocks, backend, form, kl_weight, rule, per_prompt, normalize):
    image, text = features(3, 2, 4, 3, per_prompt=per_prompt)
    scale, bias = torch.tensor([1.5, 2.0], dtype=f64), torch.tensor([0.2, -0.1], dtype=f64)
    inputs = [x.requires_grad_() for x in (image, text, scale, bias)]
    y = torch.tensor([0, 3, 1])
    kwargs = {"form": form, "kl_weight": kl_weight, "rule": rule, "normalize": normalize, "backend": backend}

    def function(x, t, s, b):
        return evidential_cross_entropy(x, t, y, scale=s, bias=b, reduction="none", **kwargs)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_only_the_gradients_asked_for(backend, wanted):
    """A frozen side gets none, and the other side's gradient does not depend on which are asked."""
    inputs = [*features(3, 2, 4, 3), torch.tensor([1.5, 2.0], dtype=f64), torch.tensor([0.2, 0.1], dtype=f64)]
    y = torch.tensor([0, 3, 1])

    def loss(x, t, s, b):
        return evidential_cross_entropy(x, t, y, scale=s, bias=b, backend=backend)

    every = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(*every), every)[wanted]
    inputs[wanted].requires_grad_()
    loss(*inputs).backward()
    torch.testing.assert_close(inputs[wanted].grad, expected)
    assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("operation", ["opinion", "loss"])
@pytest.mark.parametrize("rule", ["dempster", "weighted"])
@pytest.mark.parametrize("wanted", ["image", "scale"])
def test_second_derivatives_are_right_or_refused(operation, rule, wanted):
    """Reference has them; blocked, whose backward pass autograd cannot see into, must not make some up."""
    image, text = features(3, 2, 4, 3)
    leaves = {"image": image, "scale": torch.tensor([1.5, 2.0], dtype=f64)}

    def function(x, backend):
        mine = leaves | {wanted: x}
        kwargs = {"scale": mine["scale"], "rule": rule, "backend": backend}
        if operation == "opinion":
            return fused_opinion(mine["image"], text, **kwargs).log_ratio.square().sum()
        return evidential_cross_entropy(mine["image"], text, torch.tensor([0, 3, 1]), **kwargs)

    x = leaves[wanted].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: function(x, "reference"), x)
    with pytest.raises(NotImplementedError, match="'blocked' has no second derivatives.*backend='reference'"):
        torch.autograd.grad(function(x, "blocked"), x, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    image, text = features(3, 2, 4, 3)
    y = torch.tensor([0, 3, 1])

    def loss(t):
        return evidential_cross_entropy(image, t, y, scale=2.0, backend="blocked")

    once, again = text.clone().requires_grad_(), text.clone().requires_grad_()
    loss(once).backward()
    checkpoint(loss, again, use_reentrant=use_reentrant).backward()
    assert torch.equal(once.grad, again.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_deterministic(backend):
    image, text = features(9, 3, 7, 5, dtype=torch.float32)
    y = torch.arange(9) % 7
    runs = [
        results_and_gradients(
            lambda x, t: [evidential_cross_entropy(x, t, y, scale=50.0, backend=backend)], (image, text)
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Extremes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("M, K", [(1, 1), (8, 1), (1, 6), (8, 6)])
def test_finite_at_scale_100_and_without_evidence(backend, dtype, rule, form, M, K):
    """CLIP's scale on identical features (evidence 1e43 per prompt, 1e300 fused), and relu logits below 0."""
    text = F.normalize(features(1, 1, K, 8, dtype=dtype)[1], dim=-1).expand(M, K, 8).contiguous()
    image = text[0].clone()
    y = torch.arange(K)
    for activation, scale, bias in (
        ("exp", 100.0, 0.0),
        ("exp", 100.0, -300.0),
        ("relu", 100.0, -200.0),
        ("relu", 0.0, 0.0),
        ("softplus", 100.0, -1000.0),
        ("softplus", 100.0, 0.0),
    ):
        s = torch.full((M,), scale, dtype=dtype)
        b = torch.full((M,), bias, dtype=dtype)
        kwargs = {"activation": activation, "rule": rule, "backend": backend}

        def function(x, t, s, b, kwargs=kwargs):
            opinion = fused_opinion(x, t, scale=s, bias=b, **kwargs)
            loss = evidential_cross_entropy(
                x, t, y, scale=s, bias=b, form=form, kl_weight=1.0, reduction="none", **kwargs
            )
            derived = [opinion.belief, opinion.prob, opinion.uncertainty, opinion.evidence.clamp(max=1e3)]
            return [*opinion_parts(opinion), *derived, loss]

        for value in results_and_gradients(function, (image, text, s, b)):
            assert value.isfinite().all()
        opinion = fused_opinion(image, text, scale=s, bias=b, **kwargs)
        total = opinion.belief.sum(-1) + opinion.uncertainty
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_confident_loss_keeps_its_digits_in_float32(backend, form):
    """p = 0.999999 on the target: loss and the gradient of bias against float64, relative error 1e-4."""
    K = 20
    text = torch.eye(K).unsqueeze(0)
    image, y = torch.eye(K), torch.arange(K)
    answers = []
    for dtype, b in ((f64, "reference"), (torch.float32, backend)):
        scale = torch.tensor([float(torch.log(torch.tensor(2e7)))], dtype=dtype, requires_grad=True)
        loss = evidential_cross_entropy(
            image.to(dtype), text.to(dtype), y, scale=scale, form=form, fused_weight=0.0, backend=b
        )
        answers.append((loss, *torch.autograd.grad(loss, scale)))
    for exact, got in zip(*answers, strict=True):
        assert 1e-13 < exact.abs() < 1e-4
        assert abs(got.double() / exact - 1).max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_features_stay_finite(backend):
    image, text = torch.zeros(2, 4), torch.zeros(3, 5, 4)
    y = torch.tensor([0, 1])
    function = lambda x, t: [evidential_cross_entropy(x, t, y, scale=10.0, backend=backend)]  # noqa: E731
    assert all(v.isfinite().all() for v in results_and_gradients(function, (image, text)))
    torch.testing.assert_close(fused_opinion(image, text, scale=10.0, backend=backend).prob, torch.full((2, 5), 0.2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_prompt", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_empty_batch(backend, per_prompt, rule):
    image, text = features(0, 3, 5, 4, per_prompt=per_prompt)
    kwargs = {"scale": 2.0, "rule": rule, "backend": backend}
    opinion = fused_opinion(image, text, **kwargs)
    assert opinion.log_ratio.shape == opinion.prob.shape == (0, 5)
    assert opinion.uncertainty.shape == (0,) and opinion.prompt_uncertainty.shape == (0, 3)
    top = fused_topk(image, text, 2, **kwargs)
    assert top.classes.shape == top.prob.shape == (0, 2) and top.classes.dtype == torch.long
    text.requires_grad_()
    y = torch.zeros(0, dtype=torch.long)
    loss = evidential_cross_entropy(image, text, y, reduction="sum", **kwargs)
    loss.backward()
    assert loss == 0 and (text.grad == 0).all()
    assert evidential_cross_entropy(image, text, y, reduction="none", **kwargs).shape == (0,)
    with pytest.raises(ValueError, match="reduction.*B = 0"):
        evidential_cross_entropy(image, text, y, **kwargs)


# Dtypes, modes, backends


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_float32_opinions(backend, dtype):
    image, text = features(4, 2, 5, 8, dtype=dtype)
    y = torch.arange(4)
    opinion = fused_opinion(image, text, scale=50.0, backend=backend)
    assert opinion.prob.dtype == torch.float32
    expected = fused_opinion(image.float(), text.float(), scale=50.0, backend="reference")
    torch.testing.assert_close(opinion.prob, expected.prob)
    image.requires_grad_(), text.requires_grad_()
    evidential_cross_entropy(image, text, y, scale=50.0, backend=backend).backward()
    assert image.grad.dtype == text.grad.dtype == dtype and text.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    """Logits of 100 in bfloat16 would be off by half a unit; evidence arithmetic stays in float32."""
    image, text = features(4, 2, 5, 8, dtype=torch.float32)
    y = torch.arange(4)
    scale = torch.tensor(100.0, requires_grad=True)
    plain = evidential_cross_entropy(image, text, y, scale=scale, backend=backend)
    (g_plain,) = torch.autograd.grad(plain, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = evidential_cross_entropy(image, text, y, scale=scale, backend=backend)
        (g_cast,) = torch.autograd.grad(cast, scale)
    assert torch.equal(plain, cast) and torch.equal(g_plain, g_cast)


def test_mixed_precision_inputs_are_promoted():
    image, text = features(4, 2, 5, 8)
    opinion = fused_opinion(image.float(), text, scale=3.0)
    assert opinion.prob.dtype == f64
    torch.testing.assert_close(opinion.prob, fused_opinion(image.float().double(), text, scale=3.0).prob)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("which", ["image", "text"])
def test_one_input_in_float64_is_enough_for_its_digits(backend, lower, which):
    x, t = torch.randn(5, 16, dtype=f64), torch.randn(3, 7, 16, dtype=f64)
    x, t = (x.to(lower), t) if which == "image" else (x, t.to(lower))
    mine = fused_opinion(x, t, scale=100.0, backend=backend).log_ratio
    right = fused_opinion(x.double(), t.double(), scale=100.0, backend="reference").log_ratio
    torch.testing.assert_close(mine, right, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("changed", ["image", "text", "scale", "target"])
def test_an_input_changed_before_its_gradient_is_noticed(changed):
    given = {"image": torch.randn(5, 16), "text": torch.randn(3, 7, 16), "scale": torch.full((3,), 20.0)}
    given = {name: x.requires_grad_() for name, x in given.items()} | {"target": torch.tensor([0, 1, 2, 3, 4])}
    loss = evidential_cross_entropy(**given, normalize=False, backend="blocked")
    with torch.no_grad():
        given[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_call_leaves_a_trace_in_the_next(monkeypatch):
    """Memory that calls hand on keeps whole cache lines, on which the last bits of a product depend."""
    starts = []
    take = blocks.Blocks._take
    monkeypatch.setattr(blocks.Blocks, "_take", lambda self, n: starts.append((x := take(self, n)).data_ptr()) or x)
    blocks._idle.clear()
    x, t, y = torch.randn(3, 64), torch.randn(3, 64, 37).transpose(1, 2).requires_grad_(), torch.tensor([0, 1, 2])

    def step():
        return torch.autograd.grad(
            evidential_cross_entropy(x, t, y, scale=100.0, rule="weighted", backend="blocked"), t
        )

    (before,) = step()
    fused_opinion(torch.randn(64, 16), torch.randn(4, 300, 16), scale=10.0, backend="blocked")
    (after,) = step()
    assert torch.equal(before, after)
    assert len(starts) > 4 and not any(start % 64 for start in starts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    image, text = features(4, 2, 5, 8)
    with torch.inference_mode():
        got = fused_opinion(image, text, scale=3.0, backend=backend).prob
    torch.testing.assert_close(got, fused_opinion(image, text, scale=3.0, backend=backend).prob)


def test_calls_may_follow_each_other_in_any_mode():
    """The block of logits that is kept between calls serves inference, training and threads alike."""
    image, text = features(4, 2, 5, 8)
    y = torch.arange(4)

    def train(_=None):
        t = text.clone().requires_grad_()
        return torch.autograd.grad(evidential_cross_entropy(image, t, y, scale=3.0, backend="blocked"), t)[0]

    expected = train()
    blocks._idle.clear()
    with torch.inference_mode():
        fused_opinion(image, text, scale=3.0, backend="blocked")
    assert torch.equal(train(), expected)
    fused_opinion(image.float(), text.float(), scale=3.0, backend="blocked")
    assert torch.equal(train(), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(g, expected) for g in pool.map(train, range(40)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_bias_as_numbers_scalars_or_one_for_each_prompt(backend):
    image, text = features(4, 3, 5, 8)
    forms = [
        (2.0, 0.5),
        (2, torch.tensor(0.5)),
        (torch.tensor(2.0), torch.tensor([0.5])),
        (torch.full((3,), 2.0), torch.full((3,), 0.5, dtype=f64)),
    ]
    probs = [fused_opinion(image, text, scale=s, bias=b, backend=backend).prob for s, b in forms]
    assert all(torch.equal(probs[0], p) for p in probs[1:])


def test_backend_none_is_blocked_and_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    image, text = features(4, 3, 5, 8, dtype=torch.float32)
    default = fused_opinion(image, text, scale=20.0).log_ratio
    assert torch.equal(default, fused_opinion(image, text, scale=20.0, backend="blocked").log_ratio)
    with pytest.raises(BackendUnavailableError, match="triton.*cannot run here"):
        fused_opinion(image, text, scale=20.0, backend="triton")


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiles_without_a_graph_break(backend):
    image, text = features(4, 3, 5, 8, dtype=torch.float32)
    y = torch.arange(4)

    def step(x, t, s):
        opinion = fused_opinion(x, t, scale=s, backend=backend)
        loss = evidential_cross_entropy(x, t, y, scale=s, kl_weight=0.1, backend=backend)
        return opinion.prob, opinion.conflict, opinion.opinion().mutual_information(), loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = results_and_gradients(step, (image, text, torch.tensor(5.0)))
    got = results_and_gradients(compiled, (image, text, torch.tensor(5.0)))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Recorder:
    """What a function of a module returns, call for call."""

    def __init__(self, monkeypatch, module, name):
        self.results, self._function = [], getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *given):
        self.results.append(self._function(*given))
        return self.results[-1]


@pytest.fixture
def linear_sums(monkeypatch):
    """What block_sums.linear_sums returned, call for call."""
    return Recorder(monkeypatch, block_sums, "linear_sums").results


SIZES = [(0, 2, 5), (5, 1, 7), (5, 2, 7), (5, 3, 7), (7, 5, 4), (3, 4, 300)]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("B", "M", "K"), SIZES)
@pytest.mark.parametrize("bias", [None, "each"])
def test_the_linear_opinion_is_the_sweep_s_bit_by_bit(request, monkeypatch, linear_sums, small, B, M, K, bias):
    if small:
        request.getfixturevalue("small_blocks")
    image, text = features(B, M, K, 6, per_prompt=M == 3, dtype=torch.float32)
    kwargs = {"scale": torch.linspace(3, 20, M), "bias": bias and torch.linspace(-2, 1, M), "backend": "blocked"}
    linear = opinion_parts(fused_opinion(image, text, **kwargs))
    assert len(linear_sums) == 1 and linear_sums[0] is not None
    monkeypatch.setattr(block_sums, "linear_sums", lambda *given: None)
    swept = opinion_parts(fused_opinion(image, text, **kwargs))
    for a, b in zip(linear, swept, strict=True):
        assert torch.equal(a, b)


def features_at_a_cosine(B, M, K, cosine):
    """Text whose cosine with every image, nearly, is this, and falls to half of it from the first class to the last."""
    noise, text = features(B, M, K, 6, per_prompt=M == 3)
    first = torch.eye(6, dtype=f64)[0]
    across = F.normalize(text - (text @ first).unsqueeze(-1) * first, dim=-1)
    along = cosine * torch.linspace(1, 0.5, K, dtype=f64).unsqueeze(-1)
    return F.normalize(first + 0.01 * noise, dim=-1), along * first + (1 - along**2).sqrt() * across


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("B", "M", "K"), SIZES)
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.3, 0.42, 0.6, 0.99])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_linear_opinion_at_clip_s_scale(request, linear_sums, small, B, M, K, cosine, normalize):
    """Where a product over prompts would overflow it begins anew; where a prompt's evidence would, the sweep has it."""
    if small:
        request.getfixturevalue("small_blocks")
    image, text = features_at_a_cosine(B, M, K, cosine)

    def run(dtype, backend):
        kwargs = {"scale": 100.0, "normalize": normalize, "backend": backend}
        return opinion_parts(fused_opinion(image.to(dtype), text.to(dtype), **kwargs))

    truth, plain, linear = run(f64, "reference"), run(torch.float32, "reference"), run(torch.float32, "blocked")
    if B:
        assert (linear_sums[0] is None) == (cosine == 0.99)
        assert (truth[1].max() > 88) == (M * cosine > 0.9)  # e^88 is about the largest float32
    for exact, a, b in zip(truth, plain, linear, strict=True):
        assert a.shape == b.shape == exact.shape
        if B:
            assert (b - exact).abs().max() <= 2 * (a - exact).abs().max() + 2e-7 * exact.abs().max()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("B", "M", "K"), [(5, 1, 1), *SIZES[1:]])
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.3, 0.59, 0.68, 0.99])
@pytest.mark.parametrize("fused_weight", [0.0, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_and_its_gradients_in_linear_space(
    request, monkeypatch, small, B, M, K, cosine, fused_weight, reduction
):
    """Until evidence nears e^60, which the row sums tell, they are made of it, and as exact as of logarithms.

    In one pass if the loss is reduced, in two if not.
    """
    if small:
        request.getfixturevalue("small_blocks")
    image, text = features_at_a_cosine(B, M, K, cosine)
    target = torch.arange(B) % K
    at_once = Recorder(monkeypatch, blocked, "loss_and_gradients")
    bounds = Recorder(monkeypatch, block_slopes, "linear_bounds")

    def run(dtype, backend="blocked"):
        inputs = [x.to(dtype).requires_grad_() for x in (image, text, torch.full((M,), 100.0), torch.zeros(M))]
        x, t, s, b = inputs
        kwargs = {"scale": s, "bias": b, "fused_weight": fused_weight, "reduction": reduction, "backend": backend}
        loss = evidential_cross_entropy(x, t, target, **kwargs).mean()
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    truth = run(f64, "reference")
    for exact, a in zip(truth, run(f64), strict=True):
        torch.testing.assert_close(a, exact, rtol=1e-9, atol=1e-11)
    linear = run(torch.float32)
    used = at_once if reduction == "mean" else bounds
    assert len(used.results) == 2 and {result is None for result in used.results} == {cosine > 0.6}
    assert len(bounds.results) == (0 if reduction == "mean" and cosine < 0.6 else 2)
    monkeypatch.setattr(blocked, "loss_and_gradients", lambda *given: None)
    monkeypatch.setattr(block_slopes, "linear_bounds", lambda *given: None)
    for exact, a, b in zip(truth, run(torch.float32), linear, strict=True):
        rounding = 5e-6 * exact.abs().max().clamp_min(1)  # of a row sum's logarithm near 60
        assert (b - exact).abs().max() <= 2 * (a - exact).abs().max() + rounding


@pytest.mark.parametrize(("B", "M", "K"), SIZES[1:])
@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("weights", [{}, {"fused_weight": 0.0}, {"prompt_weight": 0.0}])
def test_linear_space_and_logarithms_give_the_same_gradients(small_blocks, monkeypatch, B, M, K, scale, weights):
    image, text = (x.requires_grad_() for x in features(B, M, K, 6, per_prompt=M == 3))
    target = torch.arange(B) % K

    def gradients():
        opinion = fused_opinion(image, text, scale=scale, backend="blocked")
        loss = evidential_cross_entropy(image, text, target, scale=scale, backend="blocked", **weights)
        total = loss + opinion.prob.square().sum() + opinion.prompt_log_partition.sum()
        return torch.autograd.grad(total, (image, text))

    linear = gradients()
    calls = []
    for module in (block_loss, block_sums, block_slopes):
        monkeypatch.setattr(module, "linear_space", lambda *given: bool(calls.append(1)))
    for a, b in zip(linear, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(calls) == 5  # once for both passes of the loss, twice forward, twice backward


@pytest.mark.parametrize("form", ["digamma", "log"])
@pytest.mark.parametrize("weights", [{}, {"fused_weight": 0.0}, {"prompt_weight": 0.0}, {"fused_weight": 0.3}])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("B", "M", "K"), [(5, 1, 1), *SIZES[1:]])
def test_one_pass_and_two_give_the_same(small_blocks, monkeypatch, form, weights, normalize, B, M, K):
    image, text = features(B, M, K, 6, per_prompt=M == 3)
    inputs = [x.requires_grad_() for x in (image, text, torch.linspace(3, 5, M, dtype=f64), torch.ones(M, dtype=f64))]
    x, t, s, b = inputs
    at_once = Recorder(monkeypatch, blocked, "loss_and_gradients")

    def run(reduction):
        kwargs = {"form": form, "normalize": normalize, "reduction": reduction, **weights}
        loss = evidential_cross_entropy(x, t, torch.arange(B) % K, scale=s, bias=b, backend="blocked", **kwargs)
        loss = loss.sum() if reduction == "none" else loss * (B if reduction == "mean" else 1)
        return loss, *torch.autograd.grad(loss, inputs)

    twice, *others = (run(reduction) for reduction in ("none", "mean", "sum"))
    assert [made is None for made in at_once.results] == [True, False, False]
    for once in others:
        for a, b in zip(once, twice, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=4)])
@pytest.mark.parametrize("scale", [7.0, 0.0])
def test_one_pass_makes_the_gradients_that_are_wanted(wanted, scale):
    """That of the scale follows from that of text, unless text has none, or is multiplied by 0."""
    image, text = features(5, 3, 7, 6)
    inputs = image, text, torch.full((3,), scale, dtype=f64), torch.full((3,), 0.5, dtype=f64)

    def run(backend):
        x, t, s, b = (v.clone().requires_grad_(want) for v, want in zip(inputs, wanted, strict=True))
        loss = evidential_cross_entropy(x, t, torch.arange(5), scale=s, bias=b, backend=backend)
        return torch.autograd.grad(loss, [v for v in (x, t, s, b) if v.requires_grad]) if any(wanted) else [loss]

    for a, b in zip(run("blocked"), run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_made_with_the_loss_are_nobody_else_s():
    """What comes from above multiplies them; and a graph that is kept gives the same again, whatever became of them."""
    image, text = (x.requires_grad_() for x in features(5, 3, 7, 6))
    loss = evidential_cross_entropy(image, text, torch.arange(5), scale=7.0, backend="blocked")
    first = torch.autograd.grad(loss, (image, text), retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    again = torch.autograd.grad(3 * loss, (image, text), retain_graph=True)
    nothing = torch.autograd.grad(0 * loss, (image, text))
    for g, h, zero in zip(expected, again, nothing, strict=True):
        torch.testing.assert_close(h, 3 * g, rtol=1e-12, atol=0)
        assert not zero.any()


def test_no_memory_larger_than_the_floor_outlives_a_call():
    """Not even behind a view."""
    blocks._idle.clear()
    image, text = torch.randn(256, 8), torch.randn(20, 1000, 8, requires_grad=True)
    target = torch.arange(256)
    for _ in range(2):
        evidential_cross_entropy(image, text, target, scale=20.0, backend="blocked").backward()
        assert all(x.untyped_storage().nbytes() <= 4 * blocks.FLOOR for x in blocks._idle.values())
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda t: evidential_cross_entropy(image, t, target, scale=20.0, backend="blocked"))(text)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in blocks._idle.values())


def test_a_loss_nobody_follows_back_takes_its_gradients_with_it(monkeypatch):
    image, text = (x.requires_grad_() for x in features(5, 3, 7, 6))
    at_once = Recorder(monkeypatch, blocked, "loss_and_gradients")
    loss = evidential_cross_entropy(image, text, torch.arange(5), scale=7.0, backend="blocked")
    ((_, gradients),) = at_once.results
    alive = [weakref.ref(g) for g in gradients if g is not None]
    assert len(alive) == 2
    at_once.results.clear()
    del loss, gradients, _
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [20.0, 100.0, 200.0])
@pytest.mark.parametrize("small", [False, True])
def test_gradients_of_normalised_features_are_orthogonal_to_them(request, backend, scale, small):
    """Their lengths change nothing, so no gradient points along them."""
    if small:
        request.getfixturevalue("small_blocks")
    image, text = features(40, 3, 70, 16, dtype=torch.float32)
    inputs = image.requires_grad_(), text.requires_grad_()
    loss = evidential_cross_entropy(*inputs, torch.arange(40), scale=scale, backend=backend)
    for x, g in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
        lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(g, dim=-1)
        assert (torch.linalg.vecdot(x, g).abs() <= 1e-5 * lengths + 1e-6 * lengths.max()).all()
        assert lengths.max() > 1e-4


@pytest.mark.parametrize("per_prompt", [False, True])
def test_gradients_of_features_shorter_than_the_floor(per_prompt):
    """Such features are divided by the floor, a constant: their gradients do point along them."""
    image, text = features(5, 3, 7, 6, per_prompt=per_prompt)
    text[:, ::2] *= 1e-14
    image[1] *= 1e-14

    def loss(x, t, backend):
        return [evidential_cross_entropy(x, t, torch.arange(5), scale=20.0, backend=backend)]

    expected = results_and_gradients(lambda *f: loss(*f, "reference"), (image, text))
    got = results_and_gradients(lambda *f: loss(*f, "blocked"), (image, text))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
    for x, g in zip((image, text), expected[1:], strict=True):
        cosine = F.cosine_similarity(x.flatten(0, -2), g.flatten(0, -2), dim=-1, eps=0).abs()
        short = torch.linalg.vector_norm(x, dim=-1).flatten() < 1e-12
        assert cosine[short].max() > 0.01 and cosine[~short].max() < 1e-6
