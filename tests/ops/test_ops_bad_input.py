"""Bad input: every refusal names the argument, what came and what was expected."""

import math
import re

import pytest
import torch

import cdc_ops
from cdc_ops import (
    ConsistencyLoss,
    DecouplingLoss,
    EvidenceFusion,
    EvidenceHead,
    EvidentialLoss,
    FrontDoorAggregator,
    Opinion,
    evidential_cross_entropy,
    fused_opinion,
    fused_topk,
)

B, M, K, D = 3, 2, 4, 5
nan, inf = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    """Tests of the kernels switch Triton's interpreter on for the whole process."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def image(*shape, **kwargs):
    return torch.ones(*(shape or (B, D)), **kwargs)


def text(*shape, **kwargs):
    return torch.ones(*(shape or (M, K, D)), **kwargs)


def spoiled(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


y = torch.tensor([0, 1, 3])
meta = torch.device("meta")

# Arguments shared by the three fused operations: (changed arguments, what the message must say)
SHARED = {
    "image is no tensor": ({"image": [[1.0]]}, r"image must be a floating-point tensor .*\[B, 5\].*got list"),
    "image is integer": ({"image": image(dtype=torch.long)}, r"image must be a floating-point.*got a int64"),
    "image is complex": ({"image": image(dtype=torch.cfloat)}, r"image must be a floating-point.*complex64"),
    "image has one dimension": ({"image": image(D)}, r"image must have shape \[B, 5\] or \[B, 2, 5\].*got.*\[5\]"),
    "image of another size": ({"image": image(B, 7)}, r"image must have shape \[B, 5\].*\[3, 7\]"),
    "image of another M": ({"image": image(B, 3, D)}, r"image must have shape.*\[B, 2, 5\].*\[3, 3, 5\]"),
    "image not finite": ({"image": spoiled(image(), nan)}, r"image must be finite; got 1 nan or inf"),
    "image elsewhere": ({"text": text(device=meta)}, r"text must be on the device of image, cpu; got .* on meta"),
    "text is no tensor": ({"text": None}, r"text must be a floating-point tensor .*\[M, K, D\].*got NoneType"),
    "text is integer": ({"text": text(dtype=torch.int32)}, r"text must be a floating-point.*int32"),
    "text without prompts dimension": ({"text": text(K, D)}, r"text must have shape \[M, K, D\].*unsqueeze\(0\)"),
    "no classes": ({"text": text(M, 0, D)}, r"text must have.*at least one prompt, class.*\[2, 0, 5\]"),
    "no prompts": ({"text": text(0, K, D)}, r"text must have.*at least one prompt.*\[0, 4, 5\]"),
    "no features": ({"text": text(M, K, 0), "image": image(B, 0)}, r"text must have.*feature.*\[2, 4, 0\]"),
    "text not finite": ({"text": spoiled(text(), inf)}, r"text must be finite; got 1 nan or inf"),
    "text is minus infinite": ({"text": spoiled(text(), -inf), "normalize": False}, r"text must be finite"),
    "scale is a word": ({"scale": "100"}, r"scale must be a number.*\[2\].*got '100'"),
    "scale is a flag": ({"scale": True}, r"scale must be a number.*got True"),
    "scale not finite": ({"scale": nan}, r"scale must be a number.*finite.*nan"),
    "scale tensor not finite": ({"scale": torch.tensor([1.0, inf])}, r"scale must be a number.*finite.*size of inf"),
    "scale tensor not a number": ({"scale": torch.tensor([nan, 1.0])}, r"scale must be a number.*finite.*size of nan"),
    "scale too large": ({"scale": 1e38}, r"scale must be a number.*within 2\^100; got 1e\+38"),
    "scale beyond float32": ({"scale": 1e300}, r"scale must be a number.*within 2\^100; got 1e\+300"),
    "scale beyond all floats": ({"scale": 10**400}, r"scale must be a number.*within 2\^100; got 1000"),
    "scale tensor too large": ({"scale": torch.tensor(-1e38)}, r"scale must be a number.*got a size of 1e\+38 in"),
    "bias too large": ({"bias": -1e38}, r"bias must be a number.*within 2\^100; got -1e\+38"),
    "image too long": ({"image": image() * 1e20}, r"image must have lengths within float32; got 3 whose.*overflows"),
    "text too long": ({"text": text() * 1e25}, r"text must have lengths within float32; got 8 whose length overflows"),
    "image too long to be taken as it is": (
        {"image": image() * 1e20, "normalize": False},
        r"image must have lengths within float32; got 3 whose.*overflows",
    ),
    "products too large": (
        {"image": image() * 1e16, "text": text() * 1e16, "normalize": False},
        r"image and text must have lengths whose product, times scale, is within 2\^100.*got 2.2.*e\+16 and 2.2.*e\+16",
    ),
    "products too large for the scale": (
        {"image": image() * 1e12, "text": text() * 1e12, "scale": 1e10, "normalize": False},
        r"image and text must have lengths whose product, times scale,.*a scale of 1e\+10",
    ),
    "scale of another M": ({"scale": torch.ones(3)}, r"scale must be.*shape \[2\].*got.*\[3\]"),
    "scale is integer tensor": ({"scale": torch.ones(2, dtype=torch.long)}, r"scale must be.*int64"),
    "bias of another M": ({"bias": torch.zeros(3)}, r"bias must be.*shape \[2\].*got.*\[3\]"),
    "bias elsewhere": ({"bias": torch.zeros(2, device=meta)}, r"bias must be on the device of image"),
    "scale elsewhere": ({"scale": torch.tensor(1.0, device=meta)}, r"scale must be on the device of image, cpu"),
    "image is sparse": ({"image": image().to_sparse()}, r"image must be dense.*got torch.sparse_coo in"),
    "text in 8 bits": ({"text": text().to(torch.float8_e4m3fn)}, r"text must be.*at least 16 bits.*float8_e4m3fn"),
    "prior weight beyond all floats": (
        {"prior_weight": 10**400},
        r"prior_weight must be a finite number > 0; got 1000",
    ),
    "prior weight huge": (
        {"prior_weight": 1e300},
        r"prior_weight must be.*between 2\^-100 and 2\^100; got 1e\+300",
    ),
    "prior weight tiny": ({"prior_weight": 1e-300}, r"prior_weight must be.*between 2\^-100 and 2\^100.*got 1e-300"),
    "prior weight elsewhere": ({"prior_weight": torch.ones((), device=meta)}, r"prior_weight must be.*on meta"),
    "unknown activation": (
        {"activation": "sigmoid"},
        r"activation must be one of 'exp', 'softplus', 'relu'.*'sigmoid'",
    ),
    "unknown rule": ({"rule": "yager"}, r"rule must be one of 'dempster', 'cumulative', 'averaging', 'weighted'"),
    "prior weight zero": ({"prior_weight": 0}, r"prior_weight must be a finite number > 0; got 0"),
    "prior weight negative": ({"prior_weight": -1.0}, r"prior_weight must be a finite number > 0; got -1"),
    "prior weight infinite": ({"prior_weight": inf}, r"prior_weight must be a finite number > 0; got inf"),
    "prior weight a word": ({"prior_weight": "K"}, r"prior_weight must be a finite number > 0; got 'K'"),
    "unknown backend": ({"backend": "cuda"}, r"backend must be one of 'reference', 'blocked', 'triton'; got 'cuda'"),
    "backend that cannot run": ({"backend": "triton"}, r"backend='triton' cannot run here"),
}


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("operation", ["fused_opinion", "fused_topk", "evidential_cross_entropy"])
def test_fused_operations(case, operation):
    changed, message = SHARED[case]
    arguments = {"image": image(), "text": text(), "scale": 1.0} | changed
    arguments |= {"fused_topk": {"k": 1}, "evidential_cross_entropy": {"target": y}}.get(operation, {})
    with pytest.raises(ValueError, match=message):
        getattr(cdc_ops, operation)(**arguments)


@pytest.mark.parametrize("k", [0, -1, K + 1, 1.0, True, None])
def test_k(k):
    with pytest.raises(ValueError, match=rf"k must be an integer from 1 to .* 4; got {k}"):
        cdc_ops.fused_topk(image(), text(), k, scale=1.0)


LOSS = {
    "target is no tensor": ({"target": [0, 1, 2]}, r"target must be an integer tensor of shape \[3\]"),
    "target is float": ({"target": y.float()}, r"target must be an integer tensor.*float32"),
    "target is a mask": ({"target": y > 0}, r"target must be an integer tensor.*bool"),
    "target of another B": ({"target": y[:2]}, r"target must have shape \[3\]; got.*\[2\]"),
    "target one-hot": ({"target": torch.zeros(B, K, dtype=torch.long)}, r"target must have shape \[3\]"),
    "target too large": (
        {"target": torch.tensor([0, 1, 4])},
        r"target must hold class indices in \[0, 4\); got.* 0 to 4",
    ),
    "target negative": ({"target": torch.tensor([0, -100, 1])}, r"target must hold.*from -100 to 1"),
    "target elsewhere": ({"target": y.to(meta)}, r"target must be on the device"),
    "unknown form": ({"form": "ce"}, r"form must be one of 'digamma', 'log', 'mse'; got 'ce'"),
    "unknown reduction": ({"reduction": "avg"}, r"reduction must be one of 'mean', 'sum', 'none'; got 'avg'"),
    "kl weight negative": ({"kl_weight": -0.1}, r"kl_weight must be a finite number >= 0; got -0.1"),
    "prompt weight not finite": ({"prompt_weight": nan}, r"prompt_weight must be a finite number >= 0"),
    "kl weight huge": ({"kl_weight": 1e300}, r"kl_weight must be a finite number >= 0, within 2\^100; got 1e\+300"),
    "fused weight a word": ({"fused_weight": "1"}, r"fused_weight must be a finite number >= 0; got '1'"),
}


@pytest.mark.parametrize("case", LOSS)
def test_evidential_cross_entropy(case):
    changed, message = LOSS[case]
    arguments = {"image": image(), "text": text(), "target": y, "scale": 1.0} | changed
    with pytest.raises(ValueError, match=message):
        cdc_ops.evidential_cross_entropy(**arguments)


e = torch.ones(M, K)
p_s, p_y = torch.full((B, 2), 0.5), torch.full((6, 2, 3), 1 / 3)
bank = {"bank_size": 4, "semantics": 2, "classes": 3}

OTHERS = {
    "logits integer": (lambda: cdc_ops.evidence_from_logits(y), r"logits must be a floating-point"),
    "logits not finite": (lambda: cdc_ops.evidence_from_logits(spoiled(e, nan)), r"logits must be finite"),
    "logits activation": (lambda: cdc_ops.evidence_from_logits(e, "tanh"), r"activation must be one of"),
    "opinion negative": (lambda: Opinion.from_evidence(-e), r"evidence must not be negative; got a minimum of -1"),
    "opinion not finite": (lambda: Opinion.from_evidence(spoiled(e, inf)), r"evidence must be finite"),
    "opinion no classes": (lambda: Opinion.from_evidence(e[:, :0]), r"evidence must have.*at least one class"),
    "opinion scalar": (lambda: Opinion.from_evidence(torch.tensor(1.0)), r"evidence must have.*at least one class"),
    "opinion prior weight": (lambda: Opinion.from_evidence(e, -2), r"prior_weight must be"),
    "opinion sparse": (lambda: Opinion.from_evidence(e.to_sparse()), r"evidence must be dense"),
    "opinion in 8 bits": (lambda: Opinion.from_evidence(e.to(torch.float8_e5m2)), r"evidence must be.*16 bits"),
    "fuse the classes": (lambda: cdc_ops.fuse_evidence(e, 1), r"dim must not be the last dimension"),
    "fuse the classes, counted back": (lambda: cdc_ops.fuse_evidence(e, -1), r"dim must not be the last"),
    "fuse out of range": (lambda: cdc_ops.fuse_evidence(e, 2), r"dim must be a dimension of evidence; got 2"),
    "fuse nothing": (lambda: cdc_ops.fuse_evidence(e[:0], 0), r"at least one opinion along dim 0"),
    "fuse unknown rule": (lambda: cdc_ops.fuse_evidence(e, 0, "mean"), r"rule must be one of"),
    "fuse log ratio": (lambda: cdc_ops.fuse_log_ratio(y.view(1, 3), 0), r"log_ratio must be a floating-point"),
    "fuse log ratio list": (lambda: cdc_ops.fuse_log_ratio([[1.0]], 0), r"log_ratio must be a floating-point.*list"),
    "fuse log ratio not finite": (lambda: cdc_ops.fuse_log_ratio(spoiled(e, nan), 0), r"log_ratio must be finite"),
    "fuse log ratio negative": (lambda: cdc_ops.fuse_log_ratio(-3 * e, 0), r"log_ratio must not be negative.*-3"),
    "fuse log ratio no classes": (lambda: cdc_ops.fuse_log_ratio(e[:, :0], 0), r"log_ratio must have.*one class"),
    "fuse log ratio dim": (lambda: cdc_ops.fuse_log_ratio(e, 2), r"dim must be a dimension of log_ratio; got 2"),
    "log ratio list": (lambda: Opinion.from_log_ratio([1.0]), r"log_ratio must be a floating-point.*list"),
    "log ratio not finite": (lambda: Opinion.from_log_ratio(spoiled(e, nan)), r"log_ratio must be finite"),
    "log ratio negative": (lambda: Opinion.from_log_ratio(-3 * e), r"log_ratio must not be negative.*-3"),
    "log ratio no classes": (lambda: Opinion.from_log_ratio(e[:, :0]), r"log_ratio must have.*at least one class"),
    "log ratio scalar": (lambda: Opinion.from_log_ratio(e[0, 0]), r"log_ratio must have.*at least one class"),
    "log ratio prior weight": (lambda: Opinion.from_log_ratio(e, 0), r"prior_weight must be"),
    "conflict dim": (lambda: cdc_ops.conflict(e, -1), r"dim must not be the last"),
    "discount above 1": (lambda: cdc_ops.discount(e, 1.5), r"reliability must lie in \[0, 1\]"),
    "discount below 0": (lambda: cdc_ops.discount(e, torch.tensor([0.5, -0.1])), r"reliability must lie in"),
    "discount shape": (lambda: cdc_ops.discount(e, torch.ones(3)), r"reliability must broadcast to \[2\]"),
    "discount would grow": (lambda: cdc_ops.discount(e, torch.ones(5, 2)), r"reliability must broadcast to"),
    "discount integer": (lambda: cdc_ops.discount(e, torch.ones(2).long()), r"reliability must be a floating"),
    "discount a word": (lambda: cdc_ops.discount(e, "half"), r"reliability must be a finite number"),
    "dirichlet target": (lambda: cdc_ops.dirichlet_cross_entropy(e, y), r"target must have shape \[2\]"),
    "dirichlet form": (lambda: cdc_ops.dirichlet_cross_entropy(e, y[:2], form="nll"), r"form must be one of"),
    "front-door semantics": (
        lambda: cdc_ops.frontdoor_adjust(p_s[:, :1], p_y),
        r"semantic_given_x must have shape \[B, 2\]",
    ),
    "front-door dimensions": (
        lambda: cdc_ops.frontdoor_adjust(p_s[0], p_y),
        r"semantic_given_x must have shape \[B, S\]",
    ),
    "front-door classes": (
        lambda: cdc_ops.frontdoor_adjust(p_s, p_y[0]),
        r"class_given_semantic_x must have shape \[N, S, K\]",
    ),
    "front-door empty": (lambda: cdc_ops.frontdoor_adjust(p_s, p_y[:0]), r"class_given_semantic_x.*without a zero"),
    "front-door negative": (lambda: cdc_ops.frontdoor_adjust(-p_s, p_y), r"semantic_given_x must not be negative"),
    "front-door not finite": (
        lambda: cdc_ops.frontdoor_adjust(p_s, spoiled(p_y, nan)),
        r"class_given_semantic_x must be finite",
    ),
    "front-door weight": (lambda: cdc_ops.frontdoor_adjust(p_s, p_y, torch.ones(5)), r"x_weight must have shape \[6\]"),
    "front-door zero": (
        lambda: cdc_ops.frontdoor_adjust(p_s, p_y, torch.zeros(6)),
        r"x_weight must have a positive sum",
    ),
    "front-door elsewhere": (
        lambda: cdc_ops.frontdoor_adjust(p_s, p_y.to(meta)),
        r"class_given_semantic_x must be on the device",
    ),
    "decoupling shape": (lambda: cdc_ops.decoupling_loss(e), r"text must have shape \[M, K, D\]"),
    "decoupling kind": (
        lambda: cdc_ops.decoupling_loss(text(), "l2"),
        r"kind must be one of 'cosine', 'cosine_squared'",
    ),
    "decoupling too long": (lambda: cdc_ops.decoupling_loss(text() * 1e25), r"text must have lengths within float32"),
    "consistency too long": (
        lambda: cdc_ops.consistency_loss(text(), text()[0] * 1e25),
        r"anchor must have lengths within float32",
    ),
    "consistency text too long": (
        lambda: cdc_ops.consistency_loss(text() * 1e25, text()[0]),
        r"text must have lengths within float32",
    ),
    "decoupling not finite": (lambda: cdc_ops.decoupling_loss(spoiled(text(), nan)), r"text must be finite"),
    "consistency anchor": (lambda: cdc_ops.consistency_loss(text(), image(K, 3)), r"anchor must have shape \[4, 5\]"),
    "consistency not finite": (
        lambda: cdc_ops.consistency_loss(text(), spoiled(image(K, D), inf)),
        r"anchor must be finite",
    ),
    "consistency elsewhere": (
        lambda: cdc_ops.consistency_loss(text(), image(K, D, device=meta)),
        r"anchor must be on the device of text",
    ),
    "consistency temperature": (
        lambda: cdc_ops.consistency_loss(text(), image(K, D), 0.0),
        r"temperature must be a finite number > 0",
    ),
    "head prompts": (lambda: EvidenceHead(0), r"prompts must be a positive integer; got 0"),
    "head scale": (lambda: EvidenceHead(2, scale=-1.0), r"scale must be > 0"),
    "head scales": (lambda: EvidenceHead(2, scale=[1.0, 2.0, 3.0]), r"scale must be.*\[2\].*\[3\]"),
    "head bias": (lambda: EvidenceHead(2, bias="low"), r"bias must be a number or 2 numbers; got 'low'"),
    "head scale beyond all floats": (lambda: EvidenceHead(2, scale=10**400), r"scale must be a number or 2 numbers"),
    "consistency tiny temperature": (lambda: ConsistencyLoss(1e-300), r"temperature must be.*2\^-100"),
    "head activation": (lambda: EvidenceHead(2, activation="gelu"), r"activation must be one of"),
    "head rule": (lambda: EvidenceHead(2, rule="max"), r"rule must be one of"),
    "head prior weight": (lambda: EvidenceHead(2, prior_weight=-1), r"prior_weight must be a finite number > 0; got"),
    "head backend": (lambda: EvidenceHead(2, backend="foo"), r"backend must be one of .* 'blocked', 'triton'"),
    "fusion dim": (lambda: EvidenceFusion(dim="1"), r"dim must be an integer; got '1'"),
    "fusion prior weight": (lambda: EvidenceFusion(prior_weight=0), r"prior_weight must be a finite number > 0"),
    "fusion backend": (lambda: EvidenceFusion(backend="blocked"), r"backend must be one of 'reference', 'triton'"),
    "loss kl weight": (lambda: EvidentialLoss(kl_weight=-1), r"kl_weight must be a finite number >= 0; got -1"),
    "loss prompt weight": (lambda: EvidentialLoss(prompt_weight=nan), r"prompt_weight must be a finite number >= 0"),
    "loss fused weight": (lambda: EvidentialLoss(fused_weight="1"), r"fused_weight must be a finite number >= 0"),
    "loss prior weight": (lambda: EvidentialLoss(prior_weight="K"), r"prior_weight must be a finite number > 0"),
    "loss backend": (lambda: EvidentialLoss(backend="cuda"), r"backend must be one of .* 'blocked', 'triton'"),
    "loss activation": (lambda: EvidentialLoss(activation="gelu"), r"activation must be one of"),
    "loss rule": (lambda: EvidentialLoss(rule="max"), r"rule must be one of"),
    "decoupling backend": (lambda: DecouplingLoss(backend="foo"), r"backend must be one of 'reference', 'triton'"),
    "fusion rule": (lambda: EvidenceFusion("max"), r"rule must be one of"),
    "loss form": (lambda: EvidentialLoss(form="ce"), r"form must be one of"),
    "loss reduction": (lambda: EvidentialLoss(reduction="avg"), r"reduction must be one of"),
    "decoupling module": (lambda: DecouplingLoss("l1"), r"kind must be one of"),
    "consistency module": (lambda: ConsistencyLoss(-1.0), r"temperature must be"),
    "aggregator marginal": (lambda: FrontDoorAggregator("all"), r"marginal must be one of 'batch', 'bank', 'self'"),
    "aggregator bank sizes": (
        lambda: FrontDoorAggregator("bank", bank_size=4),
        r"semantics must be a positive integer",
    ),
    "aggregator empty bank": (lambda: FrontDoorAggregator("bank", **bank)(p_s), r"bank must be filled by update"),
    "aggregator update shape": (
        lambda: FrontDoorAggregator("bank", **bank).update(p_s),
        r"class_given_semantic_x must have shape \[B, 2, 3\]",
    ),
    "aggregator update of no bank": (lambda: FrontDoorAggregator("self").update(p_y), r"update needs marginal 'bank'"),
    "aggregator batch without classes": (
        lambda: FrontDoorAggregator("batch")(p_s),
        r"class_given_semantic_x must be a tensor",
    ),
    "aggregator self semantics": (
        lambda: FrontDoorAggregator("self")(p_s[:, :1], p_y[:B]),
        r"semantic_given_x must have shape \[B, 2\] to match",
    ),
    "aggregator self dimensions": (
        lambda: FrontDoorAggregator("self")(p_s, p_y[0]),
        r"class_given_semantic_x must have shape \[B, S, K\]",
    ),
    "aggregator self elsewhere": (
        lambda: FrontDoorAggregator("self")(p_s, p_y[:B].to(meta)),
        r"class_given_semantic_x must be on the device of semantic_given_x, cpu",
    ),
    "aggregator self without classes": (
        lambda: FrontDoorAggregator("self")(p_s, p_y[:B, :, :0]),
        r"class_given_semantic_x must have shape \[B, S, K\] without a zero",
    ),
    "aggregator self negative": (
        lambda: FrontDoorAggregator("self")(-p_s, p_y[:B]),
        r"semantic_given_x must not be negative",
    ),
    "aggregator self shapes": (
        lambda: FrontDoorAggregator("self")(p_s, p_y),
        r"class_given_semantic_x must have shape \[B, S, K\]",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_operations(case):
    call, message = OTHERS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_messages_are_one_sentence():
    for changed, _ in SHARED.values():
        with pytest.raises(ValueError) as error:
            cdc_ops.fused_opinion(**({"image": image(), "text": text(), "scale": 1.0} | changed))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_sum_that_overflows_is_not_taken_for_a_number_that_is_not_finite():
    assert cdc_ops.evidence_from_logits(torch.full((B, D), 3e38)).isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("activation", ["exp", "softplus", "relu"])
def test_the_largest_products_that_are_accepted_give_finite_results(backend, activation):
    x, t = torch.randn(B, D), torch.randn(M, K, D)
    x, t = (v * 0.999 * 2.0**49 / v.norm(dim=-1).max() for v in (x, t))
    t.requires_grad_()
    kwargs = {"scale": 4.0, "normalize": False, "activation": activation, "backend": backend}
    opinion = cdc_ops.fused_opinion(x, t, **kwargs)
    cdc_ops.evidential_cross_entropy(x, t, y, **kwargs).backward()
    assert opinion.prob.isfinite().all() and t.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_the_longest_features_and_largest_scale_that_are_accepted_count(backend):
    x, t = torch.randn(B, D), torch.randn(M, K, D)
    mine = cdc_ops.fused_opinion(x * 1e18, t * 1e18, scale=5.0, backend=backend).prob
    torch.testing.assert_close(mine, cdc_ops.fused_opinion(x, t, scale=5.0, backend=backend).prob)
    long = x.double() * 1e100
    torch.testing.assert_close(cdc_ops.fused_opinion(long, t, scale=5.0, backend=backend).prob.float(), mine)
    for form in ("digamma", "log", "mse"):
        scale = torch.tensor(2.0**100, requires_grad=True)
        loss = cdc_ops.evidential_cross_entropy(x, t, y, scale=scale, form=form, kl_weight=1.0, backend=backend)
        loss.backward()
        assert loss.isfinite() and scale.grad.isfinite()


def test_value_checks_can_be_switched_off_and_come_back():
    bad = spoiled(image(), nan)
    with cdc_ops.value_checks(False):
        assert cdc_ops.fused_opinion(bad, text(), scale=1.0).prob.isnan().any()
        with pytest.raises(ValueError, match="image must have shape"):
            cdc_ops.fused_opinion(image(B, 7), text(), scale=1.0)
    with pytest.raises(ValueError, match="image must be finite"):
        cdc_ops.fused_opinion(bad, text(), scale=1.0)
    cdc_ops.value_checks(False)
    assert math.isnan(float(cdc_ops.evidence_from_logits(torch.tensor(nan))))
    cdc_ops.value_checks(True)
    with pytest.raises(ValueError, match=re.escape("logits must be finite")):
        cdc_ops.evidence_from_logits(torch.tensor(nan))


# -- an accelerator is waited for once


@pytest.fixture
def waits(monkeypatch):
    """How often the host reads a tensor's values, for which an accelerator would have to be waited for."""
    monkeypatch.setattr(cdc_ops.checks, "_is_waited_for", lambda device: True)
    read = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        ours = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, *a, _ours=ours, _name=name: read.append(_name) or _ours(x, *a)
        )
    return read


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("operation", ["opinion", "topk", "loss"])
def test_all_values_are_read_at_once(waits, operation, normalize):
    image, text, scale, bias = torch.randn(4, 8), torch.randn(2, 5, 8), torch.ones(2), torch.zeros(2)
    kwargs = {"scale": scale, "bias": bias, "normalize": normalize, "backend": "reference"}
    call = {
        "opinion": lambda: fused_opinion(image, text, **kwargs),
        "topk": lambda: fused_topk(image, text, 2, **kwargs),
        "loss": lambda: evidential_cross_entropy(image, text, torch.arange(4), **kwargs),
    }[operation]
    call()
    assert waits == ["tolist"]
    waits.clear()
    with cdc_ops.value_checks(False):
        call()
    assert not waits


def test_of_several_wrong_values_the_first_argument_is_named():
    image, text, target = torch.randn(4, 8), torch.randn(2, 5, 8), torch.tensor([0, 1, 2, 9])
    with pytest.raises(ValueError, match="target must hold class indices in"):
        evidential_cross_entropy(image, text, target, scale=torch.ones(2))
    text[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="text must be finite"):
        evidential_cross_entropy(image, text, target, scale=torch.ones(2))
    with pytest.raises(ValueError, match="scale must be a number"):
        evidential_cross_entropy(image, text, target, scale=torch.tensor([1.0, math.inf]))
