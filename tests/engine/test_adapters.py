"""Adapter files: round trips, and every way a file can be wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cdc_models import METHODS, calibrate, fit, load_adapter, save_adapter
from cdc_models.engine.adapters import AdapterError

CLASSES = ["red", "green", "blue"]
OPTIONS = {
    "zero_shot": {"templates": ["a photo of a {}.", "{}."]},
    "coop": {},
    "maple": {"depth": 2},
    "cdc": {"depth": 2},
}


@pytest.fixture
def saved(backbone, coloured, tmp_path):
    model = METHODS["cdc"](backbone, CLASSES, depth=2)
    fit(model, [coloured], epochs=2, progress=False)
    return model, save_adapter(model, tmp_path / "adapter.safetensors", {"epochs": 2})


def metadata_of(path):
    with safe_open(path, "pt") as stored:
        return stored.metadata()


def rewrite(path, tensors=None, **changes):
    """Changed by somebody who also took the hash away."""
    metadata = {k: v for k, v in {**metadata_of(path), **changes, "sha256": None}.items() if v is not None}
    save_file(load_file(path) if tensors is None else tensors, path, metadata)


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(name, backbone, coloured, tmp_path):
    model = METHODS[name](backbone, CLASSES, **OPTIONS[name])
    if name != "zero_shot":
        fit(model, [coloured], epochs=2, progress=False)
    calibrate(model, [coloured])
    path = save_adapter(model, tmp_path / "a.safetensors")
    again = load_adapter(path, backbone)
    assert type(again) is type(model) and again.class_names == tuple(CLASSES)
    assert torch.equal(again.predict(coloured[0]).prob, model.predict(coloured[0]).prob)
    elsewhere = load_adapter(path, backbone, ["spoon", "fork"])
    assert torch.equal(
        elsewhere.predict(coloured[0]).prob, model.with_classes(["spoon", "fork"]).predict(coloured[0]).prob
    )


def test_only_what_was_learned_is_saved(saved, backbone):
    model, path = saved
    assert set(load_file(path)) == set(model.learned_parameters())
    assert json.loads(metadata_of(path)["summary"]) == {"epochs": 2}
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.learned_parameters().values()) + 4000


def test_another_backbone_is_refused(saved, other_backbone):
    with pytest.raises(AdapterError, match="was trained on small.*hash.*given is"):
        load_adapter(saved[1], other_backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method 'lora'"),
        ({"method": None}, "lacks method"),
        ({"format": "99"}, "format '99'"),
        ({"options": "{"}, "damaged metadata"),
        ({"options": '{"nonsense": 1}'}, "refuses"),
        ({"options": '{"depth": 99}'}, "refuses"),
        ({"options": '{"depth": 3}'}, "holds tensors"),
        ({"classes": '["a", "a"]'}, "refuses"),
        ({"backbone": "[]"}, "damaged metadata"),
    ],
)
def test_tampered_metadata(changes, message, saved, backbone):
    rewrite(saved[1], **changes)
    with pytest.raises(AdapterError, match=message):
        load_adapter(saved[1], backbone)


def test_tampered_tensors(saved, backbone):
    path = saved[1]
    tensors = load_file(path)
    rewrite(path, {n: torch.full_like(t, torch.nan) for n, t in tensors.items()})
    with pytest.raises(AdapterError, match="not finite"):
        load_adapter(path, backbone)
    rewrite(path, {n: t for n, t in tensors.items() if "head" not in n})
    with pytest.raises(AdapterError, match="holds tensors"):
        load_adapter(path, backbone)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-38, 1e38])
def test_a_temperature_that_calibration_never_gives(value, backbone, coloured, tmp_path):
    path = save_adapter(METHODS["zero_shot"](backbone, CLASSES), tmp_path / "a.safetensors")
    rewrite(path, {"temperature": torch.tensor(value)})
    with pytest.raises(AdapterError, match="temperature must stand for numbers between"):
        load_adapter(path, backbone)


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_a_scale_of_evidence_that_no_number_holds(value, saved, backbone):
    tensors = load_file(saved[1])
    rewrite(saved[1], tensors | {"head.log_scale": torch.full_like(tensors["head.log_scale"], value)})
    with pytest.raises(AdapterError, match="head.log_scale must stand for numbers between"):
        load_adapter(saved[1], backbone)


def test_what_cannot_be_saved_or_loaded(saved, backbone, tmp_path):
    model, path = saved
    before = path.read_bytes()
    circle = {}
    circle["circle"] = circle
    for summary in ({"model": model}, {"loss": float("nan")}, circle):
        with pytest.raises(ValueError, match="summary: expected what JSON holds"):
            save_adapter(model, path, summary)
    for summary in ([], "five epochs", 5, ""):
        with pytest.raises(ValueError, match="summary: expected a dict"):
            save_adapter(model, path, summary)
    with pytest.raises(ValueError, match="model: expected a method.*ClipBackbone"):
        save_adapter(backbone, path)
    with torch.no_grad():
        model.prompts.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="model: values that are not finite in prompts.weight; nothing was written"):
        save_adapter(model, path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="backbone: expected a ClipBackbone.*str"):
        load_adapter(path, "bundled")
    for names, message in (
        ([], "empty list"),
        (["a", "a"], "same class"),
        (["a b " * 30], "too long"),
        ("cat", "names"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(path, backbone, names)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(keep, saved, backbone):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="not a readable safetensors"):
        load_adapter(path, backbone)


def test_a_flipped_bit_is_noticed(saved, backbone):
    path = saved[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="damaged: its content does not match"):
        load_adapter(path, backbone)


def test_not_there(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter"):
        load_adapter(tmp_path / "none.safetensors", backbone)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("cdc_models.engine.files.os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
