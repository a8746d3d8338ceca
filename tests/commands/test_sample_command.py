"""`cdc sample`: its pictures are the benchmark's own, the same each time, and nothing is written over."""

import csv

import numpy as np
import pytest
from PIL import Image

from cdc_models.data import emoji_benchmark


def test_pictures_are_those_of_a_validation_split(tmp_path, cdc_command):
    for name in ("a", "b"):
        status, out, err = cdc_command("sample", f"--out={tmp_path / name}", "--classes=2", "--images=3", "--seed=4")
        assert status == 0 and "6 labelled pictures of 2 classes, 8 unlabelled" in out, err
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert len(files) == 6 + 8 + 1
    data = emoji_benchmark(0, 4, partition="validation", shots=3, val_shots=2, test_per_class=2)
    folders = sorted(path.name for path in (tmp_path / "a/labelled").iterdir())
    assert folders == sorted(data.train.classes[:2])
    with Image.open(tmp_path / "a/labelled" / data.train.classes[1] / "02.png") as picture:
        assert (np.asarray(picture) == data.train.images[5].permute(1, 2, 0).numpy()).all()
    rows = list(csv.DictReader((tmp_path / "a/truth.csv").read_text().splitlines()))
    for row in rows:
        part = data.val if row["known"] == "True" else data.new_test
        with Image.open(tmp_path / "a/unlabelled" / row["path"]) as picture:
            pixels = np.asarray(picture).transpose(2, 0, 1)
        own = part.images[part.targets == part.classes.index(row["label"])]
        assert any((pixels == image.numpy()).all() for image in own)
    assert [row["known"] for row in rows].count("True") == 4


@pytest.mark.parametrize("argument", ["--classes=0", "--classes=51", "--images=0"])
def test_numbers_out_of_range(argument, tmp_path, cdc_command):
    status, _, err = cdc_command("sample", f"--out={tmp_path / 'x'}", argument)
    assert status == 2 and "classes, images" in err and not (tmp_path / "x").exists()


def test_what_is_there_is_left_alone(tmp_path, cdc_command):
    status, _, err = cdc_command("sample", f"--out={tmp_path}")
    assert status == 2 and "exists" in err and not list(tmp_path.iterdir())
