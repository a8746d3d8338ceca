"""`cdc evaluate` end to end: the figures of the library, as a table and as JSON."""

import pytest
import torch
from rich.console import Console

from cdc_models import ZeroShot, evaluate, load_adapter, load_clip, save_adapter
from cdc_models.commands.evaluate import _table
from cdc_models.data import load_dataset
from cdc_models.engine import Evaluation
from cdc_models.recipes import reader


def figures(model, images):
    return evaluate(model, reader(images, model.backbone, 100, 0), progress=False)


def test_an_adapter_has_the_figures_of_the_library(trained, photos, cdc_json, tmp_path):
    said = cdc_json(
        "evaluate", f"--data={photos}", f"--adapter={trained / 'adapter.safetensors'}", f"--out={tmp_path / 'e.json'}"
    )
    clip = load_clip("bundled")
    own = figures(load_adapter(trained / "adapter.safetensors", clip), load_dataset(photos).test).numbers()
    for name in ("accuracy", "ece", "brier", "aurc", "uncertainty_right", "count"):
        assert said[name] == own[name]
    assert said["method"] == "cdc" and said["backbone"] == "bundled" and (tmp_path / "e.json").is_file()


def test_zero_shot_and_the_halves(photos, cdc_json):
    dataset = load_dataset(photos, template="a drawing of a {}.").half("base")
    arguments = (f"--data={photos}", "--backbone=bundled", "--half=base", "--template=a drawing of a {}.")
    said = cdc_json("evaluate", *arguments, "--split=train")
    own = figures(ZeroShot(load_clip("bundled"), dataset.classes, dataset.template), dataset.train)
    assert said["classes"] == 2 and said["brier"] == own.brier and said["method"] == "zero_shot"


def test_an_adapter_on_other_classes_and_unknown_ones(trained, photos, cdc_json, tmp_path):
    from trees import picture

    for name in ("yellow square", "white square"):
        for i in range(5):
            picture(tmp_path / name / f"{i}.png", (230, 230, 10 * i))
    adapter = f"--adapter={trained / 'adapter.safetensors'}"
    said = cdc_json("evaluate", f"--data={tmp_path}", adapter, f"--unknown={photos}")
    assert said["classes"] == 2 and 0 <= said["unknown_auroc"] <= 1 and said["images"]["unknown"]["total"] == 6
    assert said["classes_new_to_adapter"] == 2


def test_classes_new_to_the_adapter_are_told(trained, photos, cdc, cdc_json, tmp_path):
    from trees import picture

    for name in ("red_square", "white square"):
        for i in range(5):
            picture(tmp_path / name / f"{i}.png", (230, 230, 10 * i))
    adapter = f"--adapter={trained / 'adapter.safetensors'}"
    status, out, err = cdc("evaluate", f"--data={tmp_path}", adapter)
    assert status == 0, err
    assert "1 of these 2 classes are new to" in " ".join(out.split())
    assert cdc_json("evaluate", f"--data={photos}", adapter)["classes_new_to_adapter"] == 0
    assert cdc_json("evaluate", f"--data={photos}", "--backbone=bundled")["classes_new_to_adapter"] is None


def test_a_table_for_people_names_what_was_skipped(photos, cdc):
    everything = ("--split=train", "--val_part=0", "--test_part=0")
    status, out, _ = cdc("evaluate", f"--data={photos}", "--backbone=bundled", *everything)
    text = " ".join(out.split())
    assert status == 0 and "accuracy" in text and "calibration error" in text
    assert "red square/0.png: not an image" in text and "1 of 30 images skipped: 1 not an image" in text


def test_small_uncertainties_keep_their_digits(capsys):
    nothing = torch.zeros(0)
    found = Evaluation(0.5, 0.1, 0.2, 0.3, 0.4, 1.234e-7, 0.8765, None, None, 2, 1.0, nothing, torch.ones(2), nothing)
    Console(width=132).print(_table("t", found))
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if "│" in line}
    assert shown["uncertainty, right"] == "1.23e-07" and shown["uncertainty, wrong"] == "0.876"
    assert shown["accuracy"] == "0.5000" and shown["images"] == "2"


@pytest.mark.filterwarnings("always")
def test_another_split_than_that_of_training_is_told(trained, photos, cdc, tmp_path):
    def told(*arguments, adapter=trained / "adapter.safetensors"):
        status, _, err = cdc("evaluate", f"--data={photos}", f"--adapter={adapter}", *arguments)
        assert status == 0, err
        return err

    assert "another split of photos (test_part: 0.2 there, 0.5 here)" in told("--test_part=0.5")
    assert "(split_seed: 1 there, 2 here; val_part: 0.1 there, 0.2 here)" in told(
        "--split=val", "--split_seed=2", "--val_part=0.2"
    )
    assert told() == "" == told("--val_part=0.2")  # the test images are drawn first
    assert told("--split=train", "--split_seed=2") == ""
    old = load_adapter(trained / "adapter.safetensors", load_clip("bundled"))
    assert told("--split_seed=2", adapter=save_adapter(old, tmp_path / "old.safetensors", {"data": "photos"})) == ""


def test_quiet_says_nothing(photos, cdc):
    assert cdc("evaluate", f"--data={photos}", "--backbone=bundled", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter=none.safetensors"], "no adapter file at none.safetensors"),
        (["--adapter={adapter}", "--backbone=ViT-B-16-quickgelu", "--pretrained={adapter}"], "pretrained"),
        (["--backbone=bundled", "--split=val", "--val_part=0"], "data: expected val images in photos, got none"),
        (
            ["--backbone=bundled", "--unknown={photos}"],
            "got 3 of them in photos: blue square, green square, red square",
        ),
        (
            ["--backbone=bundled", "--half=base", "--unknown={photos}"],
            "got 2 of them in photos: blue square, green square",
        ),
        (["--backbone=bundled", "--half=third"], "half"),
    ],
)
def test_errors(arguments, message, trained, photos, cdc):
    filled = [argument.format(adapter=trained / "adapter.safetensors", photos=photos) for argument in arguments]
    status, out, err = cdc("evaluate", f"--data={photos}", *filled)
    assert (status, out) == (2, "") and message in err and "Traceback" not in err
