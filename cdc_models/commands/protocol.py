"""`cdc protocol`: a table of the papers, from datasets on disk to means beside the published figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cdc_models.commands.parts import backbone_of
from cdc_models.commands.run_folder import resolved, save_settings, write_json, write_text
from cdc_models.commands.settings import Backbone, Compute, Interrupted, Output
from cdc_models.console_table import ConsoleTable
from cdc_models.data import BASE_TO_NEW, IMAGENET_VARIANTS, ImageDataset, find_published, load_dataset
from cdc_models.protocols import TRANSFER, Cell, Runner, Target, latex, lines, markdown, plan, summarise
from cdc_models.recipes import Training, recipes_of

__all__ = ["PROTOCOL_COMMANDS", "base_to_new", "cross_dataset", "domain_generalisation", "few_shot", "write_tables"]

ELEVEN = tuple(dataset.name for dataset in BASE_TO_NEW)
VARIANTS = tuple(dataset.name for dataset in IMAGENET_VARIANTS)

# CoOp's own published training (its repository's configurations for ViT-B/16), and MaPLe's depth in transfer.
COOP = {"epochs": 50, "lr": 0.002, "batch": 32}
COOP_FEW_SHOT = {**COOP, "epochs": 200, "options": {"n_ctx": 16, "words": None}}
SHALLOW = {"options": {"depth": 3}}

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class BaseToNew:
    """What is run.

    Args:
        out: folder for config.yaml, results.jsonl, summary.json, table.md, table.tex and adapters/; the same command
            goes on from what is there.
        root: folder of all datasets.
        datasets: names of the papers' datasets, or one's own folders and tables.
        methods: rows of the table: methods, or labels to which settings give a "method".
        seeds: of the draws of shots and of the training.
        shots: training images per class, one number or several.
        settings: a row's own "method", "options" and training where they differ, as {label: {name: value}}. CoOp's are
            the published ones (few-shot: those of 8 and 16 shots; it published 50 epochs for 1 shot and for ImageNet,
            100 for 2 and 4 shots).
    """

    out: Path = Path("runs/base-to-new")
    root: str = "data"
    datasets: tuple[str, ...] = ELEVEN
    methods: tuple[str, ...] = ("zero_shot", "coop", "maple", "cdc")
    seeds: tuple[int, ...] = (1, 2, 3)
    shots: int | tuple[int, ...] = 16
    settings: Settings = field(default_factory=lambda: {"coop": COOP})


@dataclass(frozen=True)
class FewShot(BaseToNew):
    """What is run."""

    out: Path = Path("runs/few-shot")
    shots: int | tuple[int, ...] = (1, 2, 4, 8, 16)
    settings: Settings = field(default_factory=lambda: {"coop": COOP_FEW_SHOT})


@dataclass(frozen=True)
class CrossDataset(BaseToNew):
    """What is run.

    Args:
        source: what is trained on, and tested on besides the datasets.
    """

    out: Path = Path("runs/cross-dataset")
    datasets: tuple[str, ...] = ELEVEN[1:]
    settings: Settings = field(default_factory=lambda: {"coop": COOP, "maple": SHALLOW, "cdc": SHALLOW})
    source: str = "ImageNet"


@dataclass(frozen=True)
class DomainGeneralisation(CrossDataset):
    """What is run."""

    out: Path = Path("runs/domain-generalisation")
    datasets: tuple[str, ...] = VARIANTS


@dataclass(frozen=True)
class TransferTraining(Training):
    """How a method is trained; MaPLe's published settings of these protocols."""

    epochs: int = 2
    lr: float = 0.0026


def base_to_new(what: BaseToNew, training: Training, backbone: Backbone, compute: Compute, output: Output) -> None:
    """Learn the base half of the classes, test on it and on the new half; H is their harmonic mean."""
    _run("base-to-new", what, training, backbone, compute, output)


def few_shot(what: FewShot, training: Training, backbone: Backbone, compute: Compute, output: Output) -> None:
    """Learn all classes from a few images each, and test on the whole test set."""
    _run("few-shot", what, training, backbone, compute, output)


