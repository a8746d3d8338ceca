"""Where a bench's row was made, and measuring in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from cdc_models import provenance


def facts(device: str) -> dict[str, Any]:
    """Threads, versions, date and command, for a row."""
    return {
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(device),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(sys.argv),
    }


def told(row: dict[str, Any]) -> str:
    """The facts of a row in a line, for the heading of a table."""
    return (
        f"{row['versions']['device']}, {row['threads']} threads, torch {row['versions']['torch']}, {row['date']}, "
        f"`{row['command']}`"
    )


def in_a_process_of_its_own(file: str, flag: str, payload: object, **environment: str) -> Any:
    """What the script `file`, called with `flag` and the payload as JSON, prints as JSON in its last line."""
    command = [sys.executable, file, flag, json.dumps(payload)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{payload} failed ({done.returncode}; -9: out of memory): {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])
