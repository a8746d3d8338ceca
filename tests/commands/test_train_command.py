"""`cdc train` end to end: what it writes, going on after a stop, settings by file and flag, its errors."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cdc_models import fit, load_adapter, load_clip, recipes
from cdc_models.commands.settings import Compute, Output
from cdc_models.methods import CDC, CoOp


def test_what_a_run_leaves(trained, photos):
    assert {path.name for path in trained.iterdir()} == {
        "adapter.safetensors", "checkpoint.safetensors", "config.yaml", "report.json",
    }  # fmt: skip
    model = load_adapter(trained / "adapter.safetensors", load_clip("bundled"))
    assert isinstance(model, CDC) and model.class_names == ("blue square", "green square", "red square")
    report = json.loads((trained / "report.json").read_text())
    assert report["images"]["train"]["total"] == 12 and report["steps"] == 6 and len(report["losses"]) == 2
    skipped = report["images"]["train"]["images"] + report["images"]["validation"]["images"]
    assert all(image["path"].endswith("red square/0.png") for image in skipped)
    assert report["learned"] == sum(p.numel() for p in model.learned_parameters().values())
    assert report["peak_memory_bytes"] > 10**7 and report["versions"]["torch"] == torch.__version__


@pytest.mark.filterwarnings("always")
def test_classes_without_training_images_are_told(tmp_path, cdc, photos):
    shutil.copytree(photos, tmp_path / "photos")
    run = ("train", f"--data={tmp_path / 'photos'}", "--backbone=bundled", "--epochs=0", "--method=coop")
    status, _, err = cdc(*run, f"--out={tmp_path / 'full'}")
    assert status == 0 and "no training images" not in err, err
    for name in ("grey square", "black square"):
        (tmp_path / "photos" / name).mkdir()
    status, _, err = cdc(*run, f"--out={tmp_path / 'empty'}")
    assert status == 0, err
    assert "no training images of 2 of the 5 classes of photos: black square, grey square; the classifier" in err


def test_the_saved_settings_are_resolved_and_make_the_same_adapter(trained, tmp_path, cdc):
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert settings["options"]["depth"] == 3 and settings["lr"] == 0.0035 and settings["shots"] == 4
    status, out, err = cdc("train", f"--config={trained / 'config.yaml'}", f"--out={tmp_path / 'again'}")
    assert (status, out) == (0, ""), err
    again = yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert {**again, "out": None} == {**settings, "out": None}
    one, other = load_file(trained / "adapter.safetensors"), load_file(tmp_path / "again/adapter.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_flag_wins_over_the_file(tmp_path, cdc, photos):
    file = tmp_path / "settings.yaml"
    file.write_text(f"data: {photos}\nbackbone: bundled\nmethod: coop\nepochs: 0\nlr: 0.5\noptions:\n  n_ctx: 1\n")
    assert cdc("train", f"--config={file}", "--lr=0.25", f"--out={tmp_path / 'run'}")[0] == 0
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (settings["lr"], settings["epochs"], settings["options"]["n_ctx"]) == (0.25, 0, 1)


COOP = ("--method=coop", "--backbone=bundled", "--shots=4", "--epochs=2")


def test_ctrl_c_saves_and_the_same_command_ends_as_an_unbroken_run(tmp_path, cdc, photos, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cdc("train", f"--data={photos}", *COOP, f"--out={whole}")[0] == 0
    objective, calls = CoOp.objective, []

    def stop_at_the_fourth(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return objective(self, *arguments)

    monkeypatch.setattr(CoOp, "objective", stop_at_the_fourth)
    status, _, err = cdc("train", f"--data={photos}", *COOP, f"--out={broken}")
    assert status == 130 and "the same command goes on from" in err and "step 4" in err
    assert not (broken / "adapter.safetensors").exists()
    assert cdc("train", f"--data={photos}", *COOP, f"--out={broken}")[0] == 0
    assert len(calls) == 6
    one, other = load_file(whole / "adapter.safetensors"), load_file(broken / "adapter.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_is_not_trained_again(trained, cdc, monkeypatch):
    def must_not(*_):
        raise AssertionError("a finished run was trained")

    monkeypatch.setattr(CDC, "objective", must_not)
    before = load_file(trained / "adapter.safetensors")
    assert cdc("train", f"--config={trained / 'config.yaml'}")[0] == 0
    after = load_file(trained / "adapter.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_features_are_computed_once_for_all_runs(tmp_path, cdc_json, photos, monkeypatch):
    encoded, encode = [], CoOp.image_features

    def counting(self, images):
        if images.ndim == 4:
            encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(CoOp, "image_features", counting)

    def run(name, *more):
        encoded.clear()
        cache = (f"--feature_cache={tmp_path / 'cache'}", "--feature_draws=2")
        said = cdc_json("train", f"--data={photos}", *COOP, *cache, *more, f"--out={tmp_path / name}")
        assert said["images"]["train"]["total"] == 12
        return said["feature_cache"], sum(encoded), load_file(tmp_path / name / "adapter.safetensors")

    facts, images, first = run("first")
    readable = images // 2
    assert facts == {"computed": 2, "damaged": []} and 10 < readable <= 12
    facts, images, second = run("second")
    assert facts == {"computed": 0, "damaged": []} and images == 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    facts, images, tuned = run("tuned", "--lr=0.1")
    assert images == 0 and not torch.equal(first["context.vectors"], tuned["context.vectors"])
    shard = sorted((tmp_path / "cache").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    facts, images, again = run("again")
    assert facts == {"computed": 1, "damaged": [str(shard)]} and images == readable
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_features_and_images_make_the_same_adapter(tmp_path, cdc_json, photos, monkeypatch):
    """With nothing random in the transform and one epoch, both see the same images in the same order."""
    monkeypatch.setattr(recipes, "train_transform", lambda clip, scale: recipes.test_transform(clip))
    readable = shutil.copytree(photos, tmp_path / "photos", ignore=lambda folder, files: ["0.png"])
    made = []
    for more in ([], [f"--feature_cache={tmp_path / 'cache'}"]):
        out = tmp_path / f"run{len(made)}"
        cdc_json(
            "train", f"--data={readable}", *COOP, "--epochs=1", "--warmup_epochs=0", "--lr=0.1", *more, f"--out={out}"
        )
        made.append(load_file(out / "adapter.safetensors"))
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_run_is_refused(trained, cdc):
    status, _, err = cdc("train", f"--config={trained / 'config.yaml'}", "--lr=0.01")
    assert status == 2 and "another run (lr: 0.0035 there, 0.01 here)" in err


def test_calibration_changes_the_temperature_only(tmp_path, cdc_json, photos):
    said = cdc_json("train", f"--data={photos}", *COOP, "--epochs=0", "--calibrate=true", f"--out={tmp_path}")
    assert 0 <= said["validation_nll"] < 1.09  # below chance, ln 3
    assert float(load_file(tmp_path / "adapter.safetensors")["temperature"]) != 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--backbone=ViT-B-16"], 2, "use 'ViT-B-16-quickgelu'"),
        (["--backbone=bundled", "--options.depht=3"], 2, "cdc has no depht; it has n_templates"),
        (["--backbone=bundled", "--options.n_ctx=many"], 2, "n_ctx"),
        (["--backbone=bundled", "--crop=0"], 2, "crop"),
        (
            ["--backbone=bundled", "--feature_cache=f"],
            2,
            "feature_cache: cdc with these options learns on its image side",
        ),
        (["--backbone=bundled", "--method=maple", "--feature_cache=f"], 2, "feature_cache: maple"),
        (
            ["--backbone=bundled", "--method=coop", "--feature_cache=f", "--feature_draws=0"],
            2,
            "feature_draws: expected",
        ),
        (
            ["--backbone=bundled", "--calibrate", "--val_part=0", "--shots=0"],
            2,
            "calibrate: expected validation images",
        ),
        (["--backbone=bundled", "--device=cuda:99"], 2, "device"),
        (["--backbone=bundled", "--device=meta"], 2, "device: expected one that computes"),
        (["--backbone=bundled", "--method=lora"], 2, "method"),
        (["--backbone=bundled", "--data=no/such"], 2, "no such folder or table"),
        (["--backbone=bundled", "--data=EuroSAT", "--root=nowhere"], 2, "split_zhou_EuroSAT.json"),
        (["--backbone=bundled", "--out=/dev/null/x"], 1, "Not a directory"),
    ],
)
def test_errors_are_one_sentence_and_a_status(arguments, status, message, tmp_path, cdc, photos):
    got, out, err = cdc("train", f"--data={photos}", f"--out={tmp_path / 'run'}", *arguments)
    assert got == status and message in err and "Traceback" not in err and out == ""


def test_every_setting_and_its_default_is_in_help(cdc):
    from dataclasses import MISSING, fields

    from cdc_models.cli import COMMANDS, _settings

    status, out, _ = cdc("train", "--help")
    text = " ".join(out.split())
    assert status == 0 and "Exit status: 0 done;" in text and "n_templates=4" in text
    for cls in _settings(COMMANDS["train"]).values():
        for f in fields(cls):
            assert f"--{f.name}" in text
            if f.default is not MISSING and not isinstance(f.default, bool | None):
                assert f"default: {f.default})" in text, f.name
    assert fit.__kwdefaults__["lr"] == 0.0035 and Compute.test_batch == 100 and Output.quiet is False
