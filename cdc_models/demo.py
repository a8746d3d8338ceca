"""`cdc demo`: zero-shot CLIP, CoOp, MaPLe and CDC on the bundled benchmark, as a table and pictures."""

from __future__ import annotations

import datetime
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cdc_models import report
from cdc_models.clip import ClipBackbone, load_clip
from cdc_models.data import test_transform
from cdc_models.data.emoji import TASKS
from cdc_models.engine import calibrate
from cdc_models.experiment import ABLATIONS, SETTINGS, Results, Run, batches, benchmark_of, compare, train_one
from cdc_models.methods import CDC
from cdc_models.processes import cores

__all__ = ["LEGEND", "demo", "title_of"]

LEGEND = (
    "base, new, H: accuracy in %, ± deviation over runs.  H − …: paired by class split, ± 95 % interval.  ECE: "
    "calibration error on base classes, before and after fitting one temperature on 4 further shots a class.  AURC: "
    "risk over coverage, lower is better, and AUROC: images of new classes shown to the base classifier told from base "
    "images; both by largest probability, and by the method's own uncertainty (CDC: vacuity)."
)


def demo(
    out: Path = Path("runs/demo"),
    splits: int = 3,
    seeds: int = 1,
    shots: int = 16,
    task: str = "artist",
    ablation: bool = False,
    partition: str = "test",
    methods: list[str] | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Adapt the bundled CLIP with every method and show what each is worth.

    Args:
        out: folder for results.jsonl (finished runs: a second call goes on from them), summary.json, table.md
            and the pictures.
        splits: how many of the five class splits.
        seeds: draws of shots per split; run i of split s uses seed s * seeds + i + 1.
        shots: training images per base class.
        task: "artist" (shots by the artist of the test images) or "transfer" (shots by other artists).
        ablation: CDC with each of its parts switched off, instead of the methods.
        partition: "test", or "validation" to choose hyper-parameters on.
        methods: only these rows of the table.
        workers: processes that share the runs; 0 takes one per core, at most 8.

    Returns:
        The summary that is written to summary.json.

    Raises:
        ValueError: for counts or names out of range.
    """
    console = Console() if sys.stdout.isatty() else Console(width=132)
    if task not in TASKS:
        raise ValueError(f"task: expected one of {TASKS}, got {task!r}")
    if partition not in ("test", "validation"):
        raise ValueError(f"partition: expected 'test' or 'validation', got {partition!r}")
    if not 1 <= splits <= (5 if partition == "test" else 2) or not 1 <= seeds <= 100:
        raise ValueError(
            f"splits, seeds: expected 1 to 5 splits (validation: 2) and 1 to 100 seeds, got {splits}, {seeds}"
        )
    settings = ABLATIONS if ablation else SETTINGS
    if shots < 1:
        raise ValueError(f"shots: expected at least 1, got {shots}")
    if methods is not None:
        if not methods:
            raise ValueError(f"methods: expected some of {list(settings)}, got none")
        if unknown := sorted(set(methods) - set(settings)):
            raise ValueError(f"methods: unknown {unknown}; known are {list(settings)}")
        settings = {label: settings[label] for label in methods}
    if workers < 0:
        raise ValueError(f"workers: expected a number >= 0, got {workers}")
    workers = workers or min(8, cores())
    started = time.perf_counter()
    backbone = load_clip("bundled")
    runs = [Run(split, split * seeds + i + 1, task, partition, shots) for split in range(splits) for i in range(seeds)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").open("a").close()  # a place that cannot be written is found out now, not after a run
    results = Results(out / "results.jsonl", backbone.fingerprint)
    resumed = sum(results.get(label, s, run) is not None for run in runs for label, s in settings.items())
    columns = (
        TextColumn("{task.description:46s}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        everything = bar.add_task("adapting", total=len(runs) * len(settings))

        def on_done(label: str, run: Run) -> None:
            bar.update(everything, advance=1, description=f"{label}, split {run.split}, seed {run.seed}")

        try:
            rows = compare(settings, runs, results, workers=workers, on_done=on_done)
        except KeyboardInterrupt:
            bar.stop()
            console.print(f"Interrupted. Finished runs are in {results.path}; the same command goes on from there.")
            raise SystemExit(130) from None

    facts = {
        "command": "cdc " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "machine": f"{platform.machine()}, {workers} processes of one thread",
        },
        "backbone": backbone.fingerprint,
        "settings": {label: asdict(setting) for label, setting in settings.items()},
        "seconds": time.perf_counter() - started,
        "runs_taken_from_an_earlier_call": resumed,
    }
    summary, table, pictures = report.write_comparison(rows, title_of(runs), out, facts)
    console.print(table)
    console.print(LEGEND, style="dim")
    if "CDC" in settings:
        with console.status("drawing examples"):
            report.plot_sheet(_examples(backbone, runs[0]), out / "examples.png")
        pictures.append(out / "examples.png")
    console.print(
        f"{summary['seconds']:.0f} s.  JSON, table and pictures are in {out}/: {', '.join(p.name for p in pictures)}"
    )
    return summary


def title_of(runs: Sequence[Run]) -> str:
    """What these runs are, in a line."""
    [(task, partition, shots)] = {(run.task, run.partition, run.shots) for run in runs}
    splits = len({run.split for run in runs})
    what = {"artist": "seen concepts, unseen artist", "transfer": "shots by other unseen artists"}[task]
    return f"{what}; {shots} shots, {splits} class splits x {len(set(runs)) // splits} draws" + (
        "" if partition == "test" else f" ({partition} classes)"
    )


def _examples(backbone: ClipBackbone, run: Run) -> list[dict[str, Any]]:
    """Surely right, surely wrong, unsure, and images of unknown classes, as CDC sees them."""
    data = benchmark_of(run)
    model = train_one(SETTINGS["CDC"], run, backbone, progress=False)
    assert isinstance(model, CDC)
    transform = test_transform(backbone)
    calibrate(model, batches(data.val, transform, 200))
    examples: list[dict[str, Any]] = []
    for known, test in ((True, data.base_test), (False, data.new_test)):
        images = torch.stack([transform(image) for image in test.images[::4]])
        with torch.no_grad():
            features = model.image_features(images)
            said = model.predict_features(features, model.cached_text_features())
            each = model.template_prob(features).max(-1)
        truths = [test.classes[i] for i in test.targets[::4].tolist()]
        order = said.uncertainty.argsort().tolist()
        right = [i for i in order if known and said.labels()[i] == truths[i]]
        wrong = [i for i in order if known and said.labels()[i] != truths[i]]
        chosen = right[:2] + right[-2:] + wrong[:2] + wrong[-2:] if known else order[:2] + order[-2:]
        belief = said.belief if said.belief is not None else said.prob
        for i in chosen:
            examples.append(
                {
                    "image": test.images[4 * i],
                    "truth": truths[i],
                    "known": known,
                    "predicted": said.labels()[i],
                    "belief": float(belief[i, said.classes[i]]),
                    "uncertainty": float(said.uncertainty[i]),
                    "templates": [
                        (model.class_names[k], float(p))
                        for k, p in zip(each.indices[i].tolist(), each.values[i].tolist(), strict=True)
                    ],
                }
            )
    return examples
