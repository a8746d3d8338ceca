"""Choose hyper-parameters on the two validation splits, every trained method with the same grid of schedules.

    python benches/tune.py --out benches/results/tuning --grid schedules --workers 2
    python benches/tune.py --out benches/results/tuning --grid cdc --workers 2

Classes of the validation splits appear in no reported split. Finished runs are kept in results.jsonl, so the
script goes on where it stopped; the table is printed and written to <grid>.md, best harmonic mean first.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cdc_models.clip import load_clip
from cdc_models.experiment import SETTINGS, Results, Run, Setting, compare

TRAINED = ("CoOp", "MaPLe", "CDC")


def schedules(methods: tuple[str, ...] = TRAINED) -> dict[str, Setting]:
    """Learning rate x epochs, the same grid for every trained method."""
    return {
        f"{name} lr={lr} epochs={epochs}": replace(SETTINGS[name], lr=lr, epochs=epochs)
        for name, lr, epochs in itertools.product(methods, (0.003, 0.01, 0.03), (6, 12))
    }


def parts_of_cdc() -> dict[str, Setting]:
    """What only CDC has, one change at a time from the current setting."""
    changes: dict[str, dict[str, Any]] = {"as it is": {}}
    for name, values in {
        "weight_con": (0.3, 3.0),
        "weight_de": (1.0,),
        "temperature": (0.05,),
        "activation": ("softplus",),
        "form": ("log",),
        "noise": (0.1,),
    }.items():
        changes |= {f"{name}={value}": {name: value} for value in values}
    changes["views=stronger"] = {"views": ["flip+crop", "colour+grey", "rotation", "blur"]}
    base = SETTINGS["CDC"]
    return {label: replace(base, options={**base.options, **change}) for label, change in changes.items()}


GRIDS = {"schedules": schedules, "cdc": parts_of_cdc}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", choices=GRIDS, required=True)
    parser.add_argument("--only", default="", help="only settings whose label contains this")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    settings = {label: s for label, s in GRIDS[arguments.grid]().items() if arguments.only in label}
    runs = [Run(split, seed=split + 1, partition="validation") for split in (0, 1)]
    results = Results(arguments.out / "results.jsonl", load_clip("bundled").fingerprint)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("tuning", total=len(settings) * len(runs))
        rows = compare(settings, runs, results, workers=arguments.workers, on_done=lambda *_: bar.advance(task))
    lines = []
    for label in settings:
        own = [r for r in rows if r["label"] == label]
        figures = [fmean(r[k] for r in own) for k in ("base", "new", "H", "ece_base", "unknown_auroc")]
        lines.append((figures[2], label, figures, fmean(r["seconds_train"] for r in own)))
    lines.sort(reverse=True)
    header = ["setting", "base", "new", "H", "ECE fitted", "unknown AUROC", "train s"]
    table = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for _, label, figures, seconds in lines:
        table.append([label, *(f"{100 * value:.1f}" for value in figures), f"{seconds:.1f}"])
    markdown = "\n".join("| " + " | ".join(row) + " |" for row in table)
    (arguments.out / f"{arguments.grid}.md").write_text(markdown + "\n")
    print(markdown)


if __name__ == "__main__":
    main()
