"""Training."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from cdc_models import CDC, CoOp, MaPLe, ZeroShot, evaluate, fit
from cdc_models.engine import learning_rate

CLASSES = ["red", "green", "blue"]


def loader_of(data, seed=0):
    return DataLoader(TensorDataset(*data), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(seed))


def adapters(backbone):
    return [
        CoOp(backbone, CLASSES, n_ctx=4, seed=1),
        MaPLe(backbone, CLASSES, depth=3, seed=1),
        CDC(backbone, CLASSES, depth=3, views=None, seed=1),
    ]


def test_schedule_is_maples():
    assert [learning_rate(e, 5, 0.0035) for e in range(5)] == pytest.approx(
        [1e-5] + [0.00175 * (1 + math.cos(math.pi * e / 5)) for e in range(4)]
    )
    assert learning_rate(0, 5, 0.1, warmup_epochs=0) == 0.1
    for epoch, epochs in ((-1, 5), (0, 0), (0.5, 5)):
        with pytest.raises(ValueError, match="epochs?: expected a whole number"):
            learning_rate(epoch, epochs, 0.1)


@pytest.mark.parametrize("which", range(3))
def test_training_learns_and_leaves_the_backbone_alone(which, backbone, coloured):
    model, before = adapters(backbone)[which], backbone.fingerprint
    start = evaluate(model, [coloured], progress=False)
    epochs = []
    result = fit(
        model,
        loader_of(coloured),
        epochs=60,
        lr=0.05,
        seed=0,
        progress=False,
        on_epoch=lambda e, loss: epochs.append(e),
    )
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert result.steps == 180 and epochs == list(range(60)) and not result.interrupted
    assert evaluate(model, [coloured], progress=False).accuracy > max(start.accuracy, 0.6)
    assert backbone.fingerprint == before


def test_same_seed_same_result(backbone, coloured):
    ends = []
    for _ in range(2):
        model = CDC(backbone, CLASSES, depth=2, seed=3)  # its views are random
        fit(model, loader_of(coloured), epochs=2, seed=5, progress=False)
        ends.append(torch.cat([p.detach().flatten() for p in model.learned_parameters().values()]))
    assert torch.equal(*ends)


def test_interruption_keeps_what_was_learned(backbone, coloured):
    model = CoOp(backbone, CLASSES)

    def stop(epoch, loss):
        if epoch == 1:
            raise KeyboardInterrupt

    start = model.context.vectors.detach().clone()
    result = fit(model, loader_of(coloured), epochs=9, progress=False, on_epoch=stop)
    assert result.interrupted and len(result.losses) == 2 and result.steps == 6
    assert not torch.equal(model.context.vectors, start)


def test_bf16_training(backbone, coloured):
    model = MaPLe(backbone, CLASSES, depth=2)
    result = fit(model, loader_of(coloured), epochs=2, autocast=torch.bfloat16, progress=False)
    assert all(math.isfinite(x) for x in result.losses)
    assert {p.dtype for p in model.learned_parameters().values()} == {torch.float32}


def test_the_evidence_head_does_not_decay(backbone):
    groups = CDC(backbone, CLASSES, depth=2).parameter_groups(5e-4)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    model = CDC(backbone, CLASSES, depth=2)
    assert sorted(decay.values()) == [0.0, 0.0, 5e-4, 5e-4, 5e-4]
    assert len(decay) == len(model.learned_parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": -1},
        {"epochs": 2.5},
        {"epochs": True},
        {"warmup_epochs": 1.5},
        {"checkpoint_every": -1},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"lr": "fast"},
        {"momentum": 1.0},
        {"momentum": None},
        {"weight_decay": -1},
        {"weight_decay": float("inf")},
        {"warmup_lr": -1},
        {"warmup_lr": float("nan")},
        {"seed": "x"},
        {"seed": 1.5},
        {"seed": 2**64},
        {"autocast": "bf16"},
        {"autocast": torch.float64},
        {"on_epoch": 5},
    ],
    ids=str,
)
def test_bad_settings(change, backbone, coloured):
    ((argument, _),) = change.items()
    model = CoOp(backbone, CLASSES)
    before = model.context.vectors.detach().clone()
    with pytest.raises(ValueError, match=f"^{argument}\\b.*expected|^{argument} must be"):
        fit(model, [coloured], progress=False, **change)
    assert torch.equal(model.context.vectors, before)


@pytest.mark.parametrize("loader", [5, None, "photos", torch.zeros(2, 3, 32, 32), TensorDataset(torch.zeros(2))])
def test_what_is_no_loader(loader, backbone):
    with pytest.raises(ValueError, match=r"loader: expected a DataLoader or .*got (int|None|str|Tensor)"):
        fit(CoOp(backbone, CLASSES), loader, progress=False)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (torch.zeros(2, 3, 32, 32), "a Tensor"),
        ({"image": 1}, "a dict"),
        ((torch.zeros(2, 3, 32, 32),), "a tuple of 1"),
        (("a.png", 0), "a tuple of 2"),
        ((torch.zeros(2, 3, 32, 32), ["red", "green"]), r"\['red', 'green'\]"),
        ((torch.zeros(2, 3, 32, 32), torch.zeros(2, 3).long()), r"\[2, 3\]"),
        ((torch.zeros(1, 3, 32, 32), 0), r"\[\]"),
    ],
    ids=["images", "dict", "no targets", "paths", "names", "one-hot", "one number"],
)
def test_what_is_no_batch(batch, told, backbone, coloured):
    model = CoOp(backbone, CLASSES)
    for call in (fit, evaluate):
        with pytest.raises(ValueError, match=f"(loader|targets): expected .*got {told}"):
            call(model, [coloured, batch], progress=False)


def test_targets_may_be_a_list(backbone, coloured):
    images, targets = coloured
    assert fit(CoOp(backbone, CLASSES), [(images, targets.tolist())], epochs=2, progress=False).steps == 2


@pytest.mark.parametrize("which", range(3))
def test_batches_made_under_inference_mode(which, backbone, coloured):
    models = [adapters(backbone)[which] for _ in range(2)]
    with torch.inference_mode():
        images = coloured[0].clone()
        batches = [(models[0].image_features(images) if models[0].frozen_image else images, coloured[1].clone())]
    fit(models[0], batches, epochs=2, progress=False)
    fit(models[1], [coloured], epochs=2, progress=False)
    learned = zip(*(m.learned_parameters().values() for m in models), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in learned)


@pytest.mark.parametrize("model", [None, "cdc", torch.nn.Linear(2, 2)], ids=["none", "name", "layer"])
def test_what_is_no_method(model, coloured):
    with pytest.raises(ValueError, match="model: expected a method.*got (NoneType|str|Linear)"):
        fit(model, [coloured], progress=False)


def test_nothing_to_learn(backbone, coloured):
    with pytest.raises(ValueError, match="nothing to learn"):
        fit(ZeroShot(backbone, CLASSES), [coloured], progress=False)


def test_a_diverging_loss_is_reported_before_it_spreads(backbone, coloured):
    model = CoOp(backbone, CLASSES)
    with pytest.raises(ValueError, match="loss became (nan|inf).*smaller lr"):
        fit(model, [coloured] * 50, epochs=3, lr=1e30, warmup_epochs=0, progress=False)


def test_a_loss_that_refuses_diverged_parameters_is_reported_as_their_fault(backbone, coloured):
    model = CDC(backbone, CLASSES, depth=2, views=None)
    with torch.no_grad():
        model.prompts.text_prompts.fill_(float("nan"))
    with pytest.raises(ValueError, match="parameters are not finite after step 0; try a smaller lr than 0.1"):
        fit(model, [coloured], lr=0.1, progress=False)


@pytest.mark.parametrize(
    ("name", "value", "told"), [("text_prompts", 1e38, "must be finite"), ("log_scale", 80.0, "within 2\\^100")]
)
def test_features_and_scales_that_training_drove_off_are_not_blamed_on_the_images(
    name, value, told, backbone, coloured
):
    model = CDC(backbone, CLASSES, depth=2, views=None)
    with torch.no_grad():
        next(p for n, p in model.learned_parameters().items() if n.endswith(name)).fill_(value)
    with pytest.raises(ValueError, match=f"training diverged at step 0 .*try a smaller lr than 0.1 .*{told}"):
        fit(model, [coloured], lr=0.1, progress=False)


def test_images_that_are_not_finite_are_to_blame_themselves(backbone, coloured):
    images, targets = coloured
    with pytest.raises(ValueError, match="^images: expected finite values"):
        fit(CDC(backbone, CLASSES, depth=2, views=None), [(images * math.nan, targets)], progress=False)


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "told"), [(1, 1, True), (2, 3, True), (2, 1, False), (0, 1, False)]
)
@pytest.mark.filterwarnings("always")
def test_a_learning_rate_that_is_never_used_is_told(epochs, warmup_epochs, told, backbone, coloured, recwarn):
    fit(CoOp(backbone, CLASSES), [coloured], epochs=epochs, warmup_epochs=warmup_epochs, lr=0.5, progress=False)
    said = [str(w.message) for w in recwarn]
    assert len(said) == told and all("lr=0.5 is never used, only warmup_lr=1e-05" in text for text in said)


def test_progress_bar_is_shown(backbone, coloured, capsys):
    fit(CoOp(backbone, CLASSES), loader_of(coloured), epochs=2, progress=True)
    without_length = (batch for batch in [coloured])
    fit(CoOp(backbone, CLASSES), without_length, epochs=1, warmup_epochs=0, progress=True)


def test_a_loader_that_gives_nothing_is_refused(backbone, coloured):
    with pytest.raises(ValueError, match="loader: gave no batch in epoch 0"):
        fit(CoOp(backbone, CLASSES), [], epochs=2, progress=False)
    with pytest.raises(ValueError, match="loader: gave no batch in epoch 1"):
        fit(CoOp(backbone, CLASSES), (batch for batch in [coloured]), epochs=3, progress=False)


def test_no_checkpoint_of_parameters_that_are_not_finite(backbone, coloured, tmp_path):
    model, path = CoOp(backbone, CLASSES), tmp_path / "run.safetensors"
    with pytest.raises(ValueError, match="not finite after step|loss became"):
        fit(model, [coloured] * 9, lr=1e30, warmup_epochs=0, checkpoint=path, checkpoint_every=1, progress=False)
    assert not model.training
    assert all(bool(t.isfinite().all()) for n, t in load_file(path).items() if n.startswith("model."))
