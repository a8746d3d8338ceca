"""The bundled benchmark and the composer of its images."""

import json
import zipfile
from importlib.resources import files

import pytest
import torch
from torch.utils.data import DataLoader

from cdc_models.data import ImageSet, compose_scenes, emoji_benchmark

SMALL = {"shots": 2, "val_shots": 1, "test_per_class": 1}


@pytest.fixture(scope="module")
def index():
    with zipfile.ZipFile(files("cdc_models").joinpath("bundled/benchmark.zip")) as archive:
        assert archive.testzip() is None
        return json.loads(archive.read("index.json"))


def test_no_class_is_in_two_splits(index):
    names = [n for part in index["splits"].values() for split in part for half in split.values() for n in half]
    assert len(names) == len(set(names)) == 700
    assert len(index["splits"]["test"]) == 5 and len(index["splits"]["validation"]) == 2


def test_every_class_is_drawn_by_the_target_artist_and_another(index):
    target, *others = sorted(index["artwork"], key=lambda a: a != index["target_artist"])
    for part in index["splits"].values():
        for split in part:
            for name in split["base"] + split["new"]:
                assert name in index["artwork"][target]
                assert any(name in index["artwork"][a] for a in others)


def test_licences_stand_beside_the_artwork():
    folder = files("cdc_models").joinpath("bundled/LICENSES")
    attribution = folder.joinpath("ATTRIBUTION.md").read_text()
    for artist in ("Twemoji", "FxEmojis", "Streamline"):
        assert artist in attribution
    assert folder.joinpath("Apache-2.0.txt").is_file() and folder.joinpath("CC-BY-4.0.txt").is_file()


def test_seed_draws_the_shots_and_leaves_the_tests_alone():
    first, again, other = (emoji_benchmark(0, seed, **SMALL) for seed in (1, 1, 2))
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, other.train.images)
    assert torch.equal(first.base_test.images, other.base_test.images)
    assert not set(first.base_test.classes) & set(first.new_test.classes)


def test_transfer_changes_the_shots_only():
    artist, transfer = (emoji_benchmark(1, 1, task=task, **SMALL) for task in ("artist", "transfer"))
    assert not torch.equal(artist.train.images, transfer.train.images)
    assert torch.equal(artist.new_test.images, transfer.new_test.images)


def test_it_is_an_ordinary_dataset():
    data = emoji_benchmark(0, 1, **SMALL).train.with_transform(lambda image: image.float() / 255)
    images, targets = next(iter(DataLoader(data, batch_size=4)))
    assert images.shape == (4, 3, 48, 48) and images.dtype == torch.float32 and targets.tolist() == [0, 0, 1, 1]
    assert len(data) == 100 and len(data.classes) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "other"}, "task"),
        ({"partition": "train"}, "partition"),
        ({"split": 5}, "split.*0 to 4"),
        ({"partition": "validation", "split": 2}, "split.*0 to 1"),
        ({"shots": 0}, "shots"),
        ({"seed": 1000}, "seed"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        emoji_benchmark(**{"split": 0, "seed": 1, **change})


def test_image_set_refuses_what_does_not_fit():
    images, targets = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="images.*uint8"):
        ImageSet(images.float(), targets, ["a", "b"])
    with pytest.raises(ValueError, match="targets.*int64"):
        ImageSet(images, targets[:1], ["a", "b"])
    with pytest.raises(ValueError, match=r"targets.*\[0, 1\)"):
        ImageSet(images, targets, ["a"])


def sprites(count=8):
    art = torch.zeros(count, 4, 32, 32, dtype=torch.uint8)
    art[:, 0, 8:24, 8:24] = 255
    art[:, 3, 8:24, 8:24] = 255
    return art


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
def test_scenes_are_images_and_reproducible(hardness):
    draws = [
        compose_scenes(sprites(), size=48, hardness=hardness, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert draws[0].shape == (8, 3, 48, 48) and draws[0].dtype == torch.float32
    assert draws[0].min() >= 0 and draws[0].max() <= 1


def test_easiest_scenes_show_the_artwork_where_it_is():
    scene = compose_scenes(sprites(1), size=32, hardness=0.0, generator=torch.Generator().manual_seed(0))[0]
    assert torch.allclose(scene[:, 16, 16], torch.tensor([1.0, 0.0, 0.0]), atol=0.02)
    corner = scene[:, 0, 0]
    assert torch.allclose(scene[:, 31, 31], corner, atol=1e-5)  # plain background


def test_one_scene_alone_and_bad_sprites():
    assert compose_scenes(sprites(1), size=16, generator=torch.Generator().manual_seed(0)).isfinite().all()
    with pytest.raises(ValueError, match="sprites.*uint8"):
        compose_scenes(sprites().float(), size=16)
    with pytest.raises(ValueError, match="hardness"):
        compose_scenes(sprites(), size=16, hardness=1.5)
