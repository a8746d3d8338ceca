"""`cdc train`, `evaluate` and `predict` by two processes under torchrun: what one process gives, written by one."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cdc_models.cli import main
from cdc_models.shards import part_files, read_part

PROGRAM = """
import json, sys
from cdc_models import processes
from cdc_models.cli import main

with processes.joined():
    for command in json.loads(sys.argv[1]):
        try:
            main(command)
        except SystemExit as stop:
            print(json.dumps({"status": stop.code}), flush=True)
"""


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    """The pictures of each folder as one .tar file."""
    folder = tmp_path_factory.mktemp("shards")
    for number, kind in enumerate(sorted(photos.iterdir())):
        with tarfile.open(folder / f"s-{number}.tar", "w") as tar:
            for file in sorted(kind.iterdir()):
                tar.add(file, file.name)
    return folder


def commands(photos, shards, out):
    adapter = f"--adapter={out}/run/adapter.safetensors"
    given = [
        ["train", f"--data={photos}", "--backbone=bundled", "--method=coop", "--shots=5", "--epochs=2",
         "--calibrate=true", f"--out={out}/run"],
        ["evaluate", f"--data={photos}", adapter, "--split=train", "--test_batch=5", f"--out={out}/figures.json"],
        ["predict", f"--images={shards}/s-{{0..2}}.tar", adapter, f"--out={out}/answers"],
    ]  # fmt: skip
    return [[*command, "--workers=0"] for command in given]


@pytest.fixture(scope="module")
def both(photos, shards, tmp_path_factory):
    """Where one process, and where two, have written; and what the two have said."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for command in commands(photos, shards, one):
        main([*command, "--quiet"])
    program = tmp_path_factory.mktemp("program") / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    launched = subprocess.run(
        [*launcher, json.dumps([*([*each, "--json"] for each in commands(photos, shards, two)), ["demo"]])],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr
    return one, two, launched


def test_one_of_them_writes_and_prints(both):
    one, two, launched = both
    said = [json.loads(line) for line in launched.stdout.splitlines()]
    assert [value for value in said if "status" in value] == [{"status": 2}] * 2  # the demo, refused in both
    assert [next(iter(value)) for value in said if "status" not in value] == ["adapter", "data", "folder"]
    assert launched.stderr.count("cdc: demo is the work of one process") == 2
    files = [sorted(str(p.relative_to(out)) for p in out.rglob("*")) for out in (one, two)]
    assert files[1] == files[0]


def test_the_adapter_is_the_one_of_one_process(both):
    one, two, _ = both
    tensors = [load_file(out / "run/adapter.safetensors") for out in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        assert torch.allclose(tensors[0][name], tensors[1][name], atol=1e-5, rtol=1e-3), name
    reports = [json.loads((out / "run/report.json").read_text()) for out in (one, two)]
    assert reports[0]["losses"] == pytest.approx(reports[1]["losses"], rel=1e-5)
    assert reports[0]["images"] == reports[1]["images"] and reports[0]["steps"] == reports[1]["steps"] == 6


def test_the_figures_are_those_of_one_process(both):
    one, two, _ = both
    figures = [json.loads((out / "figures.json").read_text()) for out in (one, two)]
    assert figures[0]["images"] == figures[1]["images"] and figures[0]["count"] == figures[1]["count"] == 20
    assert figures[0]["images"]["known"]["skipped"] == 1
    for name in ("accuracy", "ece", "brier", "aurc", "uncertainty_right"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=1e-5), name


def test_the_predictions_are_those_of_one_process(both, shards):
    one, two, _ = both
    parts = [[read_part(part) for part in part_files(out / "answers")] for out in (one, two)]
    assert [len(rows) for rows in parts[0]] == [10, 10, 10] and parts[0] == parts[1]
    assert parts[0][2][0]["path"] == f"{shards}/s-2.tar::0.png" and parts[0][2][0]["skipped"].startswith("not an image")
    reports = [json.loads((Path(out) / "answers/report.json").read_text()) for out in (one, two)]
    assert [report["processes"] for report in reports] == [1, 2]
    for name in ("images", "parts", "skipped", "skipped_images"):
        assert reports[0][name] == reports[1][name]
