"""Images within .tar files: the same as unpacked, names that are never paths, and every way a file can be wrong."""

import io
import os
import tarfile
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cdc_models import ZeroShot
from cdc_models.data import BadImageError, DatasetError, TarImages, image_paths, open_image, tar_shards
from cdc_models.shards import predict_images, predict_shards, read_part


def encoded(colour, kind="PNG"):
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, kind)
    return data.getvalue()


def make_tar(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                tar.addfile(info)
    return path


@pytest.fixture
def shard(tmp_path):
    """Samples as WebDataset has them, and what else there may be."""
    return make_tar(
        tmp_path / "a.tar",
        [
            ("0001.jpg", encoded((200, 0, 0), "JPEG")),
            ("0001.cls", b"3"),
            ("deep/0002.PNG", encoded((0, 200, 0))),
            ("deep", (tarfile.DIRTYPE, "")),
            ("._0002.png", b"resource fork"),
            ("0003.webp", encoded((0, 0, 200), "WEBP")),
            ("0004.jpg", b"no picture"),
        ],
    )


def test_the_images_of_a_file(shard, tmp_path):
    images = TarImages(shard)
    assert [name.split("::")[1] for name in images.names] == ["0001.jpg", "deep/0002.PNG", "0003.webp", "0004.jpg"]
    assert images.damage is None and len(images) == 4
    for i, (name, data) in enumerate([("0001.jpg", encoded((200, 0, 0), "JPEG")), ("2.png", encoded((0, 200, 0)))]):
        (tmp_path / name).write_bytes(data)
        image, place = images[i]
        assert image.tobytes() == open_image(tmp_path / name).tobytes() and place == i
    with pytest.raises(BadImageError, match=r"a\.tar::0004\.jpg: not an image"):
        images[3]


def test_names_are_labels_and_links_are_not_followed(tmp_path, bundled):
    (tmp_path / "secret.png").write_bytes(encoded((1, 2, 3)))
    odd = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    members = [
        ("/etc/a.png", encoded((9, 9, 9))),
        ("../../b.png", encoded((9, 9, 9))),
        ("link.png", (tarfile.SYMTYPE, str(tmp_path / "secret.png"))),
        ("hard.png", (tarfile.LNKTYPE, "../secret.png")),
        ("pipe.png", (tarfile.FIFOTYPE, "")),
        (odd, encoded((9, 9, 9))),
    ]
    file = make_tar(tmp_path / "evil.tar", members, tarfile.GNU_FORMAT)
    before = sorted(tmp_path.rglob("*"))
    model = ZeroShot(bundled, ["dog", "teapot"])
    (rows,) = predict_shards(model, [str(file)], tmp_path)
    assert sorted({*tmp_path.rglob("*")} - {*before}) == [tmp_path / "part-00000.parquet"]
    names = ["/etc/a.png", "../../b.png", "link.png", "hard.png", "pipe.png", "caf\\udce9.png"]
    assert [row["path"] for row in rows] == [f"{file}::{name}" for name in names]
    assert [bool(row["skipped"]) for row in rows] == [False, False, True, True, True, False]
    assert rows[2]["skipped"] == "unreadable (no plain file)"
    assert [row["path"] for row in read_part(tmp_path / "part-00000.parquet")] == [row["path"] for row in rows]


def test_a_damaged_file_says_so_in_a_row_of_its_own(shard, tmp_path, bundled):
    model, data = ZeroShot(bundled, ["dog", "teapot"]), shard.read_bytes()
    whole = predict_images(model, str(shard), batch=3)
    assert [row["skipped"] is None for row in whole] == [True, True, True, False]
    second = TarImages(shard)._places[1][0] - 512  # the header of the second image
    for broken in (data[: second + 512 + 40], data[:second], data[:second] + b"\xff" * 512 + data[second + 512 :]):
        (tmp_path / "b.tar").write_bytes(broken)
        rows = predict_images(model, str(tmp_path / "b.tar"))
        assert rows[0]["probability"] == pytest.approx(whole[0]["probability"], abs=1e-6)
        assert rows[-1]["path"] == str(tmp_path / "b.tar") and rows[-1]["skipped"].startswith("damaged (")
        assert len(rows) in (2, 3) and all(row["skipped"] for row in rows[1:])
    for content in (b"", b"no tar at all" * 100):
        (tmp_path / "b.tar").write_bytes(content)
        assert [row["skipped"].split(" (")[0] for row in predict_images(model, str(tmp_path / "b.tar"))] == ["damaged"]
    (row,) = predict_images(model, str(tmp_path / "none.tar"))
    assert row["skipped"].startswith("missing")
    make_tar(tmp_path / "b.tar", [])
    assert predict_images(model, str(tmp_path / "b.tar")) == []


def test_a_part_is_taken_for_that_of_the_images_it_holds(shard, tmp_path, bundled):
    model, file = ZeroShot(bundled, ["dog", "teapot"]), tmp_path / "b.tar"
    for earlier in (make_tar(file, []).read_bytes(), shard.read_bytes()[:2000]):
        file.write_bytes(earlier)
        out = tmp_path / f"out-{len(earlier)}"
        out.mkdir()
        first = list(predict_shards(model, [str(file)], out))
        assert [[r["path"] for r in rows] for rows in predict_shards(model, [str(file)], out)] == [
            [r["path"] for r in rows] for rows in first
        ]
        file.write_bytes(shard.read_bytes())
        with pytest.raises(ValueError, match="holds predictions of other images"):
            list(predict_shards(model, [str(file)], out))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_end_in_rows_and_never_in_a_crash(tmp_path, shard, data):
    bits = bytearray(shard.read_bytes()[: 512 * 20])
    for _ in range(data.draw(st.integers(1, 5))):
        # mostly headers: they stand at the beginnings of blocks
        place = 512 * data.draw(st.integers(0, 19)) + data.draw(st.integers(0, 511))
        bits[place % len(bits)] = data.draw(st.integers(0, 255))
    (tmp_path / "c.tar").write_bytes(bits)
    images = TarImages(tmp_path / "c.tar")
    for i in range(len(images)):
        try:
            images[i]
        except BadImageError as error:
            assert error.path == images.names[i]


def test_a_member_too_large_is_not_read(shard, monkeypatch):
    monkeypatch.setattr(tar_shards, "MAX_BYTES", 20)
    with pytest.raises(BadImageError, match="too large"):
        TarImages(shard)[0]


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path, bundled):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name, detail in (("pipe.tar", "no plain file"), ("folder.tar", "a folder")):
        (row,) = predict_images(ZeroShot(bundled, ["dog", "teapot"]), str(tmp_path / name))
        assert row["skipped"] == f"unreadable ({detail})"


