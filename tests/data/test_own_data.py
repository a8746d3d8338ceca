"""Data of one's own: folders of classes, CSV and Parquet files."""

import builtins
import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import picture

from cdc_models.data import DatasetError, load_dataset, scan


def folder_of(root, counts, below=""):
    for name, count in counts.items():
        (root / below / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(root / below / name / f"{i}.png")
    return root


def test_class_folders(tmp_path):
    folder = folder_of(tmp_path / "my_photos", {"teapot": 10, "dog": 10, "rare thing": 1, "none yet": 0})
    picture(folder / "dog/summer/2024/rex.jpg")
    picture(folder / "dog/.hidden.jpg")
    picture(folder / ".cache/x.jpg")
    (folder / "notes.txt").write_text("beside the classes")
    data = load_dataset(folder)
    assert data.name == "my_photos" and data.template == "a photo of a {}."
    assert data.classes == ("dog", "none yet", "rare thing", "teapot")
    found = sorted(data.train.items + data.val.items + data.test.items)
    assert len(found) == 22 and ("dog/summer/2024/rex.jpg", 0) in found
    assert data.train.orient  # EXIF orientation is applied to one's own photographs
    assert [sum(y == 3 for _, y in part.items) for part in (data.train, data.val, data.test)] == [7, 1, 2]
    assert [sum(y == 2 for _, y in part.items) for part in (data.train, data.val, data.test)] == [1, 0, 0]
    assert not scan(data.train, progress=False).skipped


def test_the_draw_of_the_test_set_is_the_seeds(tmp_path):
    folder = folder_of(tmp_path, {"a": 20, "b": 20})
    first, again, other = (load_dataset(folder, split_seed=seed).test.paths for seed in (1, 1, 2))
    assert first == again != other
    assert len(load_dataset(folder, test=0, val=0).train) == 40
    with pytest.raises(ValueError, match="test, val: expected parts"):
        load_dataset(folder, test=0.7, val=0.3)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "testing")])
def test_split_folders(tmp_path, names):
    for part, counts in zip(names, ({"cat": 4, "dog": 4}, {"dog": 2}, {"cat": 1, "owl": 3}), strict=True):
        folder_of(tmp_path, counts, part)
    (tmp_path / names[0] / "README.txt").write_text("beside the classes")
    data = load_dataset(tmp_path)
    assert data.classes == ("cat", "dog", "owl")
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 4)
    assert data.test.targets.tolist() == [0, 2, 2, 2]


def test_a_split_that_is_missing_is_drawn_from_train(tmp_path):
    folder_of(tmp_path, {"cat": 10, "dog": 10}, "train")
    folder_of(tmp_path, {"cat": 1, "dog": 1}, "val")
    data = load_dataset(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 2, 4)
    test_only = folder_of(tmp_path / "only", {"cat": 3}, "test")
    assert [len(getattr(load_dataset(test_only), part)) for part in ("train", "val", "test")] == [0, 0, 3]


def test_train_may_be_a_vehicle(tmp_path):
    folder_of(tmp_path, {"train": 3, "bus": 3})
    assert load_dataset(tmp_path).classes == ("bus", "train")
    folder_of(tmp_path / "two", {"train": 3, "test": 3})  # two classes with such names
    assert load_dataset(tmp_path / "two").classes == ("test", "train")


def test_folders_that_cannot_be_understood(tmp_path):
    folder_of(tmp_path / "mixed", {"cat": 1}, "train")
    folder_of(tmp_path / "mixed", {"cat": 1})
    with pytest.raises(
        DatasetError, match=r"mixed: expected folders of splits or of classes, got both: 'train' and 'cat'"
    ):
        load_dataset(tmp_path / "mixed")
    picture(tmp_path / "loose/train/0.png")
    folder_of(tmp_path / "loose", {"cat": 1}, "test")
    with pytest.raises(DatasetError, match=r"train: expected a folder for each class, got 1 file"):
        load_dataset(tmp_path / "loose")
    folder_of(tmp_path / "twice", {"cat": 1}, "val")
    folder_of(tmp_path / "twice", {"cat": 1}, "valid")
    with pytest.raises(DatasetError, match="one folder for each split, got 'val', 'valid'"):
        load_dataset(tmp_path / "twice")
    picture(tmp_path / "flat/1.png")
    with pytest.raises(DatasetError, match=r"flat: expected a folder for each class, got none and 1 other file"):
        load_dataset(tmp_path / "flat")
    with pytest.raises(ValueError, match="root: is for a name or a table"):
        load_dataset(tmp_path / "flat", root=tmp_path)


def test_classes_of_a_folder_can_be_put_in_order(tmp_path):
    folder_of(tmp_path, {"cat": 2, "dog": 2})
    assert load_dataset(tmp_path, classes=["owl", "dog", "cat"], test=0, val=0).train.targets.tolist() == [2, 2, 1, 1]
    with pytest.raises(DatasetError, match="not among `classes`: 'dog'"):
        load_dataset(tmp_path, classes=["cat"])
    with pytest.raises(ValueError, match="classes: expected distinct names"):
        load_dataset(tmp_path, classes=["cat", "cat", "dog"])


def test_links_that_lead_back_are_not_followed_for_ever(tmp_path):
    folder_of(tmp_path, {"cat": 2, "dog": 2})
    os.symlink(tmp_path / "cat", tmp_path / "cat/again")
    assert len(load_dataset(tmp_path, test=0, val=0).train) == 4


def test_numbered_folders_count_as_numbers(tmp_path):
    folder_of(tmp_path, {"10": 1, "9": 1})
    assert load_dataset(tmp_path).classes == ("9", "10")


