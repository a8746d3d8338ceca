"""The published evaluation rules."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_models.data import base_new_split, few_shot_indices, harmonic_mean, hold_out

labels = st.lists(st.integers(0, 30), min_size=2, max_size=80).filter(lambda x: len(set(x)) > 1)


@given(labels)
def test_base_and_new_halve_the_labels_and_relabel_them(values):
    base, new = base_new_split(values)
    distinct = sorted(set(values))
    assert [*base, *new] == distinct
    assert len(base) - len(new) in (0, 1)
    assert list(base.values()) == list(range(len(base))) and list(new.values()) == list(range(len(new)))


def test_published_class_counts():
    for classes, base, new in ((37, 19, 18), (47, 24, 23), (397, 199, 198), (10, 5, 5), (101, 51, 50)):
        halves = base_new_split(range(classes))
        assert (len(halves[0]), len(halves[1])) == (base, new)


def transcription_of_coop(values, shots):
    """CoOp's rule told again: group by label in order of appearance, then sample from each group.

    Its code seeds Python's global generator once, at the start of the program.
    """
    tracker = {}
    for index, label in enumerate(values):
        tracker[label] = [*tracker.get(label, []), index]
    chosen = []
    for items in tracker.values():
        chosen.extend(random.sample(items, shots) if len(items) >= shots else items)
    return chosen


@given(labels, st.integers(1, 20), st.sampled_from([1, 2, 3]))
def test_few_shot_draw_is_coops(values, shots, seed):
    state = random.getstate()
    ours = few_shot_indices(values, shots, seed)
    assert random.getstate() == state  # a library leaves the global generator alone
    random.seed(seed)
    assert ours == transcription_of_coop(values, shots)
    random.setstate(state)


@given(labels, labels, st.integers(1, 8))
def test_validation_shots_go_on_with_the_generator_of_the_training_shots(train, val, shots):
    generator = random.Random(1)
    ours = [few_shot_indices(train, shots, generator), few_shot_indices(val, 4, generator)]
    state = random.getstate()
    random.seed(1)
    assert ours == [transcription_of_coop(train, shots), transcription_of_coop(val, 4)]
    random.setstate(state)


@given(labels, st.tuples(st.floats(0, 0.45), st.floats(0, 0.45)), st.integers(0, 5))
def test_parts_held_out_are_disjoint_whole_and_leave_some_of_every_label(values, parts, seed):
    kept, *held = hold_out(values, parts, seed)
    assert sorted([*kept, *held[0], *held[1]]) == list(range(len(values)))
    assert {values[i] for i in kept} == set(values)
    for label in set(values):
        count = values.count(label)
        for part, indices in zip(parts, held, strict=True):
            assert sum(values[i] == label for i in indices) <= round(count * part)
    assert (kept, *held) == hold_out(values, parts, seed)


@pytest.mark.parametrize("parts", [(-0.1,), (1.0,), (0.5, 0.5), (float("nan"),)])
def test_parts_out_of_range(parts):
    with pytest.raises(ValueError, match="parts"):
        hold_out([0, 0, 1], parts, seed=1)


def test_published_harmonic_mean():
    assert round(harmonic_mean(82.28, 75.14), 2) == 78.55
    assert harmonic_mean(0.0, 50.0) == 0.0
    for base, new, named in ((-1, 1, "base"), (1, float("nan"), "new"), ("x", 1, "base"), (1, None, "new")):
        with pytest.raises(ValueError, match=f"{named} must be a finite number >= 0"):
            harmonic_mean(base, new)


@pytest.mark.parametrize("values", [[], [3], [3, 3]])
def test_one_label_cannot_be_halved(values):
    with pytest.raises(ValueError, match="labels.*at least two"):
        base_new_split(values)


def test_no_shots_is_an_error():
    with pytest.raises(ValueError, match="shots.*positive"):
        few_shot_indices([0, 1], 0, 1)
