"""Features on disk: computed once, never stale, never damaged, and training on them is training on images."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2

from cdc_models import CDC, CoOp, MaPLe, ZeroShot, evaluate, fit
from cdc_models.data import ImageList, train_transform
from cdc_models.data import test_transform as plain_transform
from cdc_models.data.listing import DatasetError
from cdc_models.engine import FeatureLoader, cache_features
from cdc_models.methods import Method

CLASSES = ["red", "green", "blue"]


@pytest.fixture
def photos(tmp_path, backbone):
    folder, items = tmp_path / "photos", []
    folder.mkdir()
    for i in range(12):
        colour = [40, 40, 40]
        colour[i % 3] = 150 + 8 * i
        Image.new("RGB", (40, 36), tuple(colour)).save(folder / f"{i}.png")
        items.append((f"{i}.png", i % 3))
    return ImageList(folder, items, CLASSES, plain_transform(backbone))


@pytest.fixture
def encoded(monkeypatch):
    """How many images went through an image tower."""
    counts = []
    for method in (CoOp, ZeroShot, CDC):
        original = method.image_features

        def counting(self, images, original=original):
            counts.append(len(images))
            return original(self, images)

        monkeypatch.setattr(method, "image_features", counting)
    return counts


def cached(model, photos, tmp_path, **options):
    return cache_features(model, photos, tmp_path / "cache", shard=5, batch_size=4, progress=False, **options)


def test_features_are_computed_once_and_shared_by_methods_with_the_same_image_side(backbone, photos, tmp_path, encoded):
    first = cached(CoOp(backbone, CLASSES), photos, tmp_path)
    assert (first.computed, sum(encoded)) == (3, 12)
    again = cached(ZeroShot(backbone, CLASSES), photos, tmp_path)
    assert (again.computed, sum(encoded)) == (0, 12)
    assert torch.equal(first.image, again.image) and torch.equal(again.targets, photos.targets)
    images = torch.stack([photos[i][0] for i in range(12)])
    assert torch.allclose(again.image[0], backbone.encode_image(images), atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_training_and_evaluation_on_features_equal_those_on_images(backbone, photos, tmp_path):
    models = [CoOp(backbone, CLASSES, n_ctx=2, seed=1) for _ in range(2)]
    features = cached(models[0], photos, tmp_path)
    images = torch.stack([photos[i][0] for i in range(12)])
    order = torch.Generator().manual_seed(3)
    rows = [torch.randperm(12, generator=order).split(5) for _ in range(2)]
    for epoch in rows:
        fit(models[0], [(features.image[0][r], features.targets[r]) for r in epoch], epochs=2, lr=0.05, progress=False)
        fit(models[1], [(images[r], photos.targets[r]) for r in epoch], epochs=2, lr=0.05, progress=False)
    assert torch.allclose(models[0].context.vectors, models[1].context.vectors, rtol=1e-4, atol=1e-4)
    on_features = evaluate(models[0], features.features(), progress=False)
    on_images = evaluate(models[1], [(images, photos.targets)], progress=False)
    assert torch.allclose(on_features.prob, on_images.prob, atol=1e-5)


def test_draws_of_a_random_transform_differ_and_do_not_depend_on_how_they_are_read(backbone, photos, tmp_path):
    model = CDC(backbone, CLASSES, image_prompts=False)
    photos = photos.with_transform(train_transform(backbone))
    two = cached(model, photos, tmp_path, draws=2)
    assert two.image.shape == (2, 12, 4, backbone.embed_dim)  # every template its own view
    assert not torch.allclose(two.image[0], two.image[1])
    other = cache_features(
        model, photos, tmp_path / "other", draws=2, shard=7, batch_size=3, num_workers=1, progress=False
    )
    assert torch.allclose(two.image, other.image, atol=1e-5)
    assert not torch.allclose(cached(model, photos, tmp_path, seed=1).image[0], two.image[0])
    assert fit(model, FeatureLoader(two, 5, seed=2), epochs=2, progress=False).steps == 6


def test_a_loader_resumes_a_checkpoint_to_the_same_bits(backbone, photos, tmp_path, monkeypatch):
    features = cached(CoOp(backbone, CLASSES), photos.with_transform(train_transform(backbone)), tmp_path, draws=3)

    def run(checkpoint=None, stop_at=None):
        model, calls = CoOp(backbone, CLASSES, seed=1), []
        loss = Method.loss

        def stopping(self, *given):
            calls.append(0)
            if len(calls) == stop_at:
                os.kill(os.getpid(), 2)
            return loss(self, *given)

        monkeypatch.setattr(CoOp, "loss", stopping)
        loader = FeatureLoader(features, 5, seed=2)
        fit(model, loader, epochs=3, lr=0.05, seed=0, checkpoint=checkpoint, progress=False)
        return model.context.vectors.detach()

    whole = run()
    path = tmp_path / "run.safetensors"
    assert not torch.equal(run(path, stop_at=5), whole)
    assert torch.equal(run(path), whole)


def change_file(photos, backbone):
    Image.new("RGB", (40, 36), "white").save(photos.path(0))


def touch_file(photos, backbone):
    os.utime(photos.path(0), ns=(1, 1))


def replace_file_by_one_that_looks_the_same(photos, backbone):
    path = photos.path(0)
    before, data = os.stat(path), Path(path).read_bytes()
    Path(path).write_bytes(bytes(len(data)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (change_file, 1),
        (touch_file, 1),
        (replace_file_by_one_that_looks_the_same, 1),
        (lambda photos, backbone: os.remove(photos.path(7)), 1),
    ],
)
def test_a_changed_file_is_computed_again(change, computed, backbone, photos, tmp_path):
    cached(CoOp(backbone, CLASSES), photos, tmp_path)
    change(photos, backbone)
    assert cached(CoOp(backbone, CLASSES), photos, tmp_path).computed == computed  # its shard alone


def test_another_backbone_or_transform_is_computed_again(backbone, other_backbone, photos, tmp_path):
    first = cached(CoOp(backbone, CLASSES), photos, tmp_path)
    other = cached(CoOp(other_backbone, CLASSES), photos, tmp_path)
    assert other.computed == 3 and not torch.allclose(first.image, other.image)
    grey = photos.with_transform(v2.Compose([v2.Grayscale(3), photos.transform]))
    assert cached(CoOp(backbone, CLASSES), grey, tmp_path).computed == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed"])
def test_a_damaged_file_is_noticed_and_computed_again(damage, backbone, photos, tmp_path):
    first = cached(CoOp(backbone, CLASSES), photos, tmp_path)
    one, two, *_ = sorted((tmp_path / "cache").iterdir())
    data = one.read_bytes()
    one.write_bytes(
        {"cut": data[:-9], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "renamed": two.read_bytes()}[damage]
    )
    again = cached(CoOp(backbone, CLASSES), photos, tmp_path)
    assert again.damaged == (str(one),) and again.computed == 1
    assert torch.equal(again.image, first.image)
    assert cached(CoOp(backbone, CLASSES), photos, tmp_path).computed == 0
    assert set(load_file(one)) == {"image", "rows"}


def test_images_that_cannot_be_read_are_left_out_and_reported_from_the_disk_too(backbone, photos, tmp_path):
    with open(photos.path(4), "wb") as file:
        file.write(b"not an image")
    for computed in (3, 0):
        features = cached(CoOp(backbone, CLASSES), photos, tmp_path)
        assert features.computed == computed and features.image.shape[1] == 11
        assert [image.path for image in features.report.skipped] == [photos.path(4)]
        assert features.targets.tolist() == [i % 3 for i in range(12) if i != 4]


def test_what_cannot_be_cached_is_refused(backbone, photos, tmp_path, coloured):
    with pytest.raises(ValueError, match="MaPLe learns on its image side"):
        cached(MaPLe(backbone, CLASSES, depth=2), photos, tmp_path)
    with pytest.raises(ValueError, match="with a transform"):
        cached(CoOp(backbone, CLASSES), photos.with_transform(None), tmp_path)
    with pytest.raises(ValueError, match="empty list"):
        cached(CoOp(backbone, CLASSES), photos.subset([]), tmp_path)
    for wrong in ({"draws": 0}, {"draws": 1.5}, {"num_workers": -1}, {"seed": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a whole number"):
            cached(CoOp(backbone, CLASSES), photos, tmp_path, **wrong)
    with pytest.raises(ValueError, match="model: expected a method.*ClipBackbone"):
        cached(backbone, photos, tmp_path)
    with pytest.raises(ValueError, match="images: expected an ImageList, got list"):
        cached(CoOp(backbone, CLASSES), [photos[0]], tmp_path)
    with pytest.raises(ValueError, match="needs images"):
        MaPLe(backbone, CLASSES, depth=2).loss(torch.zeros(3, 16), coloured[1][:3])
    features = cached(CoOp(backbone, CLASSES), photos, tmp_path)
    for arguments, message in (((features, 0, 1), "batch_size"), ((features, 5, "x"), "seed"), ((5, 5, 1), "cached")):
        with pytest.raises(ValueError, match=f"{message}: expected"):
            FeatureLoader(*arguments)
    for draw in (1, -1, "x"):
        with pytest.raises(ValueError, match=r"draw: expected a whole number in \[0, 1\)"):
            features.features(draw)
    lost = ImageList(tmp_path, [("no.png", 0)], CLASSES, photos.transform)
    with pytest.raises(DatasetError, match="no image can be read"):
        cached(CoOp(backbone, CLASSES), lost, tmp_path)
