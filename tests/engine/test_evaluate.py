"""Evaluation against torchmetrics, enumeration, and what the figures must obey."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from cdc_models import CDC, CoOp, MaPLe, ZeroShot, calibrate, evaluate, load_adapter, save_adapter
from cdc_models.engine import Features, extract_features
from cdc_models.engine.evaluate import area_under_risk_coverage

CLASSES = ["red", "green", "blue"]


@pytest.fixture
def unknown():
    return [(torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(4)), torch.zeros(9))]


@pytest.mark.parametrize("make", [ZeroShot, lambda b, c: CDC(b, c, depth=2)], ids=["zero-shot", "CDC"])
def test_figures_by_hand(make, backbone, coloured, unknown):
    model = make(backbone, CLASSES)
    images, targets = coloured
    ours = evaluate(model, [(images[:10], targets[:10]), (images[10:], targets[10:])], unknown=unknown, progress=False)
    said, strange = model.predict(images), model.predict(unknown[0][0])
    right = said.classes == targets
    assert ours.accuracy == pytest.approx(float(right.float().mean()))
    assert ours.ece == pytest.approx(float(multiclass_calibration_error(said.prob, targets, 3, n_bins=15)), abs=1e-6)
    by_class = (said.prob - torch.eye(3)[targets]) ** 2
    assert ours.brier == pytest.approx(float(by_class.sum(1).mean()), abs=1e-6)
    score = torch.cat([said.uncertainty, strange.uncertainty])
    is_unknown = torch.cat([torch.zeros(len(targets)), torch.ones(9)]).long()
    assert ours.unknown_auroc == pytest.approx(float(binary_auroc(score, is_unknown)), abs=1e-6)
    doubt = torch.cat([1 - said.prob.amax(1), 1 - strange.prob.amax(1)])
    assert ours.unknown_auroc_prob == pytest.approx(float(binary_auroc(doubt, is_unknown)), abs=1e-3)
    assert ours.uncertainty_wrong == pytest.approx(float(said.uncertainty[~right].mean()), abs=1e-6)
    assert ours.count == 24 and set(ours.numbers()).isdisjoint({"prob", "targets", "uncertainty"})


def test_features_stand_for_their_loader(backbone, coloured, unknown):
    model = MaPLe(backbone, CLASSES, depth=2)
    direct = evaluate(model, [coloured], unknown=unknown, progress=False)
    read = [extract_features(model, x, progress=False) for x in ([coloured], unknown)]
    assert evaluate(model, read[0], unknown=read[1]).numbers() | {"seconds": 0} == direct.numbers() | {"seconds": 0}


@pytest.mark.parametrize("part", [(0, 2), (1, 2)])
def test_a_share_of_the_images_is_not_taken_for_all(part, backbone):
    class Share(list):
        pass

    loader = Share([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))])
    loader.part = part
    with pytest.raises(ValueError, match="expected one of everything or of part"):
        evaluate(ZeroShot(backbone, CLASSES), loader, progress=False)


def test_a_probability_above_one_by_rounding_does_not_pass_for_a_logit(backbone, coloured, monkeypatch):
    model = ZeroShot(backbone, CLASSES)
    certain = torch.zeros(24, 3)
    certain[:, 0] = 1 + 2**-22
    said = model.predict(coloured[0])
    monkeypatch.setattr(model, "predict_features", lambda *_: replace(said, prob=certain))
    result = evaluate(model, [coloured], progress=False)
    assert result.ece == pytest.approx(1 - result.accuracy, abs=1e-6)
    assert float(result.prob.max()) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, width=16), st.booleans()), min_size=1, max_size=40))
def test_aurc_obeys_its_laws(pairs):
    uncertainty = torch.tensor([u for u, _ in pairs])
    correct = torch.tensor([c for _, c in pairs])
    value = area_under_risk_coverage(uncertainty, correct)
    assert 0 <= value <= 1
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    assert area_under_risk_coverage(uncertainty[order], correct[order]) == pytest.approx(value, abs=1e-12)
    best = area_under_risk_coverage((~correct).double() + uncertainty.double() / 2, correct)
    worst = area_under_risk_coverage(correct.double() + uncertainty.double() / 2, correct)
    assert best - 1e-12 <= value <= worst + 1e-12


def test_aurc_of_one_opinion_for_all_is_the_error():
    assert area_under_risk_coverage(torch.zeros(8), torch.arange(8) < 6) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "make",
    [ZeroShot, CoOp, lambda b, c: CDC(b, c, depth=2), lambda b, c: CDC(b, c, depth=2, trusted=False)],
    ids=["zero-shot", "CoOp", "CDC", "CDC untrusted"],
)
def test_calibration_lowers_the_likelihood_loss_and_keeps_the_prompts(make, backbone, coloured):
    model = make(backbone, CLASSES)
    images, targets = coloured

    def nll():
        return float(-model.predict(images).prob.gather(1, targets[:, None]).log().mean())

    before, prompts = nll(), {n: p.detach().clone() for n, p in model.learned_parameters().items() if "head" not in n}
    reported = calibrate(model, [coloured])
    assert nll() <= before + 1e-6
    assert reported == pytest.approx(nll(), rel=1e-3, abs=1e-4)
    assert all(torch.equal(model.learned_parameters()[n], p) for n, p in prompts.items())


def test_softmax_calibration_keeps_the_answers(backbone, coloured):
    model = ZeroShot(backbone, CLASSES)
    before = model.predict(coloured[0]).classes
    calibrate(model, [coloured])
    assert torch.equal(model.predict(coloured[0]).classes, before) and float(model.temperature) != 1.0


@pytest.mark.parametrize("trusted", [True, False])
def test_without_an_evidence_head_there_is_a_temperature_to_fit(trusted, backbone, coloured, tmp_path):
    images, targets = coloured
    model = CDC(backbone, CLASSES, depth=2, evidence_head=False, trusted=trusted)

    def nll():
        return float(-model.predict(images).prob[range(len(targets)), targets].log().mean())

    before = nll()
    prompts = {n: p.detach().clone() for n, p in model.learned_parameters().items()}
    scale = model.head.scale.clone()
    assert calibrate(model, [coloured]) == pytest.approx(nll(), rel=1e-3) and nll() < before - 0.1
    ratio = model.head.scale / scale
    assert torch.allclose(ratio, ratio[:1].expand(4)) and abs(float(ratio[0]) - 1) > 0.1
    assert not model.head.bias.any()
    assert all(torch.equal(p, prompts[n]) for n, p in model.learned_parameters().items())
    again = load_adapter(save_adapter(model, tmp_path / "a.safetensors"), backbone)
    assert torch.equal(again.predict(images).prob, model.predict(images).prob)


@pytest.mark.parametrize("method", [ZeroShot, CDC])
def test_what_calibration_shares_with_other_classes(method, backbone, coloured):
    """As the docstring of calibrate says: copies with other classes are calibrated too, deep copies are not."""
    model = method(backbone, CLASSES)
    apart, before = copy.deepcopy(model), model.predict(coloured[0]).prob
    calibrate(model.with_classes([*CLASSES, "spoon"]), [coloured])
    assert not torch.equal(model.predict(coloured[0]).prob, before)
    assert torch.equal(apart.predict(coloured[0]).prob, before)


def test_bad_loaders(backbone, coloured):
    model = ZeroShot(backbone, CLASSES)
    with pytest.raises(ValueError, match="loader.*got none"):
        evaluate(model, [], progress=False)
    with pytest.raises(ValueError, match="loader.*got none"):
        calibrate(model, [])
    with pytest.raises(ValueError, match=r"targets.*\[0, 3\).*5"):
        evaluate(model, [(coloured[0], coloured[1] + 3)], progress=False)


METHODS = {
    "zero-shot": lambda b: ZeroShot(b, CLASSES, ["a photo of a {}.", "{}."]),
    "CoOp": lambda b: CoOp(b, CLASSES),
    "MaPLe": lambda b: MaPLe(b, CLASSES, depth=2),
    "CDC": lambda b: CDC(b, CLASSES, image_prompts=False),
    "CDC untrusted": lambda b: CDC(b, CLASSES, image_prompts=False, trusted=False),
}
TARGETS = torch.tensor([0, 1, 2, 0])
BAD_FEATURES = {
    "none": (Features(torch.empty(0, 16), torch.empty(0).long()), "loader: expected features of at least one"),
    "size": (Features(torch.ones(4, 8), TARGETS), r"image: expected features \[B, 16\].*\[4, 8\]"),
    "templates": (Features(torch.ones(4, 5, 16), TARGETS), r"image must have shape \[B, 16\].*\[4, 5, 16\]"),
    "one dimension": (Features(torch.ones(16), TARGETS), r"image: expected features \[B, 16\].*\[16\]"),
    "integers": (Features(torch.ones(4, 16).int(), TARGETS), "image must be a floating-point tensor.*int32"),
    "nan": (Features(torch.full((4, 16), torch.nan), TARGETS), "image must be finite; got 64"),
    "no tensor": (Features([1.0], TARGETS), "image must be a floating-point tensor.*list"),
    "too few": (Features(torch.ones(3, 16), TARGETS), r"targets: expected shape \[3\].*\(4,\)"),
    "list": (Features(torch.ones(4, 16), [0, 1, 2, 0]), "targets: expected a tensor.*list"),
    "floats": (Features(torch.ones(4, 16), TARGETS.float()), "targets: expected integer class indices"),
    "out of range": (Features(torch.ones(4, 16), TARGETS + 1), r"targets: .*\[0, 3\), got 1 to 3"),
    "negative": (Features(torch.ones(4, 16), TARGETS - 1), r"targets: .*\[0, 3\), got -1 to 1"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", BAD_FEATURES)
def test_bad_features(method, what, backbone):
    model, (features, message) = METHODS[method](backbone), BAD_FEATURES[what]
    with pytest.raises(ValueError, match=message):
        evaluate(model, features, progress=False)
    with pytest.raises(ValueError, match=message):
        calibrate(model, features)
    if what not in ("too few", "list", "floats", "out of range", "negative"):
        with pytest.raises(ValueError, match=message):
            evaluate(model, Features(torch.ones(4, 16), TARGETS), unknown=features, progress=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", ["image", "text"])
def test_a_prediction_from_features_that_are_not_finite(method, broken, backbone):
    model = METHODS[method](backbone)
    given = {"image": torch.ones(2, 16), "text": model.cached_text_features().clone()}
    given[broken][0] = torch.nan
    with pytest.raises(ValueError, match=rf"{broken}\b.*must be finite"):
        model.predict_features(**given)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int32])
def test_targets_of_any_integer_dtype(dtype, backbone, coloured):
    images, targets = coloured
    model = METHODS["CoOp"](backbone)
    assert evaluate(model, [(images, targets.to(dtype))] * 2, progress=False).count == 48
    assert float(model.loss(images, targets.to(dtype)).detach()) == float(model.loss(images, targets).detach())
    same = [calibrate(copy.deepcopy(model), [(images, t)]) for t in (targets.to(dtype), targets)]
    assert same[0] == same[1]


@pytest.mark.parametrize("method", METHODS)
def test_calibration_and_inference_mode(method, backbone, coloured):
    """Neither features made under it nor a call under it keeps calibration from its gradients."""
    ways = []
    for inside in (None, "features", "call"):
        model = METHODS[method](backbone)
        with torch.inference_mode(inside == "features"):
            features = extract_features(model, [coloured], progress=False)
        with torch.inference_mode(inside == "call"):
            ways.append(calibrate(model, features))
    assert ways[0] == ways[1] == ways[2]


@pytest.mark.parametrize("max_iter", [0, 1.5, "many"])
def test_calibration_needs_iterations(max_iter, backbone, coloured):
    with pytest.raises(ValueError, match="max_iter: expected a whole number >= 1"):
        calibrate(ZeroShot(backbone, CLASSES), [coloured], max_iter=max_iter)


def test_what_is_no_method_or_loader(backbone, coloured):
    for call in (evaluate, calibrate, extract_features):
        with pytest.raises(ValueError, match="model: expected a method.*ClipBackbone"):
            call(backbone, [coloured])
        with pytest.raises(ValueError, match="loader: expected a DataLoader.*int"):
            call(ZeroShot(backbone, CLASSES), 5)
        with pytest.raises(ValueError, match="loader: expected batches.*Tensor"):
            call(ZeroShot(backbone, CLASSES), [coloured[0]])


def test_one_class(backbone, coloured):
    result = evaluate(ZeroShot(backbone, ["red"]), [(coloured[0], torch.zeros(24, dtype=torch.long))], progress=False)
    assert result.accuracy == 1.0 and result.ece == 0.0 and result.brier == 0.0
