"""Kernels compiled for GPUs that are not here: the committed table, and a fresh compilation that keeps it true."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from cdc_kernels import aot  # noqa: E402

COMMITTED = Path(__file__).parents[2] / "benches/results/aot/aot.json"
#: Stated bound on spilled registers, bytes for each thread; KL's gamma functions are what spills.
STACK = 256


def check(report):
    """Bounds that hold whatever the compiler's version."""
    _, _, shared, _ = aot.TARGETS[report["target"]]
    assert report["shared"] <= shared, report
    assert report["stack"] <= STACK, report
    assert report["warp"] == (64 if report["target"] == "gfx942" else 32), report
    products = report["kernel"] not in aot.ELEMENTWISE and (report["dtype"] != "fp32" or report["target"] == "gfx942")
    assert (report["matrix_instructions"] > 0) == products, report


def test_the_committed_table_is_whole_and_within_bounds():
    reports = json.loads(COMMITTED.read_text())["reports"]
    assert [(r["kernel"], r["case"], r["dtype"], r["target"]) for r in reports] == list(aot.everything())
    for report in reports:
        check(report)
    table = (COMMITTED.parent / "aot.md").read_text()
    assert table.endswith(aot.markdown([aot.Report(**r) for r in reports]))


def compile_now(words, folder):
    """The reports of a fresh process, whose kernels are not interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "cdc_kernels.aot", "--out", str(folder), "--only", words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "aot.json").read_text())["reports"]


def compare(reports):
    committed = json.loads(COMMITTED.read_text())
    same = committed["versions"]["triton"] == triton.__version__
    for report in reports:
        check(report)
        if same:
            assert report in committed["reports"]


@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiled_now(target, tmp_path):
    reports = compile_now(f"forward opinion bf16 {target}", tmp_path)
    assert len(reports) == 1
    compare(reports)


@pytest.mark.slow
def test_everything_compiled_now(tmp_path):
    reports = compile_now("", tmp_path)
    assert len(reports) == len(list(aot.everything()))
    compare(reports)
