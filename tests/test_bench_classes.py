"""The bench over the number of classes runs, goes on where it stopped, and does its arithmetic right."""

import json

import classes
import pytest
import torch
from cdc_kernels import configs

TINY = ["--device", "cpu", "--batch", "4", "--prompts", "2", "--features", "8", "--seconds", "0"]


def test_it_measures_and_goes_on(tmp_path):
    out = ["--out", str(tmp_path)]
    classes.main([*TINY, "--classes", "40", *out])
    first = (tmp_path / "results.jsonl").read_text()
    classes.main([*TINY, "--classes", "40", "160", *out])
    assert (tmp_path / "results.jsonl").read_text().startswith(first)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["classes"] for row in rows] == [40, 160]
    name = "evidential_cross_entropy, forward and backward"
    for row in rows:
        assert row["error"] < 2e-5 and row["ms"][name] > 0
        assert row["kept"][name] == 4 * (1 + 4 * 8 + 2 * row["classes"] * 8) <= row["peak"][name]
    page = (tmp_path / "table.md").read_text()
    assert "| 160 |" in page and "grows like" in page and "Ten million classes" in page
    assert (tmp_path / "classes.png").stat().st_size > 10_000


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch):
    wrong = {"an operation": (lambda inputs, backend: (torch.ones(1) * (1 + (backend is None)),), 1)}
    monkeypatch.setattr(classes, "OPERATIONS", wrong)
    with pytest.raises(AssertionError, match="off by 1"):
        classes.main([*TINY, "--classes", "40", "--out", str(tmp_path)])


def test_on_paper():
    """Ten million classes on two GPUs: half of everything each, and nothing sent that grows with K."""
    one, two = (classes.on_paper(B=1024, M=4, K=10**7, D=512, ranks=n) for n in (1, 2))
    assert one["text"] == 2 * two["text"] == 2 * 4 * 10**7 * 512 and one["flops"] == 2 * two["flops"]
    assert one["sent"] == 0 and one["lengths"] == 2 * two["lengths"] == 160e6  # 4 M K
    assert one["moved workspace"] == 18 * 1024 * 4 * 10**7 and one["moved text"] == 20 * 4 * 10**7 * 512
    chunks = 4 * 10**7 * (6 * 1024 + 4 * 512) / (64 * 2**20)
    assert one["moved image"] == pytest.approx(chunks * 4 * 1024 * 512 * 10) and configs.WORKSPACE == classes.WORKSPACE
    assert two["sent"] == 8 * 1024 * 5 + 4 * (1024 * 512 + 8) == classes.on_paper(1024, 4, 10**6, 512, 2)["sent"]
    assert abs(classes.growth(2.0, 16.0, 4.0) - 1.5) < 1e-12
