"""The arrows of the house: imports run downwards only, and nothing dangerous is read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "cdc_kernels": {"cdc_kernels"},
    "cdc_ops": {"cdc_kernels", "cdc_ops"},
    "cdc_models": {"cdc_kernels", "cdc_ops", "cdc_models"},
}
FOLDERS = {"cdc_kernels": ROOT / "kernels/cdc_kernels", "cdc_ops": ROOT / "cdc_ops", "cdc_models": ROOT / "cdc_models"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_run_downwards(package):
    files = sorted(FOLDERS[package].rglob("*.py"))
    assert files
    for path in files:
        ours = set(imported(path)) & set(FOLDERS)
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[package]}"
        if package != "cdc_models":
            assert "open_clip" not in set(imported(path)), path


def test_no_pickle_is_read():
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
            assert not {"pickle", "dill", "joblib"} & set(imported(path)), path


def test_cdc_models_imports_quietly():
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "import cdc_models"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout == "", run.stderr