def cross_dataset(
    what: CrossDataset, training: TransferTraining, backbone: Backbone, compute: Compute, output: Output
) -> None:
    """Learn from ImageNet, test on ten other datasets."""
    _run("cross-dataset", what, training, backbone, compute, output, source=what.source)


def domain_generalisation(
    what: DomainGeneralisation, training: TransferTraining, backbone: Backbone, compute: Compute, output: Output
) -> None:
    """Learn from ImageNet, test on four variants of it."""
    _run("domain-generalisation", what, training, backbone, compute, output, source=what.source)


PROTOCOL_COMMANDS: dict[str, Callable[..., None]] = {
    "base-to-new": base_to_new,
    "few-shot": few_shot,
    "cross-dataset": cross_dataset,
    "domain-generalisation": domain_generalisation,
}


def _run(
    protocol: str,
    what: BaseToNew,
    training: Training,
    backbone: Backbone,
    compute: Compute,
    output: Output,
    *,
    source: str | None = None,
) -> None:
    shots = [what.shots] if isinstance(what.shots, int) else what.shots
    recipes = recipes_of(what.methods, what.settings, training)
    source = None if source is None else _name(source)
    cells = plan(protocol, [_name(dataset) for dataset in what.datasets], what.seeds, shots, source)
    with output.status("listing images"):
        datasets = _load([*([] if source is None else [source]), *what.datasets], what.root)
    with output.status("loading CLIP"):
        clip = backbone_of(backbone.backbone, backbone.pretrained, compute)
    save_settings(what.out, resolved(what, training, backbone, compute, output))
    runner = Runner(
        protocol,
        datasets,
        clip,
        what.out,
        workers=compute.readers,
        test_batch=compute.test_batch,
        checkpoint_every=compute.checkpoint_every,
        compile=compute.compile,
        progress=output.progress,
    )
    rows = _work(runner, cells, recipes, output)
    write_tables(protocol, rows, clip.name, what.out, output)
    skipped = {image["path"] for row in rows for image in (*row["skipped_images"], *row["train_skipped"])}
    if skipped:
        output.say(f"{len(skipped)} images skipped; listed in {what.out / 'results.jsonl'}")


def write_tables(protocol: str, rows: Sequence[dict[str, Any]], backbone: str, folder: Path, output: Output) -> None:
    """Write summary.json, table.md and table.tex of these results, and show the table."""
    published = {"base-to-new": ELEVEN, "cross-dataset": ELEVEN[1:]}
    source = rows[0]["source"] if protocol in TRANSFER else None
    summary = summarise(protocol, rows, published.get(protocol, ()), source)
    title = f"{protocol}, {', '.join(map(str, dict.fromkeys(row['shots'] for row in rows)))} shots"
    write_json(folder / "summary.json", {"protocol": protocol, "backbone": backbone, "cells": summary})
    write_text(folder / "table.md", markdown(summary, title, backbone))
    write_text(folder / "table.tex", latex(summary, title, backbone))
    output.result({"protocol": protocol, "backbone": backbone, "folder": str(folder), "cells": summary})
    output.say(ConsoleTable(title, *lines(summary), labels=2))
    output.say(f"{folder}: summary.json, table.md, table.tex")


def _name(dataset: str) -> str:
    """The papers' own spelling of a name; a path as it is."""
    published = find_published(dataset)
    return dataset if published is None else published.name


def _load(datasets: Sequence[str], root: str) -> dict[str, ImageDataset]:
    return {_name(d): load_dataset(d, None if find_published(d) is None else root) for d in datasets}


def _work(runner: Runner, cells: Sequence[Cell], recipes: Mapping[str, Any], output: Output) -> list[dict[str, Any]]:
    """Run the cells under a bar of tests done; Ctrl-C says how to go on."""
    text = TextColumn("{task.description:40.40s}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, disable=not output.progress, transient=True)
    everything = bar.add_task("", total=len(recipes) * sum(len(cell.targets) for cell in cells))

    def on_done(label: str, cell: Cell, target: Target) -> None:
        bar.update(everything, advance=1, description=f"{label} on {target.dataset}, seed {cell.seed}")

    try:
        with bar:
            return runner.run(cells, recipes, on_done)
    except KeyboardInterrupt:
        raise Interrupted(f"finished results are in {runner.folder}; the same command goes on from there") from None
