"""Predictions of many images, a part of them at a time: written whole or not at all, and not made twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cdc_models.data import ImageList, TarImages, test_transform
from cdc_models.data.image_loader import read_batches
from cdc_models.data.tables import need_pyarrow
from cdc_models.engine.files import replacing
from cdc_models.methods import Method
from cdc_models.processes import check_part

__all__ = ["COLUMNS", "FORMATS", "part_files", "predict_images", "predict_shards", "read_part"]

COLUMNS = (
    "path", "class", "probability", "belief", "uncertainty", "conflict", "template_uncertainty", "skipped",
)  # fmt: skip
FORMATS = ("parquet", "jsonl")

Row = dict[str, Any]


@torch.no_grad()
def predict_images(
    model: Method,
    images: Sequence[str] | str,
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
        model: any method.
        images: paths of image files; or one path, of a .tar file of images, which gets a row of its own, the last one,
            if it is damaged.
        batch, workers: as for `ImageLoader`.
        on_batch: called with the number of images in each batch.
    """
    transform = test_transform(model.backbone)
    data: ImageList | TarImages
    if isinstance(images, str):
        data = TarImages(images, transform)
        names, damage = data.names, data.damage
    else:
        names, damage = [str(path) for path in images], None
        # every image is a class of its own here, so that the targets say which images a batch holds
        data = ImageList("", [(name, i) for i, name in enumerate(names)], names, transform)
    rows: list[Row] = [_row(name) for name in names]
    device = model.backbone.device
    batches = read_batches(data, range(len(rows)), batch, workers, pin_memory=device.type == "cuda")
    for first, (good, bad) in zip(range(0, len(rows), batch), batches, strict=True):
        here = range(first, min(first + batch, len(rows)))
        places = [] if good is None else good[1].tolist()
        if good is not None:
            said = model.predict(good[0].to(device, non_blocking=True))
            at = said.classes[:, None]
            columns = {
                "class": said.labels(),
                "probability": said.prob.gather(1, at).squeeze(1).tolist(),
                "belief": None if said.belief is None else said.belief.gather(1, at).squeeze(1).tolist(),
                "uncertainty": said.uncertainty.tolist(),
                "conflict": None if said.conflict is None else said.conflict.tolist(),
                "template_uncertainty": None if said.prompt_uncertainty is None else said.prompt_uncertainty.tolist(),
            }
            for i, place in enumerate(places):
                rows[place] |= {name: None if values is None else values[i] for name, values in columns.items()}
        for place, image in zip(sorted({*here} - {*places}), bad, strict=True):
            rows[place]["skipped"] = f"{image.reason} ({image.detail})"
        on_batch(len(here))
    if damage is not None:
        rows.append(_row(damage.path) | {"skipped": f"{damage.reason} ({damage.detail})"})
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
    part: tuple[int, int] = (0, 1),
    on_batch: Callable[[int], None] = lambda count: None,
) -> Iterator[list[Row]]:
    """Predict images into files part-00000 and so on, `shard_size` images each; holds one part at a time.

    A path that ends in .tar stands for the images within, which are a part of their own, however many they are. A part
    is written beside its place and renamed, so one that is there is whole; it is checked to be of the same images, and
    not made again.

    Args:
        model: any method. paths: the files, the same ones in the same order in every call and every process.
        folder: for the parts; must exist.
        shard_size: images in a part. format: "parquet" or "jsonl".
        batch, workers, on_batch: see `predict_images`.
        part: (r, n) makes parts r, r + n, r + 2n and so on: what process r of n does. They need not run together.

    Yields:
        The rows of each part, new or found; of those found only path and skipped.

    Raises:
        ValueError: for arguments out of range, or a part that holds other images.
        OSError: if a part cannot be written. ImportError: for Parquet without pyarrow.
    """
    if shard_size < 1 or format not in FORMATS:
        raise ValueError(f"shard_size, format: expected at least 1 and one of {FORMATS}, got {shard_size}, {format!r}")
    check_part(part)
    if format == "parquet":
        _pyarrow()
    number = -1
    for number, images in enumerate(_parts(paths, shard_size)):
        if number % part[1] != part[0]:
            continue
        path = _part_file(folder, number, format)
        if path.exists():
            rows = read_part(path)
            if not _are_of(rows, images):
                raise _other_images(path)
            on_batch(len(rows))
        else:
            rows = predict_images(model, images, batch=batch, workers=workers, on_batch=on_batch)
            _write(path, rows)
        yield rows
    if (beyond := _part_file(folder, number + 1, format)).exists():
        raise _other_images(beyond)


def part_files(folder: Path, format: str = "parquet") -> list[Path]:
    """The parts that are in a folder."""
    return sorted(folder.glob(f"part-*.{format}"))


def _part_file(folder: Path, number: int, format: str) -> Path:
    return folder / f"part-{number:05d}.{format}"


def _parts(paths: Iterable[str], size: int) -> Iterator[list[str] | str]:
    """Image files in parts of a size; a .tar file as it is. The next path is asked for when the next part is."""
    images: list[str] = []
    for path in paths:
        if path.lower().endswith(".tar"):
            if images:
                yield images
            yield path
            images = []
        else:
            images.append(path)
            if len(images) == size:
                yield images
                images = []
    if images:
        yield images


def _are_of(rows: Sequence[Row], images: list[str] | str) -> bool:
    """Whether rows are of these image files, or of this .tar file."""
    if isinstance(images, str):
        held = TarImages(images)
        images = [*held.names, *([] if held.damage is None else [held.damage.path])]
    return [row["path"] for row in rows] == [_text(path) for path in images]


def _other_images(path: Path) -> ValueError:
    return ValueError(f"out: {path} holds predictions of other images; give another folder, or delete it")


def _row(name: str) -> Row:
    return dict.fromkeys(COLUMNS, None) | {"path": _text(name)}


def _text(name: str) -> str:
    """A name as text that can be stored: bytes of a name that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


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


def read_part(path: Path) -> list[Row]:
    """Path and skipped of each row of a part.

    Raises:
        ValueError: for a file that is no part.
    """
    try:
        if path.suffix == ".jsonl":
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            return [{"path": row["path"], "skipped": row["skipped"]} for row in rows]
        arrow = _pyarrow()
        return arrow.parquet.read_table(path, columns=["path", "skipped"]).to_pylist()
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:  # pyarrow's are some of these
        raise ValueError(f"out: {path} is no part of predictions ({error}); delete it to have it made again") from error
