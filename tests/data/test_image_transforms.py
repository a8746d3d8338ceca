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


RED, GREY, WHITE = (255, 0, 0), (128, 128, 128), (255, 255, 255)
PALETTE = Image.new("P", (64, 64), 1)
PALETTE.putpalette([0, 0, 0, *RED])


@pytest.mark.parametrize("make", [test_transform, train_transform], ids=["test", "train"])
@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGBA", (64, 64), (*RED, 255)), RED),
        (Image.new("RGBA", (64, 64), (*RED, 0)), WHITE),
        (Image.new("CMYK", (64, 64), (0, 255, 255, 0)), RED),
        (PALETTE, RED),
        (Image.new("1", (64, 64), 1), WHITE),
        (Image.new("L", (64, 64), 128), GREY),
        (Image.new("LA", (64, 64), (128, 255)), GREY),
        (Image.new("I;16", (64, 64), 128 * 257), GREY),
        (Image.new("I", (64, 64), 128 * 257), GREY),
        (Image.new("F", (64, 64), 300.0), (0, 0, 0)),  # one value: nothing to stretch
    ],
    ids=lambda x: x.mode if isinstance(x, Image.Image) else "",
)
def test_pil_images_of_any_mode_are_rgb(make, image, colour, bundled):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (bundled.image_mean, bundled.image_std))
    expected = (torch.tensor(colour).view(3, 1, 1) / 255 - mean) / std
    assert torch.allclose(make(bundled)(image), expected.expand(3, 48, 48), atol=1e-4)


@pytest.mark.parametrize("make", [test_transform, train_transform], ids=["test", "train"])
def test_tensors_of_other_than_three_channels_are_refused(make, bundled):
    for channels in (1, 2, 4):
        with pytest.raises(ValueError, match=r"image: expected .*\[\.\.\., 3, H, W\]"):
            make(bundled)(torch.zeros(channels, 64, 64, dtype=torch.uint8))
    assert make(bundled)(torch.zeros(5, 3, 64, 64, dtype=torch.uint8)).shape == (5, 3, 48, 48)


def test_a_transform_prints_itself_the_same_always(bundled):
    """The feature cache knows it by that."""
    assert repr(test_transform(bundled)) == repr(test_transform(bundled)) and "0x" not in repr(test_transform(bundled))


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


@pytest.mark.parametrize(("mean", "std"), [((0.5,), STD), (MEAN, (1, 1)), (MEAN, (1, 0, 1))])
def test_views_need_three_channels(mean, std):
    with pytest.raises(ValueError, match="mean, std: expected three numbers each"):
        Views(["grey"], mean, std)


@pytest.mark.parametrize("scale", [(2, 1), (0.5, 0.2), (0, 1), (-1, 1)])
def test_crops_are_parts_of_the_image(scale, bundled):
    with pytest.raises(ValueError, match="scale: expected 0 < low <= high <= 1"):
        train_transform(bundled, scale=scale)
