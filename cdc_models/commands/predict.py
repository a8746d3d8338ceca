"""`cdc predict`: a class and how far to trust it, for every image of a folder, table, list or .tar file."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cdc_models import processes
from cdc_models.commands.parts import learned_hash, model_of
from cdc_models.commands.run_folder import resolved, start_run, write_json
from cdc_models.commands.settings import Compute, Interrupted, Model, Output
from cdc_models.data import DatasetError, image_paths
from cdc_models.engine.files import from_json
from cdc_models.methods import Method
from cdc_models.provenance import git_commit, peak_memory, versions
from cdc_models.shards import part_files, predict_shards, read_part

__all__ = ["Images", "predict"]

LISTED = 1000


@dataclass(frozen=True)
class Images:
    """Which images, and where to.

    Args:
        images: a folder, a .txt list of paths, a .csv, .tsv or .parquet file with a column path, or .tar files
            (WebDataset shards) such as "shards-{000..099}.tar"; .tar files may also be among those of a folder, list
            or table.
        root: the folder that relative paths of a list or table start from.
        classes: class names to choose among; none: those that the adapter was trained on.
        template: text with one "{}" for the class name; zero-shot CLIP only.
        out: folder for part-00000.parquet and so on, config.yaml and report.json; the same command goes on from what is
            there.
        format: parquet (needs pyarrow) or jsonl, a JSON object a line.
        shard_size: images in one part; those of a .tar file are a part by themselves.
    """

    images: str
    root: str | None = None
    classes: list[str] | None = None
    template: str = "a photo of a {}."
    out: Path = Path("runs/predict")
    format: Literal["parquet", "jsonl"] = "parquet"
    shard_size: int = 10_000


def predict(images: Images, model: Model, compute: Compute, output: Output) -> None:
    """Classify images, and say how far each answer is to be trusted.

    Writes a row for every image: path, class, probability, belief, uncertainty, conflict, template_uncertainty, and
    skipped (why the image could not be read, or nothing). Holds one part at a time; parts that are there are not made
    again.
    """
    started = time.perf_counter()
    with output.status("loading CLIP"):
        classifier = model_of(model, compute, images.classes, images.template)
    paths = image_paths(images.images, images.root)
    first = next(paths, None)
    if first is None:
        raise DatasetError(f"images: {images.images} holds no files")
    start_run(images.out, resolved(images, model, compute, output))
    processes.on_first(lambda: _check_classifier(images.out / "classifier.json", classifier))
    columns = (SpinnerColumn(), TextColumn("images"), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, disable=not output.progress, transient=True)
    task = bar.add_task("", total=None)
    begun, meet = time.perf_counter(), processes.meeting()
    try:
        with bar:
            for _ in predict_shards(
                classifier,
                chain([first], paths),
                images.out,
                shard_size=images.shard_size,
                format=images.format,
                batch=compute.test_batch,
                workers=compute.readers,
                part=processes.part(),
                on_batch=lambda done: bar.update(task, advance=done),
            ):
                pass
    except KeyboardInterrupt:
        raise Interrupted(f"finished parts are in {images.out}; the same command goes on from there") from None
    with output.status("waiting for the other processes"):
        meet()
    predicting = time.perf_counter() - begun
    if not processes.is_first():
        return
    count, reasons, listed, parts = 0, Counter[str](), list[dict[str, str]](), part_files(images.out, images.format)
    for rows in map(read_part, parts):
        skipped = [{"path": row["path"], "reason": row["skipped"]} for row in rows if row["skipped"]]
        count += len(rows)
        reasons.update(image["reason"].split(" (")[0] for image in skipped)
        listed += skipped[: LISTED - len(listed)]
    values = {
        "folder": str(images.out),
        "images": count,
        "parts": len(parts),
        "skipped": sum(reasons.values()),
        "by_reason": dict(reasons),
        "skipped_images": listed,
        "method": classifier.name,
        "processes": processes.part()[1],
        "seconds_predicting": predicting,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(classifier.backbone.device),
        "versions": versions(classifier.backbone.device),
        "commit": git_commit(),
    }
    write_json(images.out / "report.json", values)
    output.result(values)
    output.say(f"{images.out}: {count} images in {len(parts)} part(s), {values['seconds']:.0f} s")
    if reasons:
        told = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        output.say(f"{values['skipped']} skipped: {told}; listed in {images.out / 'report.json'}")


def _check_classifier(path: Path, classifier: Method) -> None:
    """Parts of one folder are one classifier's: an adapter file may have been written anew since the first of them."""
    own = {"backbone": classifier.backbone.fingerprint, "learned": learned_hash(classifier)}
    if path.exists():
        try:
            there = from_json(path.read_text())
        except ValueError as error:
            raise ValueError(f"out: {path} is damaged ({error}); delete it, or give another folder") from error
        if there != own:
            raise ValueError(f"out: the parts in {path.parent} are of another classifier; give another folder")
    write_json(path, own)
