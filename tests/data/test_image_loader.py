"""Lists of image files, batches of them, and what is said about those that cannot be read."""

import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from bad_images import write_bad_images
from PIL import Image
from torchvision.transforms import v2
from trees import picture

from cdc_models import ZeroShot, evaluate, fit, load_clip
from cdc_models.data import (
    DatasetError,
    ImageList,
    ImageLoader,
    ImageReport,
    SkippedImage,
    load_dataset,
    scan,
    test_transform,
    train_transform,
)
from cdc_models.methods import CoOp

# on one core torch advises against the two workers that some tests are about
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30)}


def mean_colour(image):
    return torch.from_numpy(np.asarray(image).copy()).float().mean((0, 1))


def random_pixel(image):
    return mean_colour(image) + torch.rand(3)


@pytest.fixture
def good(tmp_path):
    items = []
    for label, (name, colour) in enumerate(COLOURS.items()):
        for i in range(5):
            picture(tmp_path / name / f"{i}.png", colour)
            items.append((f"{name}/{i}.png", label))
    return ImageList(tmp_path, items, list(COLOURS), mean_colour)


@pytest.fixture
def mixed(good):
    """Ten good images, with bad ones of every kind between them."""
    bad = write_bad_images(good.root / "bad")
    items = [(f"bad/{name}", 1) for name in bad]
    return ImageList(good.root, items[:4] + good.items + items[4:], good.classes, mean_colour), bad


def test_an_ordinary_dataset(good):
    again = pickle.loads(pickle.dumps(good))
    assert len(again) == 10 and again.classes == ("red", "green")
    image, label = again[7]
    assert image.tolist() == [30, 220, 30] and label == 1 and type(label) is int
    assert isinstance(good.with_transform(None)[0][0], Image.Image)
    assert good.subset(range(1, 10, 4)).items == [good.items[i] for i in (1, 5, 9)]
    assert good.relabelled({1: 0}).classes == ("green",) and len(good.relabelled({1: 0})) == 5
    with pytest.raises(ValueError, match=r"items: expected labels in \[0, 2\), got 0 to 2"):
        ImageList("", [("a", 0), ("b", 2)], ["x", "y"])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_counted_and_listed(mixed, workers):
    images, bad = mixed
    loader = ImageLoader(images, 4, num_workers=workers)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [4, 4, 2]  # the first batch, and those after the good images, are gone
    assert torch.cat([y for _, y in batches]).tolist() == [0] * 5 + [1] * 5
    assert torch.cat([x for x, _ in batches])[-1].tolist() == [30, 220, 30]
    assert [s.path for s in loader.report.skipped] == [str(images.root / "bad" / name) for name in bad]
    assert {s.path.removeprefix(f"{images.root}/bad/"): s.reason for s in loader.report.skipped} == bad
    assert loader.report.total == len(images)
    list(loader)
    assert len(loader.report.skipped) == len(bad)  # met twice, counted once


@pytest.mark.parametrize("workers", [0, 2])
def test_scan_finds_them_beforehand(mixed, workers):
    images, bad = mixed
    report = scan(images, num_workers=workers, progress=False)
    assert len(report.skipped) == len(bad) and str(report).startswith(f"{len(bad)} of {len(images)} images skipped: ")
    left = images.without(report)
    assert len(left) == 10 and not scan(left, progress=False).skipped
    assert left.transform is mean_colour


def test_the_report_as_json():
    report = ImageReport(4)
    assert str(report) == "all 4 images can be read"
    for name, reason in (("a", "damaged"), ("b", "missing"), ("a", "damaged"), ("c", "missing")):
        report.add(SkippedImage(name, reason, "detail"))
    assert str(report) == "3 of 4 images skipped: 2 missing, 1 damaged"
    both = report + ImageReport(2, [SkippedImage("d", "too large", "detail")])
    told = json.loads(json.dumps(both.to_dict()))
    assert told["total"] == 6 and told["skipped"] == 4
    assert told["by_reason"] == {"missing": 2, "damaged": 1, "too large": 1}
    assert told["images"][3] == {"path": "d", "reason": "too large", "detail": "detail"}


