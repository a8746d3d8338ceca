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
SHA256 = "13608a10d7841039df7bb94b51c68bd9293b653127304100753fb86faf3440f1"


def test_weights_are_the_ones_that_were_trained():
    data = BUNDLED.joinpath("model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256
    assert len(data) < 12e6
    with safe_open(str(BUNDLED.joinpath("model.safetensors")), "pt") as stored:
        assert stored.metadata() == {"steps": "3000", "seed": "0"}


def test_zero_shot_accuracy_on_an_artist_it_never_saw(bundled):
    """Validation classes, all 100 of them; pre-training logged 54 % over all groups of 50 classes."""
    accuracies = []
    for split in range(2):
        data = emoji_benchmark(split, 1, partition="validation", shots=1, val_shots=1)
        for test in (data.base_test, data.new_test):
            loader = DataLoader(test.with_transform(test_transform(bundled)), batch_size=200)
            accuracies.append(evaluate(ZeroShot(bundled, test.classes), loader, progress=False).accuracy)
    assert sum(accuracies) / 4 == pytest.approx(0.56, abs=0.03)  # chance is 0.02


def test_the_log_of_its_training_is_kept():
    lines = [json.loads(x) for x in (Path(__file__).parents[1] / "pretraining/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3000 and lines[-1]["held_out_accuracy"]["twemoji"] > 0.5
