"""The folder of a run: its resolved settings, and small files that are whole or not there."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from cdc_models import processes
from cdc_models.commands.settings import Compute, Output
from cdc_models.engine.checkpoint import differences
from cdc_models.engine.files import replacing

__all__ = ["resolved", "save_settings", "start_run", "write_json", "write_text"]

_NOT_THE_RUN = {"out", *(f.name for cls in (Compute, Output) for f in fields(cls))}


def resolved(*settings: Any, **changes: Any) -> dict[str, Any]:
    """Settings objects as one flat mapping, as a YAML file and the flags have it."""
    flat: dict[str, Any] = {}
    for part in settings:
        flat |= asdict(part)
    return json.loads(json.dumps(flat | changes, default=os.fspath))


def start_run(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of one run and save its settings; a folder of the same run is gone on with.

    Raises:
        ValueError: if the folder holds a run with other settings; those that change no result may differ.
        OSError: if it cannot be written. FirstFailed: in processes but the first, for either.
    """
    processes.on_first(lambda: _start_run(folder, settings))


def _start_run(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.yaml"
    if path.exists():
        try:
            there = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            there = None
        if not isinstance(there, dict):
            raise ValueError(f"out: {path} is not a file of settings; delete it or give another folder")
        if there.keys() - settings.keys() and settings.keys() - there.keys():
            raise ValueError(f"out: {folder} holds the run of another command or version; give another folder")
        names = sorted((there.keys() | settings.keys()) - _NOT_THE_RUN)
        if told := differences(there, settings, names):
            raise ValueError(f"out: {folder} holds another run ({told}); give another folder, or delete that one")
    save_settings(folder, settings)


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run into config.yaml in its folder, which is made.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is the old one or the new one."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping as indented JSON, as `write_text` does."""
    write_text(path, json.dumps(values, indent=1) + "\n")
