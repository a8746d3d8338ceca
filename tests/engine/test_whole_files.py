"""Files are the old one or the new one: several writers, writers that failed, writers that were killed."""

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cdc_models.engine.files import ABANDONED, replacing


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        second.write_text("second")
        first.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file"]

    def write(letter):
        for _ in range(20):
            with replacing(path) as beside:
                beside.write_text(letter * 10_000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert path.read_text() in {letter * 10_000 for letter in "abcd"} and os.listdir(tmp_path) == ["file"]


def test_a_failure_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError("in the middle")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as beside:
            beside.touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_what_killed_writers_left_is_removed_after_an_hour(tmp_path):
    path, now = tmp_path / "file[1]", time.time()
    old, young = (tmp_path / f"file[1].{digit * 16}.part" for digit in "12")
    others = [tmp_path / name for name in ("file1.0123456789abcdef.part", "file[1].mine.part")]
    for left in (old, young, *others):
        left.write_text("half")
        os.utime(left, (now, now - (60 if left == young else ABANDONED + 60)))
    with replacing(path) as beside:
        beside.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, young, *others])
