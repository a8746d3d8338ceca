"""Every seed that is accepted works everywhere, and small ones mean what they always did."""

import doctest

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from cdc_models import CDC, CoOp, MaPLe, ZeroShot, fit, processes, seeds
from cdc_models.data import ImageList, ImageLoader
from cdc_models.data import test_transform as plain_transform
from cdc_models.engine import FeatureLoader, cache_features

CLASSES = ["red", "green", "blue"]
LARGE = (8590, 2**63 - 1, 2**64 - 1, -(2**63))


@pytest.fixture
def photos(tmp_path, backbone):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (60 * i, 40, 200 - 60 * i)).save(folder / f"{i}.png")
    images = ImageList(folder, [(f"{i}.png", i) for i in range(3)], CLASSES)
    return images.with_transform(v2.Compose([plain_transform(backbone), v2.Lambda(_noisy)]))


def _noisy(image):
    return image + 0.5 * torch.randn(image.shape)


@pytest.mark.parametrize("seed", LARGE)
def test_large_seeds(seed, backbone, coloured, photos, tmp_path, monkeypatch):
    for method in (CoOp, MaPLe, CDC):
        method(backbone, CLASSES, seed=seed)
    features = [
        cache_features(ZeroShot(backbone, CLASSES), photos, tmp_path / name, draws=2, seed=each, progress=False).image
        for name, each in (("a", seed), ("b", seed), ("c", seed - 1 if seed > 0 else seed + 1))
    ]
    assert torch.equal(features[0], features[1])
    # every draw of every seed is another one
    assert not torch.allclose(features[0][0], features[0][1]) and not torch.allclose(features[0], features[2])
    cached = cache_features(ZeroShot(backbone, CLASSES), photos, tmp_path / "a", draws=2, seed=seed, progress=False)
    assert cached.computed == 0 and len(list(FeatureLoader(cached, 2, seed))) == 2
    assert len(list(ImageLoader(photos, 2, seed=seed))) == 2
    monkeypatch.setattr(processes, "part", lambda: (1, 1))  # as the second process, in what it draws
    assert fit(CoOp(backbone, CLASSES), [coloured], epochs=1, warmup_epochs=0, seed=seed, progress=False).steps == 1


def test_small_seeds_mean_what_they_did(photos, backbone, tmp_path):
    assert all(seeds.as_seed(number) == number for number in (0, 1, 8589, 2**64 - 1, -1))
    found = cache_features(ZeroShot(backbone, CLASSES), photos, tmp_path / "a", seed=7, progress=False).image[0, 1]
    torch.manual_seed(7 * 1_000_003 * 2**31 + 1)
    assert torch.allclose(found, backbone.encode_image(photos[1][0][None])[0], atol=1e-5)


def test_what_is_no_seed(photos):
    for wrong in (2**64, -(2**63) - 1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="seed: expected a whole number of at most 64 bits"):
            ImageLoader(photos, 2, seed=wrong)


def test_example():
    result = doctest.testmod(seeds)
    assert result.attempted > 0 and result.failed == 0
