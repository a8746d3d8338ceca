"""`cdc evaluate` end to end: the figures of the library, as a table and as JSON."""

import pytest

from cdc_models import ZeroShot, evaluate, load_adapter, load_clip
from cdc_models.data import load_dataset
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

    for name in ("yellow square", "red square"):
        for i in range(5):
            picture(tmp_path / name / f"{i}.png", (230, 230, 10 * i))
    adapter = f"--adapter={trained / 'adapter.safetensors'}"
    said = cdc_json("evaluate", f"--data={tmp_path}", adapter, f"--unknown={photos}")
    assert said["classes"] == 2 and 0 <= said["unknown_auroc"] <= 1 and said["images"]["unknown"]["total"] == 6


def test_a_table_for_people_names_what_was_skipped(photos, cdc):
    everything = ("--split=train", "--val_part=0", "--test_part=0")
    status, out, _ = cdc("evaluate", f"--data={photos}", "--backbone=bundled", *everything)
    text = " ".join(out.split())
    assert status == 0 and "accuracy" in text and "calibration error" in text
    assert "red square/0.png: not an image" in text and "1 of 30 images skipped: 1 not an image" in text


def test_quiet_says_nothing(photos, cdc):
    assert cdc("evaluate", f"--data={photos}", "--backbone=bundled", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter=none.safetensors"], "no adapter file at none.safetensors"),
        (["--adapter={adapter}", "--backbone=ViT-B-16-quickgelu", "--pretrained={adapter}"], "pretrained"),
        (["--backbone=bundled", "--split=val", "--val_part=0"], "lists none for this split"),
        (["--backbone=bundled", "--half=third"], "half"),
    ],
)
def test_errors(arguments, message, trained, photos, cdc):
    filled = [argument.format(adapter=trained / "adapter.safetensors") for argument in arguments]
    status, out, err = cdc("evaluate", f"--data={photos}", *filled)
    assert (status, out) == (2, "") and message in err and "Traceback" not in err
