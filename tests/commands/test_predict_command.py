"""`cdc predict` end to end: rows, parts, going on, sources of images; and that memory holds one part."""

import json
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from cdc_models import ZeroShot, load_adapter, load_clip
from cdc_models.data import DatasetError, image_paths, open_image, test_transform
from cdc_models.methods import CDC
from cdc_models.shards import COLUMNS, predict_images, predict_shards


def parquet_rows(folder):
    import pyarrow.parquet

    return [
        row for part in sorted(folder.glob("part-*.parquet")) for row in pyarrow.parquet.read_table(part).to_pylist()
    ]


def json_rows(folder):
    return [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


@pytest.fixture
def adapter(trained):
    return f"--adapter={trained / 'adapter.safetensors'}"


def test_a_row_for_every_image(trained, adapter, photos, cdc_json, tmp_path):
    out = tmp_path / "out"
    said = cdc_json("predict", f"--images={photos}", adapter, f"--out={out}", "--shard_size=12", "--test_batch=5")
    assert (said["images"], said["parts"], said["skipped"]) == (30, 3, 1) and said["by_reason"] == {"not an image": 1}
    rows = parquet_rows(out)
    assert [row["path"] for row in rows] == list(image_paths(photos)) and tuple(rows[0]) == COLUMNS
    (bad,) = (row for row in rows if row["skipped"])
    assert bad["path"] == str(photos / "red square/0.png") and bad["skipped"].startswith("not an image (")
    assert all(bad[name] is None for name in COLUMNS if name not in ("path", "skipped"))

    clip = load_clip("bundled")
    model, transform = load_adapter(trained / "adapter.safetensors", clip), test_transform(clip)
    good = [row for row in rows if not row["skipped"]]
    own = model.predict(torch.stack([transform(open_image(row["path"])) for row in good]))
    assert [row["class"] for row in good] == own.labels()
    for name, expected in {
        "probability": own.prob.amax(-1),
        "belief": own.belief.gather(1, own.classes[:, None])[:, 0],
        "uncertainty": own.uncertainty,
        "conflict": own.conflict,
        "template_uncertainty": own.prompt_uncertainty,
    }.items():
        assert torch.allclose(torch.tensor([row[name] for row in good]), expected, atol=1e-5), name


def test_both_formats_and_zero_shot(photos, cdc_json, tmp_path):
    classes = '--classes=["red square", "blue square"]'
    arguments = ("predict", f"--images={photos}", "--backbone=bundled", classes, "--template=a {}.")
    cdc_json(*arguments, f"--out={tmp_path / 'p'}")
    cdc_json(*arguments, f"--out={tmp_path / 'j'}", "--format=jsonl")
    arrow, lines = parquet_rows(tmp_path / "p"), json_rows(tmp_path / "j")
    assert [{**row, "probability": None, "uncertainty": None} for row in arrow] == [
        {**row, "probability": None, "uncertainty": None} for row in lines
    ]
    assert {row["class"] for row in arrow} == {"red square", "blue square", None} and arrow[0]["belief"] is None
    own = ZeroShot(load_clip("bundled"), ["red square", "blue square"], "a {}.")
    again = predict_images(own, [arrow[0]["path"]])
    assert again[0]["probability"] == pytest.approx(lines[0]["probability"], abs=1e-6)


def test_it_goes_on_with_the_parts_that_are_missing(adapter, photos, cdc, tmp_path, monkeypatch):
    arguments = ("predict", f"--images={photos}", adapter, f"--out={tmp_path}", "--shard_size=10")
    predict, calls = CDC.predict, []

    def interrupt_the_second(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(CDC, "predict", interrupt_the_second)
    status, _, err = cdc(*arguments)
    assert status == 130 and "the same command goes on from there" in err
    assert [path.name for path in sorted(tmp_path.glob("part-*"))] == ["part-00000.parquet"]
    first = (tmp_path / "part-00000.parquet").stat().st_mtime_ns
    (tmp_path / f"part-00001.parquet.{16 * '0'}.part").write_bytes(b"cut off")
    calls[:] = [0] * 2
    status, out, _ = cdc(*arguments)
    assert status == 0 and calls[2:] == [10, 9] and "1 skipped: 1 not an image" in out
    assert (tmp_path / "part-00000.parquet").stat().st_mtime_ns == first and len(parquet_rows(tmp_path)) == 30
    calls[:] = [0] * 2
    assert cdc(*arguments)[0] == 0 and calls == [0] * 2


def test_parts_of_other_images_or_another_classifier_are_refused(trained, photos, cdc, tmp_path):
    import shutil

    adapter, pictures, out = tmp_path / "a.safetensors", tmp_path / "pictures", tmp_path / "out"
    shutil.copy(trained / "adapter.safetensors", adapter)
    shutil.copytree(photos / "blue square", pictures)
    arguments = ("predict", f"--images={pictures}", f"--adapter={adapter}", f"--out={out}")
    assert cdc(*arguments)[0] == 0
    assert "another run (shard_size: 10000 there, 9 here)" in cdc(*arguments, "--shard_size=9")[2]
    assert "holds the run of another command" in cdc(*arguments, f"--out={trained}")[2]
    shutil.copy(photos / "red square/1.png", pictures / "00.png")
    status, _, err = cdc(*arguments)
    assert status == 2 and "holds predictions of other images" in err
    (pictures / "00.png").unlink()
    other = load_adapter(adapter, load_clip("bundled")).with_classes(["red square", "blue square"])
    from cdc_models import save_adapter

    save_adapter(other, adapter)
    status, _, err = cdc(*arguments)
    assert status == 2 and "of another classifier" in err


def test_memory_holds_one_part(bundled, photos, tmp_path):
    good = str(photos / "blue square/1.png")
    asked = []

    def endless():
        for i in count():
            asked.append(i)
            yield good

    parts = predict_shards(ZeroShot(bundled, ["dog", "teapot"]), endless(), tmp_path, shard_size=3, format="jsonl")
    assert len(next(parts)) == 3 and len(asked) == 3
    assert len(next(parts)) == 3 and len(asked) == 6


def test_a_part_of_nothing_but_broken_images(bundled, tmp_path):
    (tmp_path / "x.png").write_bytes(b"x")
    rows = predict_images(ZeroShot(bundled, ["dog", "teapot"]), [f"{tmp_path}/./x.png", "no/such.png"])
    assert [row["skipped"].split(" (")[0] for row in rows] == ["not an image", "missing"]


def test_where_images_come_from(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "b/.hidden").mkdir(parents=True)
    for name in ("b/2.png", "b/10.png", "a.png", "b/.hidden/no.png"):
        (tmp_path / name).touch()
    (tmp_path / "b/loop").symlink_to(tmp_path)
    assert [Path(p).relative_to(tmp_path).as_posix() for p in image_paths(tmp_path)] == ["a.png", "b/10.png", "b/2.png"]

    (tmp_path / "list.txt").write_text("a.png\n\n/abs/c.png\r\n")
    assert list(image_paths(tmp_path / "list.txt")) == ["a.png", "/abs/c.png"]
    assert list(image_paths(tmp_path / "list.txt", "r")) == ["r/a.png", "/abs/c.png"]

    (tmp_path / "t.csv").write_text("label;Path\ncat;a.png\n\ndog;b/2.png\n")
    expected = [str(tmp_path / name) for name in ("a.png", "b/2.png")]
    assert list(image_paths(tmp_path / "t.csv")) == expected
    (tmp_path / "t.csv").write_text("a.png\nb/2.png\n")
    assert list(image_paths(tmp_path / "t.csv")) == expected
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png", str(tmp_path / "b/2.png")]}), tmp_path / "t.parquet")
    assert list(image_paths(tmp_path / "t.parquet")) == expected

    for content, message in (
        ("name\nx\n", "column"),
        ("path\n../x.png\n", "stay inside"),
        ("path\n/etc/x.png\n", "inside"),
    ):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(DatasetError, match=message):
            list(image_paths(tmp_path / "t.csv"))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.parquet").write_bytes(b"no")
    for name in ("list.txt", "bad.parquet"):
        with pytest.raises(DatasetError, match="cannot be read"):
            list(image_paths(tmp_path / name))


def test_a_fault_at_the_end_of_a_table_is_found_at_its_beginning(tmp_path):
    (tmp_path / "t.csv").write_text("path\n" + "a.png\n" * 100 + "../b.png\n")
    with pytest.raises(DatasetError, match="stay inside"):
        image_paths(tmp_path / "t.csv")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"path": [{"x": 1}]}), tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match="expected text or numbers"):
        image_paths(tmp_path / "t.parquet")


