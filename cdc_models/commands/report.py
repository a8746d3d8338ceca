"""`cdc report`: the tables and pictures of finished runs once more, also of runs made in several places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdc_models import report as comparison
from cdc_models.commands.protocol import write_tables
from cdc_models.commands.settings import Output
from cdc_models.demo import LEGEND, title_of
from cdc_models.experiment import ABLATIONS, SETTINGS, Run, is_complete
from cdc_models.protocols import PROTOCOLS, TRANSFER, is_test
from cdc_models.rows import Rows

__all__ = ["Runs", "report"]


@dataclass(frozen=True)
class Runs:
    """Which runs.

    Args:
        runs: folders of `cdc protocol`, or of `cdc demo`, each with a results.jsonl; of several, as when seeds were run
            on several machines, the results are put together.
        out: folder for the tables; none: that of the runs, if it is one.
    """

    runs: tuple[Path, ...]
    out: Path | None = None


def report(what: Runs, output: Output) -> None:
    """Write the tables and pictures of finished runs again, from what their results.jsonl holds.

    Nothing is computed anew but means and deviations. The results must be of one protocol and one CLIP.
    """
    if not what.runs:
        raise ValueError("runs: expected at least one folder, got none")
    if what.out is None and len(what.runs) > 1:
        raise ValueError(f"out: expected a folder for the tables of {len(what.runs)} folders of runs, got none")
    folder = what.runs[0] if what.out is None else what.out
    rows = list({row["key"]: row for run in what.runs for row in _read(run)}.values())
    protocol = _the_only("protocol", {str(row.get("protocol", "demo")) for row in rows})
    if protocol == "demo":
        _demo(rows, folder, output, one_run=what.runs == (folder,))
        return
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"runs: expected results of cdc demo or of a protocol ({', '.join(PROTOCOLS)}), got {protocol!r}"
        )
    if bad := [row["key"] for row in rows if not is_test(row)]:
        raise ValueError(f"runs: expected results as cdc protocol writes them, got {len(bad)} others: {bad[0]!r:.80}")
    _the_only("CLIP", {_part_of_key(row, 1) for row in rows})  # by the hash of its weights
    if protocol in TRANSFER:
        _the_only("source", {row["source"] for row in rows})
    _one_meaning(rows, "method", "recipe")
    folder.mkdir(parents=True, exist_ok=True)
    rows.sort(key=lambda row: (row["shots"], row["seed"]))
    write_tables(protocol, rows, rows[0]["backbone"], folder, output)


def _demo(rows: list[dict[str, Any]], folder: Path, output: Output, one_run: bool) -> None:
    """The report of the bundled benchmark; rows in the order in which `cdc demo` has them."""
    rows = [row for row in rows if is_complete(row) and isinstance(row.get("label"), str)]
    if not rows:
        raise ValueError("runs: expected finished runs of cdc demo, got none with all figures")
    fingerprint = _the_only("CLIP", {_part_of_key(row, 0) for row in rows})
    _one_meaning(rows, "label", "setting")
    order = [*SETTINGS, *ABLATIONS, *(row["label"] for row in rows)]
    try:
        runs = [Run(**row["run"]) for row in rows]
        rows.sort(key=lambda row: (order.index(row["label"]), row["run"]["split"], row["run"]["seed"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"runs: expected results as cdc demo writes them, got others ({error})") from error
    _the_only("task", {(run.task, run.partition, run.shots) for run in runs})
    there = folder / "summary.json"
    # what the run itself said of its command, date and versions
    facts = json.loads(there.read_text()) if there.exists() and one_run else {}
    facts |= {"backbone": fingerprint, "settings": {row["label"]: row["setting"] for row in rows}}
    folder.mkdir(parents=True, exist_ok=True)
    summary, table, pictures = comparison.write_comparison(rows, title_of(runs), folder, facts)
    output.result(summary)
    output.say(table)
    output.say(LEGEND)
    output.say(f"{folder}: summary.json, table.md, {', '.join(p.name for p in pictures)}")


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"runs: {path} is not there; expected a folder that cdc protocol or cdc demo has written"
        )
    rows = list(Rows(path).rows.values())
    if not rows:
        raise ValueError(f"runs: {path} holds no results")
    return rows


def _part_of_key(row: dict[str, Any], place: int) -> Any:
    try:
        return json.loads(row["key"])[place]
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"runs: expected results as cdc writes them, got the key {row['key']!r:.80}") from error


def _the_only(what: str, values: set[Any]) -> Any:
    if len(values) > 1:
        raise ValueError(f"runs: expected results of one {what}, got {', '.join(sorted(map(str, values)))}")
    return next(iter(values))


def _one_meaning(rows: Sequence[dict[str, Any]], label: str, setting: str) -> None:
    """Refuse results that would stand under one name and were made in different ways."""
    settings: dict[str, Any] = {}
    for row in rows:
        if settings.setdefault(row[label], row.get(setting)) != row.get(setting):
            raise ValueError(
                f"runs: {row[label]!r} stands for {settings[row[label]]} and for {row.get(setting)}; report them apart"
            )
