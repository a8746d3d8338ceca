"""Kernels compiled for GPUs that are not here: the committed table, and a fresh compilation that keeps it true."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from cdc_kernels import aot, chunks, decoupling, fused_opinion, fusion, row_loss  # noqa: E402

COMMITTED = Path(__file__).parents[2] / "benches/results/aot/aot.json"
#: Stated bounds on spilled registers, bytes for each thread: KL's gamma functions spill, wide tiles do beside their
#: loop of products (never in it), and so do the addresses of features whose size is odd. Sizes of one are compiled to
#: see that they compile.
STACK = 480
STACK_OF_CASE = {"opinion, odd D": 880, "loss, sizes of one": 680}


def check(report):
    """Bounds that hold whatever the compiler's version."""
    _, _, shared, _ = aot.TARGETS[report["target"]]
    assert report["shared"] <= shared, report
    assert report["stack"] <= STACK_OF_CASE.get(report["case"], STACK), report
    assert report["warp"] == (64 if report["target"] == "gfx942" else 32), report
    assert not report["spills_in_loop"] or report["case"] == "opinion, odd D", report
    products = report["kernel"] in aot.WITH_PRODUCTS and (report["dtype"] != "fp32" or report["target"] == "gfx942")
    assert (report["matrix_instructions"] > 0) == products, report


def test_the_committed_table_is_whole_and_within_bounds():
    committed = json.loads(COMMITTED.read_text())
    reports = committed["reports"]
    assert [(r["kernel"], r["case"], r["dtype"], r["target"]) for r in reports] == list(aot.everything())
    assert committed["defaults"] == aot.defaults(), "launch configurations changed: write the table again"
    for report in reports:
        check(report)
    table = (COMMITTED.parent / "aot.md").read_text()
    assert table.endswith(aot.markdown([aot.Report(**r) for r in reports]))


def test_no_kernel_is_left_out():
    covered = {id(each[0]) for each in aot.FUSED.values()} | {id(each) for each in aot.SMALL.values()}
    for module in (chunks, decoupling, fused_opinion, fusion, row_loss):
        kernels = {name: f for name, f in vars(module).items() if name.endswith("_kernel")}
        assert kernels, module
        for name, kernel in kernels.items():
            assert id(kernel) in covered, name
    flags = {p for f, *_ in aot.FUSED.values() for p in inspect.signature(f.fn).parameters if p.isupper()}
    assert {"ACTIVATION", "RULE", "TARGET", "SQUARE", "KL", "LOADED"} <= flags


def fresh(*command):
    """The output of a fresh process, whose kernels are not interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def compile_now(folder, *patterns):
    """Reports of kernels compiled now, nothing taken from a cache."""
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    try:
        fresh("cdc_kernels.aot", "--out", str(folder), "--only", *patterns)
    finally:
        del os.environ["TRITON_CACHE_DIR"]
    return json.loads((folder / "aot.json").read_text())["reports"]


def compare(reports):
    committed = json.loads(COMMITTED.read_text())
    same = committed["versions"]["triton"] == triton.__version__
    for report in reports:
        check(report)
        if same:
            assert report in committed["reports"], "the kernel changed: write the table again"


SAMPLE = {
    "cuda80": ["forward/loss digamma, log/bf16/cuda80", "epilogue/opinion/*/cuda80"],
    "cuda90": ["forward_4/opinion/bf16/cuda90", "slope/loss digamma, log/bf16/cuda90", "project//*/cuda90"],
    "gfx942": ["text/loss digamma, log/bf16/gfx942", "fuse_forward/dempster/*/gfx942"],
}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiled_now(target, tmp_path):
    reports = compile_now(tmp_path, *SAMPLE[target])
    assert len(reports) == len(SAMPLE[target])
    compare(reports)


def test_a_logit_costs_half_as_much_in_linear_space():
    """The counts of benches/NOTES.md, with some room for another compiler."""
    printed = fresh("cdc_kernels.cost")
    cost = {name.strip(): float(n) for name, n in re.findall(r"^([a-z ]+?) +([\d.]+) instructions", printed, re.M)}
    assert cost["linear"] < 0.6 * cost["logs"] < 0.6 * 40, cost
    assert "S2 backward bf16" in printed


@pytest.mark.slow
def test_everything_compiled_now(tmp_path):
    reports = compile_now(tmp_path, "*")
    assert len(reports) == len(list(aot.everything()))
    compare(reports)
