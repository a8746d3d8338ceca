"""The bundled CLIP: the weights that pre-training made, and what they can do."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import pytest
from safetensors import safe_open
from torch.utils.data import DataLoader

from cdc_models import ZeroShot, evaluate
from cdc_models.data import emoji_benchmark, test_transform

BUNDLED = files("cdc_models").joinpath("bundled/clip")
SHA256 = "2c5a3a00ce9b5f683033632121d86422b214b30b28c0746c9eed214db0098457"


def test_weights_are_the_ones_that_were_trained():
    data = BUNDLED.joinpath("model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256
    assert len(data) < 12e6
    with safe_open(str(BUNDLED.joinpath("model.safetensors")), "pt") as stored:
        assert stored.metadata() == {"steps": "5500", "seed": "0"}


def test_zero_shot_accuracy_on_an_artist_it_never_saw(bundled):
    """Validation classes, all 100 of them; pre-training logged 66 % over all groups of 50 classes."""
    accuracies = []
    for split in range(2):
        data = emoji_benchmark(split, 1, partition="validation", shots=1, val_shots=1)
        for test in (data.base_test, data.new_test):
            loader = DataLoader(test.with_transform(test_transform(bundled)), batch_size=200)
            accuracies.append(evaluate(ZeroShot(bundled, test.classes), loader, progress=False).accuracy)
    assert sum(accuracies) / 4 == pytest.approx(0.68, abs=0.03)  # chance is 0.02


def test_the_log_of_its_training_is_kept():
    lines = [json.loads(x) for x in (Path(__file__).parents[1] / "pretraining/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 5500 and lines[-1]["held_out_accuracy"]["twemoji"] > 0.65
