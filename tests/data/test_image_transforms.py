"""Transforms and views."""

import numpy as np
import pytest
import torch
from PIL import Image

from cdc_models.data import VIEWS, Views, test_transform, train_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_test_transform_agrees_with_open_clips_own(bundled):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((45, 40), Image.Resampling.BICUBIC).resize((90, 60), Image.Resampling.BICUBIC)
    ours, theirs = test_transform(bundled)(image), bundled.preprocess(image)
    assert ours.shape == theirs.shape == (3, 48, 48)
    assert (ours - theirs).abs().max() < 0.03  # a rounding step of a PIL image, 1/255, over the deviation


def test_train_transform_is_random_and_normalised(bundled):
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    out = train_transform(bundled)(image)
    expected = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(bundled.image_mean)) / torch.tensor(bundled.image_std)
    assert out.shape == (3, 48, 48)
    assert torch.allclose(out.mean((1, 2)), expected, atol=1e-4)


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_each_view_keeps_shape_and_range(name):
    torch.manual_seed(0)
    pixels = torch.rand(6, 3, 48, 48)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    out = Views([name], MEAN, STD)((pixels - mean) / std)
    assert out.shape == (6, 1, 3, 48, 48)
    back = out[:, 0] * std + mean
    assert back.min() >= -1e-5 and back.max() <= 1 + 1e-5
    assert (name == "none") == torch.allclose(back, pixels, atol=1e-5)


def test_grey_is_grey_and_names_join():
    out = Views(["none", "grey+flip"], (0, 0, 0), (1, 1, 1))(torch.rand(3, 3, 48, 48))
    assert torch.allclose(out[:, 1, 0], out[:, 1, 2], atol=1e-6)
    assert not torch.allclose(out[:, 0, 0], out[:, 0, 2])


@pytest.mark.parametrize("names", [[], "none", ["sepia"], ["flip+sepia"]])
def test_unknown_views(names):
    with pytest.raises(ValueError, match="names"):
        Views(names, MEAN, STD)