def long_header(kind, size):
    """A member whose name or further facts are said to be of `size` bytes."""
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse_map():
    """A member with a list of its holes, which tarfile reads to the end of the list."""
    info = tarfile.TarInfo("holes.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}
    info.size = 2**32
    return info.tobuf(tarfile.PAX_FORMAT) + b"9999999\n" + 2**20 * b"0\n"


@pytest.mark.parametrize(
    "header",
    [
        long_header(tarfile.GNUTYPE_LONGNAME, 2**32),
        long_header(tarfile.GNUTYPE_LONGLINK, 2**32),
        long_header(tarfile.XHDTYPE, 2**32),
        long_header(tarfile.XGLTYPE, 2**32),
        sparse_map(),
    ],
    ids=["longname", "longlink", "pax", "global-pax", "sparse"],
)
def test_headers_of_gigabytes_are_not_read(header, tmp_path):
    file = make_tar(tmp_path / "a.tar", [("a.png", encoded((5, 5, 5)))])
    file.write_bytes(file.read_bytes()[:1024] + header)
    os.truncate(file, 2**33)  # without taking room on the disk
    tracemalloc.start()
    images = TarImages(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [name.split("::")[1] for name in images.names] == ["a.png"] and peak < 8 * 2**20
    assert images.damage.reason == "damaged" and "headers of more than 1048576 bytes" in images.damage.detail


def test_a_name_too_long_is_no_name(tmp_path):
    file = make_tar(tmp_path / "a.tar", [("a.png", b"x"), (f"{'b' * 5000}.png", b"x"), ("c.png", b"x")])
    images = TarImages(file)
    assert len(images) == 1 and images.damage.detail == "a name of 5004 characters, after 1 images"
    make_tar(file, [(f"{'b' * 4000}.png", b"x")])
    assert len(TarImages(file)) == 1 and TarImages(file).damage is None


def test_workers_read_the_same(shard, bundled):
    model = ZeroShot(bundled, ["dog", "teapot"])
    one, two = (predict_images(model, str(shard), batch=2, workers=workers) for workers in (0, 1))
    assert [row["path"] for row in one] == [row["path"] for row in two]
    assert [row["probability"] for row in one] == pytest.approx([row["probability"] for row in two], nan_ok=True)


def test_patterns_and_folders_of_tar_files(tmp_path, shard, bundled):
    names = [f"s-{i:03}.tar" for i in range(9, 12)]
    for name in names:
        make_tar(tmp_path / name, [("x.png", encoded((5, 5, 5)))])
    shard.unlink()
    assert list(image_paths(f"{tmp_path}/s-{{009..011}}.tar")) == [str(tmp_path / name) for name in names]
    assert list(image_paths(tmp_path)) == [str(tmp_path / name) for name in names]
    assert list(image_paths(tmp_path / names[0])) == [str(tmp_path / names[0])]
    with pytest.raises(DatasetError, match="2 of 5 files are not there.*s-007"):
        image_paths(f"{tmp_path}/s-{{007..011}}.tar")
    with pytest.raises(DatasetError, match="runs backwards"):
        image_paths("s-{2..1}.tar")
    with pytest.raises(DatasetError, match="more than 1000000 files"):
        image_paths("s-{0..999}-{0..999999999999}.tar")

    (tmp_path / "s-0095.png").write_bytes(encoded((5, 5, 5)))  # between the first and the second
    (tmp_path / "out").mkdir()
    model = ZeroShot(bundled, ["dog", "teapot"])
    paths = list(image_paths(tmp_path))
    done = [list(predict_shards(model, paths, tmp_path / "out", part=(rank, 3))) for rank in range(3)]
    assert [len(parts) for parts in done] == [2, 1, 1]
    parts = [read_part(tmp_path / f"out/part-{i:05d}.parquet")[0]["path"] for i in range(4)]
    assert parts == [path if path.endswith(".png") else f"{path}::x.png" for path in paths]
    with pytest.raises(ValueError, match="part-00002.*other images"):
        list(predict_shards(model, paths[:2], tmp_path / "out"))
    with pytest.raises(ValueError, match="part-00000.*other images"):
        list(predict_shards(model, paths[1:], tmp_path / "out"))
    with pytest.raises(ValueError, match="part: expected"):
        list(predict_shards(model, paths, tmp_path / "out", part=(2, 2)))
    assert torch.is_grad_enabled()