def test_a_seed_fixes_order_and_transforms_whatever_the_workers(good):
    images = good.with_transform(random_pixel)

    def passes(workers, seed=1):
        loader = ImageLoader(images, 3, seed=seed, num_workers=workers)
        return [[torch.cat(parts) for parts in zip(*loader, strict=True)] for _ in range(2)]

    torch.manual_seed(5)
    ours = passes(0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # torch's own generator is left alone
    for other in (passes(0), passes(2)):
        assert all(
            torch.equal(a, b) for one, two in zip(ours, other, strict=True) for a, b in zip(one, two, strict=True)
        )
    assert not torch.equal(ours[0][0], ours[1][0])  # another pass, another order
    assert not torch.equal(ours[0][0], passes(0, seed=2)[0][0])
    assert len(torch.unique(ours[0][0], dim=0)) == 10  # every image its own draw


def test_a_pass_follows_from_the_generators_state(good):
    loader = ImageLoader(good.with_transform(random_pixel), 4, seed=1)
    list(loader)
    state = loader.generator.get_state()
    second, after = list(loader), loader.generator.get_state()
    loader.generator.set_state(state)
    batches = iter(loader)
    loader.generator.set_state(after)  # what resumed training does between making the iterator and using it
    assert all(torch.equal(a[0], b[0]) for a, b in zip(second, batches, strict=True))


def test_last_batches(good):
    assert [len(y) for _, y in ImageLoader(good, 4)] == [4, 4, 2] and len(ImageLoader(good, 4)) == 3
    dropped = ImageLoader(good, 4, drop_last=True)
    assert [len(y) for _, y in dropped] == [4, 4] and len(dropped) == 2
    only = ImageLoader(good, 16, drop_last=True)
    assert [len(y) for _, y in only] == [10] and len(only) == 1


def test_errors(good, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        ImageLoader(good, 0)
    with pytest.raises(ValueError, match="give the list a transform"):
        next(iter(ImageLoader(good.with_transform(None), 2)))
    none = ImageList(tmp_path, [("no.jpg", 0), ("neither.jpg", 0)], ["x"], mean_colour)
    with pytest.raises(
        DatasetError,
        match=r"no image can be read: 2 of 2 images skipped: 2 missing; the first is .*no\.jpg: missing \(",
    ):
        list(ImageLoader(none, 1))


def test_an_error_of_a_transform_is_not_taken_for_a_bad_image(good):
    def wrong(image):
        raise RuntimeError("a mistake in a transform")

    with pytest.raises(RuntimeError, match="a mistake in a transform"):
        list(ImageLoader(good.with_transform(wrong), 2))


def test_from_a_folder_with_bad_files_to_figures(tmp_path):
    clip = load_clip("bundled")
    for name, colour in COLOURS.items():
        for i in range(8):
            picture(tmp_path / "shapes" / f"{name} square" / f"{i}.png", colour, (50, 50))
    bad = write_bad_images(tmp_path / "shapes" / "red square" / "bad")
    present = set(bad) & {path.name for path in (tmp_path / "shapes/red square/bad").iterdir() if path.is_file()}
    data = load_dataset(tmp_path / "shapes", test=0.25, val=0)
    model = CoOp(clip, data.classes, n_ctx=2, seed=0)
    train = ImageLoader(data.train.with_transform(train_transform(clip)), 4, seed=1)
    result = fit(model, train, epochs=2, lr=0.01, seed=1, progress=False)
    test = ImageLoader(data.test.with_transform(test_transform(clip)), 4)
    figures = evaluate(model, test, progress=False)
    report = train.report + test.report
    assert result.steps > 0 and len(report.skipped) == len(present)
    assert figures.count == len(data.test) - len(test.report.skipped)
    zero_shot = ZeroShot(clip, data.classes, templates=[data.template])
    assert evaluate(zero_shot, test, progress=False).count == figures.count


def test_a_torchvision_transform_in_worker_processes(good):
    transform = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(8), v2.ToDtype(torch.float32, scale=True)])
    (images, targets), *_ = ImageLoader(good.with_transform(transform), 10, seed=1, num_workers=1)
    assert images.shape == (10, 3, 8, 8) and sorted(targets.tolist()) == [0] * 5 + [1] * 5


class Interrupted(ImageList):
    """Sends its reader what a terminal's Ctrl-C sends."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_ctrl_c_does_not_end_the_readers(good):
    images = Interrupted(good.root, good.items, good.classes, good.transform)
    assert sum(len(targets) for _, targets in ImageLoader(images, 2, num_workers=1)) == len(good)