def test_a_folder_that_may_not_be_read_is_a_row(bundled, tmp_path, monkeypatch):
    from cdc_models.data import class_folders, listing, load_dataset

    for name in ("x/a.png", "x/closed/b.png", "y/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def look(folder):  # tests may run as root, whom no permission stops
        if folder.name == "closed":
            raise DatasetError("permission denied")
        return listing.look(folder)

    monkeypatch.setattr(sys.modules["cdc_models.data.image_paths"], "look", look)
    monkeypatch.setattr(class_folders, "look", look)
    paths = list(image_paths(tmp_path))
    assert [Path(path).relative_to(tmp_path).as_posix() for path in paths] == ["x/a.png", "x/closed", "y/c.png"]
    rows = predict_images(ZeroShot(bundled, ["dog", "teapot"]), paths)
    assert rows[1]["skipped"] == "unreadable (a folder)"
    assert load_dataset(tmp_path, test=0, val=0).train.paths == ("x/a.png", "x/closed", "y/c.png")
    with pytest.raises(DatasetError, match="permission"):
        list(image_paths(tmp_path / "x/closed"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images=no/such"], "no such folder, table or list"),
        (["--classes=null"], "classes: expected class names"),
        (["--shard_size=0"], "shard_size"),
        (["--format=xml"], "format"),
        (["--images={empty}"], "holds no files"),
        (["--template=no place"], "templates"),
    ],
)
def test_errors_are_one_sentence(arguments, message, photos, cdc, tmp_path):
    (tmp_path / "empty").mkdir()
    given = [f"--images={photos}", "--backbone=bundled", "--classes=[dog,cat]", f"--out={tmp_path / 'out'}"]
    status, out, err = cdc("predict", *given, *(a.format(empty=tmp_path / "empty") for a in arguments))
    assert (status, out) == (2, "") and message in err and "Traceback" not in err


def test_examples_in_docstrings():
    import doctest
    import importlib

    result = doctest.testmod(importlib.import_module("cdc_models.data.image_paths"))
    assert result.attempted > 0 and result.failed == 0
