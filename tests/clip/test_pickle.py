"""Backbones and models can be pickled, as data loaders and process pools need."""

import pickle

import open_clip
import pytest
import torch

from cdc_models import METHODS, load_clip
from cdc_models.clip import sources


@pytest.mark.parametrize("used", [False, True], ids=["new", "tokenised"])
def test_a_backbone(used):
    backbone = load_clip("bundled")
    if used:
        backbone.tokenize(["a cat"])
    again = pickle.loads(pickle.dumps(backbone))
    assert again.fingerprint == backbone.fingerprint
    assert torch.equal(again.tokenize(["a small cat"]), backbone.tokenize(["a small cat"]))


@pytest.mark.parametrize("name", METHODS)
def test_a_model(name, bundled):
    model = METHODS[name](bundled, ["cat", "dog"])
    again = pickle.loads(pickle.dumps(model))
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.predict(images).prob, model.predict(images).prob)


def test_the_tokenizer_of_a_named_network(bundled, monkeypatch):
    monkeypatch.setattr(sources, "build_network", lambda *_: bundled.clip)  # which takes seconds
    made = pickle.loads(pickle.dumps(sources.from_name("RN50", None).make_tokenizer))
    assert isinstance(made(), open_clip.SimpleTokenizer)
