"""`cdc demo` end to end, small: table, JSON, pictures, resumption, and its errors."""

import json
import math
from inspect import signature

import pytest
from PIL import Image

from cdc_models import report
from cdc_models.cli import main
from cdc_models.experiment import ABLATIONS, FIGURES, SETTINGS, Results, Run, Setting
from cdc_models.methods import METHODS


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


def run(out, *more):
    main(["demo", f"--out={out}", "--splits=2", "--shots=1", "--workers=1", '--methods=["zero-shot", "CoOp"]', *more])


def test_a_small_demo(out, capsys):
    run(out)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["rows"]) == ["zero-shot", "CoOp"]
    for row in summary["rows"].values():
        assert row["runs"] == 2 and 0.3 < row["base"] < 1 and 0.3 < row["new"] < 1
        for name in ("H", "ece_base", "aurc_base", "unknown_auroc"):
            assert math.isfinite(row[name])
    assert "CoOp" in capsys.readouterr().out and "CoOp" in (out / "table.md").read_text()
    for name in ("accuracy", "reliability", "coverage"):
        with Image.open(out / f"{name}.png") as picture:
            colours = picture.convert("RGB").getcolors(10**6)
            assert picture.width > 1000 and colours is not None and len(colours) > 50
            edge = picture.convert("L").crop((0, 0, picture.width, 4))
            assert edge.getextrema() == (255, 255)  # no title is cut off


def test_a_second_call_goes_on_from_the_first(out, capsys):
    before = (out / "results.jsonl").read_text()
    lines = before.splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])  # killed within a line
    run(out)
    rows = [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines() if x.endswith("}")]
    old = json.loads(lines[-1])
    again = next(r for r in rows if r["key"] == old["key"])
    assert len(rows) == 4
    assert {k: again[k] for k in ("base", "new", "ece_base")} == {k: old[k] for k in ("base", "new", "ece_base")}


def test_another_setting_or_backbone_is_another_run(tmp_path):
    results = Results(tmp_path / "r.jsonl", "a" * 64)
    figures = dict.fromkeys(FIGURES, 0.5) | {"uncalibrated": {"ece_base": 0.1}, "curves": {"base": {}, "new": {}}}
    results.keep("x", Setting("coop", lr=0.1), Run(0, 1), figures)
    assert results.get("x", Setting("coop", lr=0.1), Run(0, 1)) is not None
    assert results.get("x", Setting("coop", lr=0.2), Run(0, 1)) is None
    assert results.get("x", Setting("coop", lr=0.1), Run(0, 2)) is None
    assert results.get("x", Setting("coop", {"words": "a photo of a"}, lr=0.1), Run(0, 1)) is not None  # the default
    assert Results(tmp_path / "r.jsonl", "b" * 64).get("x", Setting("coop", lr=0.1), Run(0, 1)) is None


@pytest.mark.parametrize("damage", [{"base": None}, {"base": math.nan}, {"uncalibrated": {}}, {"curves": {}}])
def test_a_row_without_its_figures_is_another_run(damage, tmp_path):
    figures = dict.fromkeys(FIGURES, 0.5) | {"uncalibrated": {"ece_base": 0.1}, "curves": {"base": {}, "new": {}}}
    results = Results(tmp_path / "r.jsonl", "a" * 64)
    results.keep("x", Setting("coop"), Run(0, 1), figures | damage)
    (tmp_path / "r.jsonl").write_bytes((tmp_path / "r.jsonl").read_bytes() + b"\xff\xfe no text\n")
    assert Results(tmp_path / "r.jsonl", "a" * 64).get("x", Setting("coop"), Run(0, 1)) is None


def test_what_a_row_says_of_its_run_does_not_count(tmp_path):
    figures = dict.fromkeys(FIGURES, 0.5) | {"uncalibrated": {"ece_base": 0.1}, "curves": {"base": {}, "new": {}}}
    results = Results(tmp_path / "r.jsonl", "a" * 64)
    results.keep("x", Setting("coop"), Run(0, 1), figures | {"run": "edited", "label": None})
    found = Results(tmp_path / "r.jsonl", "a" * 64).get("x", Setting("coop"), Run(0, 1))
    assert found["label"] == "x" and found["run"]["split"] == 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--splits=6", "splits"),
        ("--task=other", "task"),
        ('--methods=["LoRA"]', "methods.*LoRA"),
        ("--partition=train", "partition"),
        ("--workers=-1", "workers"),
        ("--seeds=0", "seeds"),
        ("--seeds=1000", "seeds"),
        ("--shots=0", "shots"),
        ("--methods=[]", "methods: expected some of"),
    ],
)
def test_bad_arguments_are_one_sentence(argument, message, tmp_path, capsys):
    import re

    with pytest.raises(SystemExit) as stop:
        main(["demo", f"--out={tmp_path / 'x'}", argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and "Traceback" not in error


def test_a_place_that_cannot_be_written_is_found_out_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cdc_models.demo.compare", lambda *_, **__: pytest.fail("worked before it looked"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["demo", f"--out={tmp_path / 'file'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and str(tmp_path / "file") in error and "Traceback" not in error


def test_every_ablation_changes_one_part():
    whole = SETTINGS["CDC"]
    defaults = {n: p.default for n, p in signature(METHODS["cdc"]).parameters.items()}
    options = defaults | whole.options
    changes = {}
    for label, setting in ABLATIONS.items():
        changes[label] = {k: v for k, v in setting.options.items() if v != options[k]}
        assert (setting.epochs, setting.lr, setting.batch) == (whole.epochs, whole.lr, whole.batch)
    assert changes == {
        "CDC": {},
        "one template": {"n_templates": 1, "views": ["none"]},  # one view for one template
        "no views": {"views": None},
        "no decoupling loss": {"weight_de": 0.0},
        "no consistency loss": {"weight_con": 0.0},
        "no trusted classification": {"trusted": False},
        "no evidence head": {"evidence_head": False},
        "no image prompts": {"image_prompts": False},
        "averaging, not Dempster": {"rule": "averaging"},
    }


def rows_of(values):
    return [{"run": {"split": s}, "H": v} for s, v in values]


def test_paired_difference_pairs_by_split():
    ours = rows_of([(0, 0.6), (0, 0.8), (1, 0.5), (2, 0.9)])
    theirs = rows_of([(0, 0.6), (1, 0.4), (2, 0.8)])
    mean, half = report.paired_difference(ours, theirs, "H")
    assert mean == pytest.approx(0.1) and half == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="same splits"):
        report.paired_difference(ours, theirs[:2], "H")


def test_interval_is_students():
    from scipy.stats import t

    values = [0.1, 0.4, 0.3, 0.25, 0.5]
    mean = sum(values) / 5
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5)
    assert report.half_width(values) == pytest.approx(t.ppf(0.975, 4) * error, rel=1e-3)
    assert math.isnan(report.half_width([0.1]))


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(tmp_path):
    import os
    import signal
    import subprocess
    import sys
    import time

    out = tmp_path / "out"
    # bash gives background jobs an ignored SIGINT; the child must have Python's own handler.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cdc_models.cli import main; "
    code += f"main(['demo', '--out={out}', '--splits=5', '--workers=1'])"
    script = tmp_path / "run.py"  # spawned workers import the main module, so it must be a guarded file
    script.write_text(f'if __name__ == "__main__":\n    {code}\n')
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "results.jsonl").exists() and (out / "results.jsonl").read_text().count("\n") >= 1:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "same command goes on from there" in " ".join(stdout.split())
    done = [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]
    assert done and all(row["base"] > 0.3 for row in done)
