"""The benches of the training step run end to end on small networks; what is measured in a process of its own, here
in this one."""

import re
from pathlib import Path

import compiled_step
import facts
import pytest
import step
import text_memory
import text_tower
import torch
from imagenet_names import imagenet_names

from cdc_models.methods import Method

TINY = ["--backbone", "bundled", "--classes", "20"]


@pytest.fixture
def one_process(monkeypatch):
    calls = []

    def here(file, flag, payload):
        what, *arguments = payload
        calls.append(what)
        return step.only(what, *arguments)

    monkeypatch.setattr(facts, "in_a_process_of_its_own", here)
    return calls


def test_a_step_is_measured_case_by_case_and_goes_on_where_it_stopped(tmp_path, one_process):
    small = [*TINY, "--batch", "2", "--templates", "1", "4", "--evaluate", "2", "--repeats", "1", "--memory", "0.0168"]
    step.main([*small, "--out", str(tmp_path)])
    assert one_process == ["parity", *["step"] * 8, "evaluation"]
    table = (tmp_path / "table.md").read_text()
    assert "| CoOp, ours | 0." in table and " classes at a time (all: 0 GB) | " in table
    assert re.search(r"CDC, M = 1 \de-0[67] \(19 classes\)", table)  # what the comparison found
    assert (
        "| CDC, M = 4, published | left out: would hold 0 GB with 10 classes at a time" in table and step.PLAIN in table
    )
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    step.main([*small, "--out", str(tmp_path)])
    assert one_process[10:] == ["step"] * 2  # those that were left out
    one_process.clear()
    step.main([*small, "--methods", "CDC", "--templates", "1", "--ways", "ours", "--out", str(tmp_path)])
    assert one_process == ["parity"]  # of this one method; its step is there
    assert (tmp_path / "table.md").read_text().count("| CDC, M = 1, ours |") == 1


def test_rows_of_other_code_or_threads_are_measured_again(tmp_path, one_process, monkeypatch):
    one = [*TINY, "--batch=2", "--methods=CoOp", "--ways=ours", "--evaluate=0", "--repeats=1", f"--out={tmp_path}"]
    step.main(one)
    monkeypatch.setattr(facts, "code_version", lambda measured: "another")
    step.main(one)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    step.main(one)
    assert one_process == ["parity", "step"] * 3
    assert "77 threads" in (table := (tmp_path / "table.md").read_text()) and "code another" in table


def test_a_peak_counts_what_the_call_holds_and_nothing_earlier(monkeypatch):
    before = torch.ones(50_000_000)  # 200 MB
    del before
    _, found = facts.with_peak(lambda: torch.ones(10_000_000).sum().item(), "cpu")
    restartable = Path("/proc/self/clear_refs").exists()
    assert found["at_least"] is not restartable
    assert not restartable or 39e6 < found["bytes"] < 60e6  # the kernel counts in steps of some pages
    monkeypatch.setattr(facts.provenance, "restart_peak_memory", lambda device: False)
    assert facts.with_peak(lambda: None, "cpu")[1]["at_least"] is True


def test_pieces_of_the_published_way_do_the_same_work(bundled):
    model = step.build(step.Case("MaPLe", 1, "published"), bundled, 7)
    whole = step.published.text_features(model)
    whole.sum().backward()
    want = model.prompts.text_prompts.grad.clone()
    model.zero_grad()
    pieces = step.published.text_in_pieces(model, 3)
    assert (pieces - whole).abs().max() < 1e-5
    assert (model.prompts.text_prompts.grad - want).abs().max() < 1e-4 * want.abs().max()


def test_the_text_tower_is_compared_and_timed(tmp_path, capsys, monkeypatch):
    small = ["--backbone", "bundled", "--names", "12", "--templates", "2", "--seconds", "0", "--out", str(tmp_path)]
    text_tower.main(small)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {way} |" in table for way in ("77 tokens", "truncated", "shared prefix", "packed"))
    assert table.count("e-07 |") >= 3  # what the comparison found
    right = text_tower.encode_prompted_text
    monkeypatch.setattr(text_tower, "encode_prompted_text", lambda *given, **more: right(*given, **more) * 1.0001)
    with pytest.raises(AssertionError, match="shared prefix: off by"):
        text_tower.main(small)


def test_memory_by_chunk(tmp_path, monkeypatch):
    def here(file, flag, payload, **environment):
        return text_memory.measure(*payload)

    monkeypatch.setattr(facts, "in_a_process_of_its_own", here)
    text_memory.main([*TINY, "--chunks", "5", "0", "--out", str(tmp_path)])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["ours", "ours", "published"]


def test_what_compiling_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(Method, "compile", lambda self, **_: None)  # minutes on two cores
    small = [*TINY, "--batch", "2", "--seconds", "0", "--out", str(tmp_path)]
    compiled_step.main([*small, "--methods", "CDC"])
    assert (tmp_path / "table.md").read_text().count("| bundled |") == 1
    compiled_step.main(small)
    assert (tmp_path / "table.md").read_text().count("| bundled |") == 3
    monkeypatch.setattr(facts, "code_version", lambda measured: "another")
    compiled_step.main([*small, "--methods", "CoOp"])
    assert (tmp_path / "table.md").read_text().count("| bundled |") == 1  # no rows of other code beside it


def test_a_thousand_names_are_all_different():
    assert len(set(imagenet_names(1000))) == 1000 and len(set(imagenet_names(100))) == 100
