"""The papers' datasets, read from small trees in each published layout."""

import json
import warnings
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import (
    SPLIT_FILES,
    SYNSETS,
    aircraft_tree,
    classnames,
    imagenet_tree,
    picture,
    split_file_tree,
    variant_tree,
)

from cdc_models.data import (
    BASE_TO_NEW,
    IMAGENET_VARIANTS,
    DatasetError,
    base_new_split,
    find_published,
    load_dataset,
    scan,
)
from cdc_models.prompts.templates import HAND_CRAFTED

# the trees have fewer classes than the datasets; one test is about that warning
pytestmark = pytest.mark.filterwarnings("ignore:.*figures will not compare")
ALL = BASE_TO_NEW + IMAGENET_VARIANTS


def test_there_are_eleven_and_four_with_their_templates_and_published_halves():
    assert (len(BASE_TO_NEW), len(IMAGENET_VARIANTS)) == (11, 4)
    assert {d.name for d in ALL} == set(HAND_CRAFTED)
    new = {d.name: len(base_new_split(range(d.classes))[1]) for d in BASE_TO_NEW}
    assert new == {
        "ImageNet": 500, "Caltech101": 50, "OxfordPets": 18, "StanfordCars": 98, "OxfordFlowers": 51, "Food101": 50,
        "FGVCAircraft": 50, "SUN397": 198, "DescribableTextures": 23, "EuroSAT": 5, "UCF101": 50,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("imagenet", "ImageNet"), ("caltech-101", "Caltech101"), ("oxford_pets", "OxfordPets"),
        ("stanford-cars", "StanfordCars"), ("Flowers102", "OxfordFlowers"), ("food-101", "Food101"),
        ("fgvc_aircraft", "FGVCAircraft"), ("sun397", "SUN397"), ("DTD", "DescribableTextures"),
        ("eurosat", "EuroSAT"), ("UCF101", "UCF101"), ("ImageNet-V2", "ImageNetV2"),
        ("imagenet_sketch", "ImageNetSketch"), ("imagenet-a", "ImageNetA"), ("imagenet-rendition", "ImageNetR"),
    ],
)  # fmt: skip
def test_spellings(spelling, name):
    assert find_published(spelling).name == name
    assert find_published("cifar10") is None


@pytest.mark.parametrize("dataset", SPLIT_FILES, ids=lambda d: d.name)
def test_split_files(tmp_path, dataset):
    written = split_file_tree(tmp_path, dataset)
    data = load_dataset(dataset.name, tmp_path)
    assert data.name == dataset.name and data.template == HAND_CRAFTED[dataset.name]
    assert data.classes == ("thing_0", "thing_1", "thing_2")
    for part in ("train", "val", "test"):
        assert [[p, y] for p, y in getattr(data, part).items] == [[p, y] for p, y, _ in written[part]]
        assert not scan(getattr(data, part), progress=False).skipped
        assert not getattr(data, part).orient  # the published readers leave EXIF orientation alone


def test_aircraft(tmp_path):
    variants = aircraft_tree(tmp_path)
    data = load_dataset("fgvc_aircraft", tmp_path)
    assert data.classes == tuple(variants)
    assert data.train.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert (len(data.val), len(data.test)) == (8, 8)
    assert data.test.paths[4] == "te20.jpg" and data.classes[data.test.targets[4]] == "Falcon 900"
    assert not scan(data.test, progress=False).skipped


def test_imagenet(tmp_path):
    imagenet_tree(tmp_path)
    data = load_dataset("ImageNet", tmp_path)
    assert data.classes == tuple(SYNSETS.values())
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert data.test.items == [(f"images/val/{w}/ILSVRC2012_val_1.JPEG", i) for i, w in enumerate(SYNSETS)]
    assert len(data.val) == 0  # CoOp takes the test images, which no choice should see
    assert not scan(data.train, progress=False).skipped


def test_labels_agree_where_train_and_val_have_not_the_same_folders(tmp_path):
    imagenet_tree(tmp_path)
    for image in (tmp_path / "imagenet/images/val/n01440764").iterdir():
        image.unlink()
    (tmp_path / "imagenet/images/val/n01440764").rmdir()
    data = load_dataset("ImageNet", tmp_path)
    assert data.test.targets.tolist() == [1, 2, 3] and data.classes[3] == "flamingo"


@pytest.mark.parametrize("name", ["ImageNetSketch", "ImageNetA", "ImageNetR"])
def test_variants_label_the_folders_they_have(tmp_path, name):
    classnames(variant_tree(tmp_path, name, ["n02007558", "n01443537"]))
    data = load_dataset(name, tmp_path)
    assert data.classes == ("goldfish", "flamingo")
    assert data.test.targets.tolist() == [0, 1] and "n01443537" in data.test.paths[0]
    assert len(data.train) == len(data.val) == 0


def test_imagenet_v2_numbers_its_folders_by_the_lines_of_classnames(tmp_path):
    names = {f"n{i:08d}": f"name {i}" for i in range(12)}
    classnames(variant_tree(tmp_path, "ImageNetV2", map(str, range(12))), names)
    data = load_dataset("imagenetv2", tmp_path)
    assert data.classes == tuple(f"name {i}" for i in range(12))
    assert all(f"/{label}/" in path for path, label in data.test.items)  # and not the order "0", "1", "10", "11", "2"


def test_variants_use_imagenets_classnames_if_they_have_none(tmp_path):
    variant_tree(tmp_path, "ImageNetA", ["n02007558"])
    with pytest.raises(DatasetError, match="imagenet-adversarial, where these are missing: classnames.txt"):
        load_dataset("imagenet-a", tmp_path)
    classnames(tmp_path / "imagenet")
    assert load_dataset("imagenet-a", tmp_path).classes == ("flamingo",)


