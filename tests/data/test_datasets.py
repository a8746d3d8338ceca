"""Few-shot draws and halves of whole datasets, against the published rules told again."""

import math
import pickle
import random

import pytest
from trees import aircraft_tree, imagenet_tree, split_file_tree

from cdc_models.data import find_published, load_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*figures will not compare")


@pytest.fixture
def pets(tmp_path):
    split_file_tree(tmp_path, find_published("OxfordPets"), classes=7, images=12, pictures=False)
    return load_dataset("OxfordPets", tmp_path)


def published_run(data, shots, seed, half):
    """The published program from its start: seed, draw train, draw val, take the half by train's labels."""
    state = random.getstate()
    random.seed(seed)
    drawn = []
    for items, count in ((data.train.items, shots), (data.val.items, min(shots, 4))):
        groups = {}
        for item in items:
            groups.setdefault(item[1], []).append(item)
        picked = []
        for group in groups.values():
            picked.extend(random.sample(group, count) if len(group) >= count else group)
        drawn.append(picked)
    random.setstate(state)
    labels = sorted({label for _, label in drawn[0]})
    middle = math.ceil(len(labels) / 2)
    chosen = labels[:middle] if half == "base" else labels[middle:]
    number = {label: i for i, label in enumerate(chosen)}
    return [[(p, number[y]) for p, y in part if y in number] for part in (*drawn, data.test.items)]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("half", ["base", "new"])
def test_the_published_protocol(pets, seed, shots, half):
    ours = pets.few_shot(shots, seed).half(half)
    assert [ours.train.items, ours.val.items, ours.test.items] == published_run(pets, shots, seed, half)


def test_an_odd_number_of_classes_gives_base_one_more(pets):
    base, new = pets.half("base"), pets.half("new")
    assert base.classes == ("thing_0", "thing_1", "thing_2", "thing_3")
    assert new.classes == ("thing_4", "thing_5", "thing_6")
    assert set(new.test.targets.tolist()) == {0, 1, 2} and new.test.classes == new.classes
    assert len(base.train) + len(new.train) == len(pets.train)


def test_shots_of_aircraft_follow_the_order_of_its_lists(tmp_path):
    aircraft_tree(tmp_path)
    data = load_dataset("FGVCAircraft", tmp_path)
    ours = data.few_shot(2, 1).half("new")
    assert [ours.train.items, ours.val.items, ours.test.items] == published_run(data, 2, 1, "new")


def test_without_a_validation_split_its_shots_come_from_the_rest_of_train(tmp_path):
    imagenet_tree(tmp_path)
    data = load_dataset("ImageNet", tmp_path)
    few = data.few_shot(2, 1)
    assert few.train.items == published_run(data, 2, 1, "base")[0] + [
        (p, y + 2) for p, y in published_run(data, 2, 1, "new")[0]
    ]
    assert sorted(few.val.targets.tolist()) == [0, 1, 2, 3]  # 3 images a class, 2 of them shots
    assert not set(few.val.paths) & set(few.train.paths)


def test_bad_arguments(pets):
    with pytest.raises(ValueError, match="shots"):
        pets.few_shot(0, 1)
    with pytest.raises(ValueError, match="which: expected 'base' or 'new', got 'old'"):
        pets.half("old")


def test_datasets_can_be_pickled(pets):
    again = pickle.loads(pickle.dumps(pets))
    assert again.train.items == pets.train.items and again.classes == pets.classes
