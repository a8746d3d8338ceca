"""The bench of predictions runs from end to end, its command in this process."""

import json

import predict
import pytest

from cdc_models.cli import main


def test_it_measures_files_and_tar_shards(tmp_path, monkeypatch):
    def here(source, adapter, out, count, processes, threads, workers):
        arguments = [f"--images={source}", f"--adapter={adapter}", f"--out={out}", "--workers=0", "--quiet"]
        main(["predict", *arguments, "--shard_size=3"])
        return json.loads((out / "report.json").read_text())

    monkeypatch.setattr(predict, "predict", here)
    monkeypatch.setattr(predict, "CORES", 3)
    predict.main(["--images", "20", "--pixels", "60", "--processes", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["method"], row["form"], row["threads"]) for row in rows] == [
        (method, form, threads)
        for method in ("zero_shot", "cdc")
        for form in ("files", ".tar files")
        for threads in (1, 3)
    ]
    assert all(row["rate"] > 0 and 0 < row["reading"] < 1 and row["peak"] > 10**7 for row in rows)
    assert "| cdc | .tar files | 1 | 3 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(AssertionError):
        predict.assert_same({"a": ("dog", 0.5)}, {"a": ("dog", 0.6)})
