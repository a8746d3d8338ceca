"""`cdc evaluate`: how often a classifier is right, and whether it knows when it is not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from cdc_models import processes
from cdc_models.clip.classes import words_of
from cdc_models.commands.parts import dataset_of, model_of
from cdc_models.commands.run_folder import write_json
from cdc_models.commands.settings import Compute, Data, Model, Output
from cdc_models.data import ImageDataset, ImageList, ImageReport, find_published, load_dataset
from cdc_models.engine import Evaluation, adapter_info
from cdc_models.engine import evaluate as evaluate_model
from cdc_models.engine.checkpoint import differences
from cdc_models.provenance import git_commit, versions
from cdc_models.recipes import reader, report_of

__all__ = ["Question", "evaluate"]


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        split: which images of the data.
        unknown: another dataset (name, folder or table), none of whose classes the classifier knows: can it tell?
        out: file for the figures as JSON; none: not written.
    """

    split: Literal["test", "val", "train"] = "test"
    unknown: str | None = None
    out: Path | None = None


def evaluate(model: Model, data: Data, question: Question, compute: Compute, output: Output) -> None:
    """Evaluate an adapter, or zero-shot CLIP, on labelled images.

    An adapter classifies among the classes of the data, also when it was trained on others. Reports accuracy,
    calibration, the worth of the uncertainty, and skipped images.
    """
    if question.out is not None:
        question.out.parent.mkdir(parents=True, exist_ok=True)
    with output.status("listing images"):
        dataset = dataset_of(data)
    strangers = None if question.unknown is None else load_dataset(question.unknown, _root_of(question.unknown, data))
    images = _images("data", dataset, question.split)
    strange = None if strangers is None else _strange_images(strangers, dataset)
    if processes.is_first():
        _warn_of_other_splits(model, data, dataset.name, question.split)
    with output.status("loading CLIP"):
        classifier = model_of(model, compute, dataset.classes, dataset.template)
    known = reader(images, classifier.backbone, compute.test_batch, compute.readers)
    unknown = None
    if strange is not None:
        unknown = reader(strange, classifier.backbone, compute.test_batch, compute.readers)
    found = evaluate_model(classifier, known, unknown=unknown, progress=output.progress)
    reports = {"known": report_of(known), "unknown": ImageReport(0) if unknown is None else report_of(unknown)}
    if not processes.is_first():
        return
    new_classes = None if model.adapter is None else _new_classes(model.adapter, dataset.classes)
    values = {
        "data": dataset.name,
        "split": question.split,
        "half": data.half,
        "classes": len(dataset.classes),
        "classes_new_to_adapter": new_classes,
        "method": classifier.name,
        "adapter": model.adapter,
        "backbone": classifier.backbone.name,
        **{name: None if value != value else value for name, value in found.numbers().items()},
        "uncertainty_quantile_95": _quantile_95(found),
        "images": {name: report.to_dict() for name, report in reports.items()},
        "versions": versions(classifier.backbone.device),
        "commit": git_commit(),
    }
    output.result(values)
    output.say(_table(f"{classifier.name} on {dataset.name}, {question.split}, {data.half} classes", found))
    if new_classes:
        output.say(f"{new_classes} of these {len(dataset.classes)} classes are new to {model.adapter}")
    for report in reports.values():
        for image in report.skipped[:10]:
            output.say(f"skipped {image.path}: {image.reason} ({image.detail})")
        if report.skipped:
            output.say(str(report))
    if question.out is not None:  # last: if it cannot be written, the figures have been told
        write_json(question.out, values)


def _images(argument: str, dataset: ImageDataset, split: str) -> ImageList:
    images: ImageList = getattr(dataset, split)
    if not len(images):
        raise ValueError(
            f"{argument}: expected {split} images in {dataset.name}, got none; where a class has few images, test_part "
            "and val_part may round to none"
        )
    return images


def _strange_images(strangers: ImageDataset, known: ImageDataset) -> ImageList:
    words = set(map(words_of, known.classes))
    if shared := [name for name in strangers.classes if words_of(name) in words]:
        told = ", ".join(shared[:10]) + (", ..." if len(shared) > 10 else "")
        raise ValueError(
            f"unknown: expected none of the classes of {known.name}, got {len(shared)} of them in {strangers.name}: "
            f"{told}"
        )
    return _images("unknown", strangers, "test")


def _warn_of_other_splits(model: Model, data: Data, name: str, split: str) -> None:
    """Warn if the images that training held out of this data may be others than those tested on."""
    if model.adapter is None or split == "train" or find_published(data.data) is not None:
        return
    trained = adapter_info(model.adapter)["summary"]
    draw = ("split_seed", "test_part") if split == "test" else ("split_seed", "test_part", "val_part")
    told = differences(trained, asdict(data), [n for n in draw if n in trained])  # early versions wrote none
    if trained.get("data") == name and told:
        warnings.warn(
            f"{model.adapter} was trained on another split of {name} ({told}); some of these images may be among those "
            "that it was trained on",
            stacklevel=3,
        )


def _new_classes(adapter: str, classes: Sequence[str]) -> int:
    """How many classes the adapter was not trained on."""
    known = set(map(words_of, adapter_info(adapter)["classes"]))
    return sum(words_of(name) not in known for name in classes)


def _root_of(unknown: str, data: Data) -> str | None:
    """The root of all datasets holds the unknown one too; a table's root is its own."""
    return None if find_published(unknown) is None or find_published(data.data) is None else data.root


def _quantile_95(found: Evaluation) -> float:
    return float(found.uncertainty.double().quantile(0.95))


def _table(title: str, found: Evaluation) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("meaning", style="dim")
    lines: list[tuple[str, Any, str]] = [
        ("images", found.count, ""),
        ("accuracy", found.accuracy, "part of right answers"),
        ("calibration error", found.ece, "stated probability against accuracy, 15 bins; lower is better"),
        ("Brier score", found.brier, "squared error of the probabilities, 0 to 2; lower is better"),
        ("AURC", found.aurc, "error left when the least probable answers are refused first; lower is better"),
        ("AURC, uncertainty", found.aurc_uncertainty, "the same, the most uncertain answers refused first"),
        ("uncertainty, right", found.uncertainty_right, "mean over right answers"),
        ("uncertainty, wrong", found.uncertainty_wrong, "mean over wrong answers"),
        ("uncertainty, 95 %", _quantile_95(found), "19 of 20 of these images lie below: a threshold to refuse by"),
        ("unknown, AUROC", found.unknown_auroc, "unknown classes told from known ones by uncertainty; 0.5 is chance"),
    ]
    for name, value, meaning in lines:
        if value is not None and value == value:
            # uncertainties rank images also where all of them are tiny
            digits = ".3g" if name.startswith("uncertainty") else "d" if isinstance(value, int) else ".4f"
            table.add_row(name, f"{value:{digits}}", meaning)
    return table