def test_classes_that_share_a_name_are_told_apart(tmp_path):
    alike = {"n03773504": "missile", "n04008634": "missile", "n04355933": "sunglasses", "n04356056": "sunglasses"}
    imagenet_tree(tmp_path, alike)
    assert load_dataset("ImageNet", tmp_path).classes == ("missile", "projectile", "sunglass", "sunglasses")


def test_a_dataset_that_is_not_whole_is_said_to_be_so(tmp_path):
    eurosat = find_published("EuroSAT")
    split_file_tree(tmp_path, eurosat, classes=9, pictures=False)
    with pytest.warns(UserWarning, match=r"EuroSAT: expected 10 classes, found 9 in .*eurosat"):
        load_dataset("EuroSAT", tmp_path)
    split_file_tree(tmp_path, eurosat, classes=10, pictures=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_dataset("EuroSAT", tmp_path).classes) == 10


@pytest.mark.parametrize("dataset", ALL, ids=lambda d: d.name)
def test_one_sentence_for_a_dataset_that_is_not_there(tmp_path, dataset):
    with pytest.raises(DatasetError) as error:
        load_dataset(dataset.name, tmp_path)
    sentence = str(error.value)
    assert sentence.startswith(
        f"{dataset.name} is looked for in {tmp_path / dataset.folder}, where these are missing: "
    )
    assert "\n" not in sentence
    for need in dataset.layout.missing(tmp_path):
        assert need in sentence


def test_only_what_is_missing_is_named(tmp_path):
    (tmp_path / "eurosat/2750").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"missing: split_zhou_EuroSAT\.json$"):
        load_dataset("EuroSAT", tmp_path)


GOOD = ["a.png", 0, "thing"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"train": [["a", ' + "9" * 5000 + ', "x"]]}', "expected JSON"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("[]", 'expected {"train"'),
        ({"train": [GOOD], "val": []}, 'expected {"train"'),
        ({"train": [GOOD, ["a.png", 0]], "val": [], "test": []}, r"train\[1\]: expected \[path, whole number"),
        ({"train": [["a.png", "0", "x"]], "val": [], "test": []}, r"train\[0\]: expected"),
        ({"train": [], "val": [["a.png", True, "x"]], "test": []}, r"val\[0\]: expected"),
        ({"train": [["a.png", 0, " "]], "val": [], "test": []}, r"train\[0\]: expected"),
        ({"train": [GOOD], "val": [["b.png", 0, "other"]], "test": []}, "label 0 is both 'thing' and 'other'"),
        ({"train": [["/etc/passwd", 0, "x"]], "val": [], "test": []}, "stay inside"),
        ({"train": [["a/../../b.png", 0, "x"]], "val": [], "test": []}, "stay inside"),
        ({"train": [["", 0, "x"]], "val": [], "test": []}, "stay inside"),
        ({"train": [["a\0b", 0, "x"]], "val": [], "test": []}, "stay inside"),
    ],
)  # fmt: skip
def test_split_files_that_are_not_as_published(tmp_path, content, message):
    (tmp_path / "eurosat/2750").mkdir(parents=True)
    file = tmp_path / "eurosat/split_zhou_EuroSAT.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        load_dataset("EuroSAT", tmp_path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("a/../../b.png")
ROWS = st.tuples(st.text(max_size=8) | LEAVES, st.integers(0, 3) | LEAVES, st.sampled_from("xyz") | LEAVES).map(list)
PARTS = st.lists(ROWS | LEAVES, max_size=4) | LEAVES
SPLIT = st.dictionaries(st.sampled_from(["train", "val", "test", "x"]), PARTS) | LEAVES


@given(st.builds(lambda data, cut: json.dumps(data)[: -cut or None], SPLIT, st.integers(0, 2)) | st.text())
def test_no_split_file_ends_in_another_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "eurosat"
    (folder / "2750").mkdir(parents=True, exist_ok=True)
    (folder / "split_zhou_EuroSAT.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with suppress(DatasetError):
        data = load_dataset("EuroSAT", folder.parent)
        assert all(
            0 <= label < len(data.classes) for part in (data.train, data.val, data.test) for _, label in part.items
        )


def test_other_layouts_that_are_not_as_published(tmp_path):
    aircraft_tree(tmp_path)
    with (tmp_path / "fgvc_aircraft/images_variant_val.txt").open("a") as lines:
        lines.write("123 Concorde\n")
    with pytest.raises(DatasetError, match="images_variant_val.txt, line 9: 'Concorde' is not in variants.txt"):
        load_dataset("FGVCAircraft", tmp_path)

    imagenet_tree(tmp_path)
    picture(tmp_path / "imagenet/images/train/n99999999/0.jpg")
    with pytest.raises(DatasetError, match="folder 'n99999999' stands for no line of .*classnames.txt"):
        load_dataset("ImageNet", tmp_path)
    (tmp_path / "imagenet/classnames.txt").write_text("n01440764\n")
    with pytest.raises(DatasetError, match="classnames.txt, line 1: expected"):
        load_dataset("ImageNet", tmp_path)

    classnames(tmp_path / "imagenet-rendition")
    (tmp_path / "imagenet-rendition/imagenet-r").write_text("a file where a folder should be")
    with pytest.raises(DatasetError, match="cannot be read as a folder"):
        load_dataset("ImageNetR", tmp_path)


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="classes: EuroSAT has its own"):
        load_dataset("EuroSAT", tmp_path, classes=["a"])
    with pytest.raises(ValueError, match="template"):
        load_dataset("EuroSAT", tmp_path, template="a photo")
    with pytest.raises(DatasetError, match="no such folder or table, and it is none of the names ImageNet, Caltech101"):
        load_dataset("cifar10", tmp_path)
