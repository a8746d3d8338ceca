"""Predictions of many images, a shard of them at a time: written whole or not at all, and not made twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from cdc_models.data import DatasetError, ImageList, ImageLoader, test_transform
from cdc_models.data.tables import need_pyarrow
from cdc_models.engine.files import replacing
from cdc_models.methods import Method

__all__ = ["COLUMNS", "FORMATS", "predict_images", "predict_shards"]

COLUMNS = (
    "path", "class", "probability", "belief", "uncertainty", "conflict", "template_uncertainty", "skipped",
)  # fmt: skip
FORMATS = ("parquet", "jsonl")

Row = dict[str, Any]


@torch.no_grad()
def predict_images(
    model: Method,
    paths: Sequence[str],
    *,
    batch: int = 100,
    workers: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Row]:
    """What a method says about image files: a row for each, in their order.

    A row has the `COLUMNS`: path; class, the most probable one, with its probability and its belief; uncertainty,
    conflict and template_uncertainty (one number per template) as `Prediction` has them; skipped, why the image could
    not be read, and then all others are None. Softmax methods have no belief, conflict and template_uncertainty.

    Args:
        model: any method. paths: the files.
        batch, workers: as for `ImageLoader`.
        on_batch: called with the number of images in each batch.
    """
    rows: list[Row] = [dict.fromkeys(COLUMNS, None) | {"path": path} for path in paths]
    # Every image is a class of its own here, so that the targets say which images a batch holds.
    images = ImageList("", [(path, i) for i, path in enumerate(paths)], paths, test_transform(model.backbone))
    loader = ImageLoader(images, batch, num_workers=workers, pin_memory=model.backbone.device.type == "cuda")
    read: set[int] = set()
    try:
        for pixels, places in loader:
            said = model.predict(pixels.to(model.backbone.device, non_blocking=True))
            at = said.classes[:, None]
            columns = {
                "class": said.labels(),
                "probability": said.prob.gather(1, at).squeeze(1).tolist(),
                "belief": None if said.belief is None else said.belief.gather(1, at).squeeze(1).tolist(),
                "uncertainty": said.uncertainty.tolist(),
                "conflict": None if said.conflict is None else said.conflict.tolist(),
                "template_uncertainty": None if said.prompt_uncertainty is None else said.prompt_uncertainty.tolist(),
            }
            for i, place in enumerate(places.tolist()):
                rows[place] |= {name: None if values is None else values[i] for name, values in columns.items()}
            read.update(places.tolist())
            on_batch(len(places))
    except DatasetError:
        if read or not loader.report.skipped:
            raise
        # not one image of this shard can be read, which the rows say
    reasons = {image.path: f"{image.reason} ({image.detail})" for image in loader.report.skipped}
    for place in set(range(len(paths))) - read:
        rows[place]["skipped"] = reasons[str(Path(paths[place]))]
    return rows


def predict_shards(
    model: Method,
    paths: Iterable[str],
    folder: Path,
    *,
    shard_size: int = 10_000,
    format: str = "parquet",
    batch: int = 100,
    workers: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Iterator[list[Row]]:
    """Predict images into files part-00000 and so on, `shard_size` images each; holds one shard at a time.

    A shard is written beside its place and renamed, so one that is there is whole; it is checked to be of the same
    images, and not made again.

    Args:
        model: any method. paths: the files, the same ones in the same order in every call.
        folder: for the shards; must exist.
        shard_size: images in a shard. format: "parquet" or "jsonl".
        batch, workers, on_batch: see `predict_images`.

    Yields:
        The rows of each shard, new or found; of those found only path and skipped.

    Raises:
        ValueError: for arguments out of range, or a shard that holds other images.
        OSError: if a shard cannot be written. ImportError: for Parquet without pyarrow.
    """
    if shard_size < 1 or format not in FORMATS:
        raise ValueError(f"shard_size, format: expected at least 1 and one of {FORMATS}, got {shard_size}, {format!r}")
    if format == "parquet":
        _pyarrow()
    rest = iter(paths)
    for number in count():
        shard = list(islice(rest, shard_size))
        if not shard:
            return
        path = folder / f"part-{number:05d}.{format}"
        if path.exists():
            rows = _read(path)
            if [row["path"] for row in rows] != shard:
                raise ValueError(f"out: {path} holds predictions of other images; give another folder, or delete it")
            on_batch(len(rows))
        else:
            rows = predict_images(model, shard, batch=batch, workers=workers, on_batch=on_batch)
            _write(path, rows)
        yield rows


def _pyarrow() -> Any:
    return need_pyarrow("format: writing Parquet", ", or take jsonl")


def _write(path: Path, rows: Sequence[Row]) -> None:
    with replacing(path) as beside:
        if path.suffix == ".jsonl":
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            arrow = _pyarrow()
            kinds = {"path": arrow.string(), "class": arrow.string(), "skipped": arrow.string()}
            kinds["template_uncertainty"] = arrow.list_(arrow.float32())
            schema = arrow.schema([(name, kinds.get(name, arrow.float32())) for name in COLUMNS])
            arrow.parquet.write_table(arrow.Table.from_pylist(list(rows), schema), beside)


def _read(path: Path) -> list[Row]:
    try:
        if path.suffix == ".jsonl":
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            return [{"path": row["path"], "skipped": row["skipped"]} for row in rows]
        arrow = _pyarrow()
        return arrow.parquet.read_table(path, columns=["path", "skipped"]).to_pylist()
    except (ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(
            f"out: {path} is no shard of predictions ({error}); delete it to have it made again"
        ) from error
