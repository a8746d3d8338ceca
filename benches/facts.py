"""What a bench's row says of where it was made, which rows are of one making, and measuring in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from cdc_models import provenance

ROOT = Path(__file__).parents[1]
#: The code that figures of the fused operations depend on, and that figures of whole models do.
OPERATIONS = ("cdc_ops", "kernels/cdc_kernels", ":(glob)benches/*.py")
MODELS = (*OPERATIONS, "cdc_models")

Row = dict[str, Any]
T = TypeVar("T")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def results_folder(device: str) -> Path:
    """Where the tables of the fused operations on "cuda", "cpu" or "interpreter" go."""
    name = device_name(device) if device == "cuda" else device
    return ROOT / "benches/results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def code_version(measured: tuple[str, ...] = OPERATIONS) -> str:
    """The last commit that touched what is measured; "+" and a digest of what the working tree changes."""
    paths = ["--", *measured]
    try:
        log = ["git", "log", "-1", "--format=%h", *paths]
        commit = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        status = ["git", "status", "--porcelain", *paths]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        difference = subprocess.run(["git", "diff", "HEAD", *paths], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (f"+{zlib.crc32(changed.encode() + difference):08x}" if changed else "")


def interpret() -> None:
    """Have Triton's kernels interpreted: it asks once, when it is imported, which other imports have done by now.

    So this script starts again, unless it was started that way.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"TRITON_INTERPRET": "1"})


def identity(device: str) -> Row:
    """What must agree for a row that is there to stand for one measured now."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "code": code_version(MODELS),
    }


def key(device: str, **what: object) -> str:
    """The key of a row about `what`, made here and with this code."""
    return json.dumps({**what, **identity(device)})


def of_one_making(rows: Iterable[Row], device: str) -> list[Row]:
    """Those of the rows that were made here and with this code."""
    own = identity(device)
    return [row for row in rows if all(row.get(name) == value for name, value in own.items())]


def facts(device: str) -> Row:
    """Where, with what, when and by which command, for a row."""
    return {
        **identity(device),
        "versions": provenance.versions(device),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(sys.argv),
    }


def told(row: Row) -> str:
    """The facts of a row in a line, for the heading of a table."""
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, code {row['code']}, {row['date']}, "
        f"`{row['command']}`"
    )


def with_peak(call: Callable[[], T], device: str) -> tuple[T, Row]:
    """What a call returns; and the most bytes it held beyond what was held before it.

    "at_least" is True where the system cannot forget what this process has held before: the bytes are then a lower
    bound.
    """
    gc.collect()
    give_back_freed_memory()
    restarted = provenance.restart_peak_memory(device)
    before = provenance.peak_memory(device)
    result = call()
    peak = provenance.peak_memory(device)
    assert before is not None and peak is not None
    return result, {"bytes": peak - before, "at_least": not restarted}


def give_back_freed_memory() -> None:
    """The C library keeps what was freed; a call that uses it again would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def in_a_process_of_its_own(file: str, flag: str, payload: object, **environment: str) -> Any:
    """What the script `file`, called with `flag` and the payload as JSON, prints as JSON in its last line."""
    command = [sys.executable, file, flag, json.dumps(payload)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{payload} failed ({done.returncode}; -9: out of memory): {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])
