"""The report of the benches runs end to end, without a GPU too: it cannot rot between measurements."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hardness
import paths
import pytest
import report
import scaling
import targets
import torch
from shapes import Shape
from timing import peak_memory, time_interleaved

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--tiny", "--no-compile"]


def rows_of(folder):
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {(r["shape"], r["operation"], r["way"]): r for line in lines for r in line.get("rows", [])}


def test_the_command_measures_the_kernels_in_the_interpreter(tmp_path):
    command = [sys.executable, "benches/report.py", "--device", "interpreter", "--shapes", "S1", "--out", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    ways = ["--ways", "bare product", "triton, tiles", "triton, chunks"]
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    subprocess.run([*command, *ways], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = rows_of(tmp_path)
    for operation in ("opinion", "loss gradients"):
        for path in ("tiles", "chunks"):
            row = rows["S1", operation, f"triton, {path}"]
            assert row["ms"] and row["error"] < 1e-5 and row["peak"] >= row["kept"] > 0
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    assert "triton, chunks" in (tmp_path / "table.md").read_text()


def test_a_killed_report_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path)]
    report.main([*TINY, "--shapes", "S1", *out])
    first = (tmp_path / "results.jsonl").read_text()
    capsys.readouterr()
    report.main([*TINY, "--shapes", "S1", "S6", *out])
    assert capsys.readouterr().out.count("measured before") == 2
    assert (tmp_path / "results.jsonl").read_text().startswith(first)
    table = (tmp_path / "table.md").read_text()
    assert all(name in table for name in ("S1:", "S6:", "blocked", "pairwise", "linear_cross_entropy", "Not measured"))
    monkeypatch.setattr(report, "code_version", lambda: "another")
    report.main([*TINY, "--shapes", "S6", *out])
    assert "measured before" not in capsys.readouterr().out
    assert ("S1", "opinion", "blocked") not in rows_of(tmp_path)  # of other code


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch):
    wrong = tuple(torch.zeros(size) for size in ((4, 40), 4, (4, 2)))
    monkeypatch.setattr("ways.closed_form", lambda *_: wrong)
    report.main([*TINY, "--shapes", "S1", "--out", str(tmp_path)])
    row = rows_of(tmp_path)["S1", "opinion", "eager"]
    assert row["ms"] == [] and row["why"].startswith("off by 1.0e+00")
    monkeypatch.setattr("ways.our_opinion", lambda *_: lambda *_: wrong)
    monkeypatch.setattr("report.truth", lambda *_: [torch.ones_like(x).double() for x in wrong])
    with pytest.raises(SystemExit, match="S4 opinion: reference is off by 1"):
        report.main([*TINY, "--shapes", "S4", "--out", str(tmp_path)])


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        a = torch.ones(1000)
        b = a + 1
        del a
        return (b * 2,)

    measured = peak_memory({"two at once": call, "one": lambda: (torch.ones(1000),)}, "cpu")
    assert measured["one"] == (4000, 4000)
    peak, kept = measured["two at once"]
    assert 8000 <= peak <= 8100 and kept == 4000  # a number in an expression is a tensor for a moment


def test_every_call_is_timed_in_every_round():
    calls = {"a": lambda: (), "b": lambda: ()}
    taken = time_interleaved(calls, "cpu", seconds=0.0, rounds=3)
    assert [len(taken[name]) for name in calls] == [3, 3]


def test_short_calls_run_in_a_loop_and_follow_each_other_by_chance(monkeypatch):
    order = []
    monkeypatch.setattr("timing.wall_clock", lambda call, device, repeats=1: order.append((call(), repeats)) or 6.0)
    taken = time_interleaved({name: lambda name=name: name for name in "abc"}, "cpu", seconds=0.0, rounds=20)
    assert {name: len(ms) for name, ms in taken.items()} == {"a": 20, "b": 20, "c": 20}
    assert [repeats for _, repeats in order] == [1] * 3 + [4] * 60  # 20 ms of a call that takes 6
    names = [name for name, _ in order[3:]]
    assert all(set(names[i : i + 3]) == set("abc") for i in range(0, 60, 3))
    assert len({(a, b) for a, b in itertools.pairwise(names) if a != b}) == 6


def test_targets_are_judged_by_the_best_of_each_side():
    def row(way, median, peak):
        times = {"median": median, "ms": [median] * 3}
        return {"shape": "S1", "operation": "opinion", "way": way, "peak": peak, "kept": 0, **times}

    rows = [row("bare product", 2.0, 10), row("eager", 6.0, 100), row("blocked", 2.4, 20), row("pairwise", 30.0, 1000)]
    lines = targets.judged(rows, "cpu")
    assert [line.rsplit("| ", 1)[1] for line in lines[2:]] == ["met |", "met |", "**missed** |", "met |"]
    assert targets.judged(rows, "interpreter") == []


def test_growth_is_measured_drawn_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "BASE", Shape("base", 4, 2, 30, 16))
    monkeypatch.setattr(scaling, "SWEEPS", {"B": (2, 4), "M": (1, 3), "K": (20, 200)})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--device=cpu", "--seconds=0", f"--out={tmp_path}", "--limit=5e-5"])
    scaling.main()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["ways"]["blocked"]["ms"] > 0 for row in rows)
    large = [row for row in rows if row["K"] == 200]
    assert all("eager" in row["ways"] for row in rows if row["K"] < 200)
    assert [row["operation"] for row in large if "eager" not in row["ways"]] == ["loss gradients"]
    assert "left out" in (tmp_path / "table.md").read_text()
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("opinion", "loss-gradients"))
    capsys.readouterr()
    scaling.main()
    assert "base:" not in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 12


def test_paths_are_compared_judged_and_gone_on_with(tmp_path, capsys):
    command = ["--device=interpreter", "--widths", "16", f"--out={tmp_path}"]
    paths.main(command)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    assert all(0 <= row["ways"][path]["error"] < 1e-5 for row in rows for path in ("tiles", "chunks"))
    assert all(way["ms"] > 0 for row in rows for way in row["ways"].values())
    assert "the rule takes" in (tmp_path / "table.md").read_text() and (tmp_path / "paths.png").stat().st_size > 10_000
    rows[0]["ways"] |= {"tiles": {"ms": 3.0}, "chunks": {"ms": 2.0}}
    assert paths.judged(rows[0]) | {"taken": "tiles", "loses": 1.5} == paths.judged(rows[0])  # one launch less: tiles
    capsys.readouterr()
    paths.main(command)
    assert "paths:" not in capsys.readouterr().out


def test_hardness_is_measured_on_validation_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardness, "LEVELS", (1.0,))
    monkeypatch.setattr(hardness, "METHODS", ("zero-shot",))
    monkeypatch.setattr(sys, "argv", ["hardness.py", f"--out={tmp_path}"])
    hardness.main()
    committed = [json.loads(x) for x in (ROOT / "benches/results/hardness/results.jsonl").read_text().splitlines()]
    for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()):
        [same] = [r for r in committed if all(r[n] == row[n] for n in ("method", "split", "hardness"))]
        assert row["base"] == pytest.approx(same["base"], abs=0.005) and row["new"] == pytest.approx(
            same["new"], abs=0.005
        )
    assert (tmp_path / "table.md").read_text().splitlines()[-1].startswith("| 1.0 |")


def test_the_page_lists_every_bench_and_commands_that_exist():
    page = (ROOT / "benches/README.md").read_text()
    for file in (ROOT / "benches").glob("*.py"):
        if "__main__" in file.read_text():
            assert f"| `python benches/{file.name}" in page, file.name
    commands = re.findall(r"^python ((?:benches|examples)/\S+\.py) (.*)$", page, re.MULTILINE)
    assert len(commands) > 10
    for script, options in commands:
        code = (ROOT / script).read_text()
        assert all(f'"{flag}"' in code for flag in re.findall(r"--\w+", options)), script