TABLE = "path,label,split\ncat/0.png,cat,train\ndog/0.png,dog,train\ncat/1.png,cat,test\ndog/1.png,dog,valid\n"


@pytest.fixture
def photos(tmp_path):
    return folder_of(tmp_path, {"cat": 3, "dog": 3})


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "\ufeff" + TABLE,
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace("path,label,split", "File_Name, Class ,SET").replace("\n", "\r\n\r\n"),
        "index,split,label,path\n"
        + "".join(f"7,{s},{y},{p}\n" for p, y, s in (line.split(",") for line in TABLE.split()[1:])),
    ],
)
def test_csv_with_splits(photos, text):
    data = load_dataset(write(photos / "list.csv", text))
    assert data.name == "list" and data.classes == ("cat", "dog")
    assert data.train.items == [("cat/0.png", 0), ("dog/0.png", 1)]
    assert data.test.items == [("cat/1.png", 0)] and data.val.items == [("dog/1.png", 1)]
    assert not scan(data.train, progress=False).skipped


def test_csv_of_two_columns_without_a_heading(photos):
    data = load_dataset(write(photos / "list.csv", 'cat/0.png,cat\n"dog/0.png","dog, small"\n'), test=0, val=0)
    assert data.classes == ("cat", "dog, small") and data.train.targets.tolist() == [0, 1]


def test_numbers_as_labels(photos):
    file = write(photos / "list.csv", "path,label\ncat/0.png,10\ndog/0.png,9\n")
    data = load_dataset(file, test=0, val=0)
    assert data.classes == ("9", "10") and data.train.targets.tolist() == [1, 0]
    names = [f"name {i}" for i in range(11)]
    data = load_dataset(file, test=0, val=0, classes=names)
    assert data.classes == tuple(names) and data.train.targets.tolist() == [10, 9]
    with pytest.raises(DatasetError, match="not among the 3 names of `classes`: '10', '9'"):
        load_dataset(file, classes=names[:3])


def test_paths_of_a_table_start_at_its_root_and_stay_inside(photos, tmp_path):
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    file = write(elsewhere / "list.csv", f"path,label\ncat/0.png,cat\n{photos}/dog/0.png,dog\n")
    data = load_dataset(file, root=photos, test=0, val=0)
    assert data.train.paths == ("cat/0.png", "dog/0.png")
    assert not scan(data.train, progress=False).skipped
    with pytest.raises(DatasetError, match=r"image 2: .* is outside .*lists; give a `root` that holds it"):
        load_dataset(file)
    with pytest.raises(DatasetError, match="stay inside"):
        load_dataset(write(elsewhere / "up.csv", "path,label\n../cat/0.png,cat\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one image"),
        ("path,label\n", "at least one image"),
        ("picture,what\na.png,cat\n", "expected columns"),
        ("a.png\n", "expected columns"),
        ("file,image,label\na.png,b.png,cat\n", "expected columns"),
        ("path,label\na.png\n", "row 2: expected 2 cells, got 1"),
        ("path,label\na.png,\n", "image 1: expected a path and a label"),
        ("path,label\n,cat\n", "image 1: expected a path and a label"),
        ("path,label,split\na.png,cat,dev\n", "expected train, val or test as split, got 'dev'"),
        ('path,label\n"a.png,' + "x" * 200_000, "cannot be read as a CSV file"),
    ],
)
def test_tables_that_cannot_be_understood(tmp_path, text, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset(write(tmp_path / "list.csv", text))


def test_a_table_that_is_not_text(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,cat\n")
    with pytest.raises(DatasetError, match="cannot be read as a CSV file"):
        load_dataset(tmp_path / "list.csv")
    (tmp_path / "list.txt").write_text("path,label\n")
    with pytest.raises(DatasetError, match=r"list.txt: expected a folder, or a table that ends in \.csv"):
        load_dataset(tmp_path / "list.txt")


CELLS = st.sampled_from(
    ["path", "label", "split", "a.png", "../a.png", "/a", "cat", "train", "", '"', "9" * 5000, "\0"]
)
LINES = st.lists(st.lists(CELLS | st.text(max_size=5), max_size=4).map(",".join), max_size=5).map("\n".join)


@given(LINES)
def test_no_table_ends_in_another_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    with suppress(DatasetError):
        assert len(load_dataset(file).classes) > 0


def test_parquet(photos):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = ["cat/0.png", "dog/0.png", "cat/1.png"]
    file = photos / "list.parquet"
    for labels in (["cat", "dog", "cat"], [3, 12, 3], [b"cat", b"dog", b"cat"]):
        table = arrow.table({"split": ["train", "train", "test"], "size": [1, 2, 3], "label": labels, "path": paths})
        parquet.write_table(table, file)
        data = load_dataset(file)
        assert data.classes == (("3", "12") if labels[0] == 3 else ("cat", "dog"))
        assert data.train.items == [("cat/0.png", 0), ("dog/0.png", 1)] and data.test.items == [("cat/1.png", 0)]
    dictionary = arrow.array(["cat", "dog", None]).dictionary_encode()
    parquet.write_table(arrow.table({"label": dictionary, "path": paths}), file)
    with pytest.raises(DatasetError, match="image 3: expected a path and a label"):
        load_dataset(file)
    parquet.write_table(arrow.table({"label": ["cat"]}), file)
    with pytest.raises(DatasetError, match="expected columns"):
        load_dataset(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="cannot be read as a Parquet file"):
        load_dataset(file)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"reading Parquet needs pyarrow; pip install 'cdc-ops\[data\]'$"):
        load_dataset(tmp_path / "list.parquet")
