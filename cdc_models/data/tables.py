"""CSV and Parquet files of (path, label), with a column for the split or without."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cdc_models.data.class_folders import SPLIT_OF
from cdc_models.data.listing import SPLITS, DatasetError, Listing, list_by_name

__all__ = ["TABLES", "csv_rows", "need_pyarrow", "parquet_rows", "read_table"]

TABLES = (".csv", ".tsv", ".parquet", ".pq")
"""How the names of tables end."""

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "set", "subset", "partition"),
}
"""Column -> the headings it is known by, whatever their capitals."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")

Row = tuple[str, str, str | None]
"""Path, class name or number, split."""


def read_table(file: Path, root: Path | None = None, classes: Sequence[str] | None = None) -> Listing:
    """List the images of a table.

    A CSV (comma, semicolon or tab, UTF-8) has a heading with "path" and "label", and perhaps "split" ("train", "val"
    or "test"), or two columns without a heading. Labels are class names, or numbers into `classes`.

    Args:
        file: ends in .csv, .tsv, .parquet or .pq.
        root: the folder that relative paths start from and no path may leave; the file's own by default. Absolute
            paths are good if they are inside, so "/" allows them all.
        classes: the class names in order.

    Raises:
        DatasetError: for a table that cannot be read, lacks a column, or has an empty cell, an unknown split or a
            path outside the root; ImportError for Parquet without pyarrow.
    """
    root = (file.parent if root is None else root).absolute()
    rows = _parquet_rows(file) if file.suffix.lower() in (".parquet", ".pq") else _csv_rows(file)
    parts: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for number, (path, label, split) in enumerate(rows, start=1):
        if not path or not label.strip():
            raise DatasetError(
                f"{file}, image {number}: expected a path and a label, got {path!r:.100}, {label!r:.100}"
            )
        part = "train" if split is None else SPLIT_OF.get(split.strip().lower())
        if part is None:
            raise DatasetError(f"{file}, image {number}: expected train, val or test as split, got {split!r:.100}")
        if os.path.isabs(path):
            absolute, path = path, os.path.relpath(path, root)
            if path.split(os.sep)[0] == os.pardir:
                raise DatasetError(
                    f"{file}, image {number}: {absolute!r:.200} is outside {root}; give a `root` that holds it"
                )
        parts[part].append((path, label.strip()))
    if not any(parts.values()):
        raise DatasetError(f"{file}: expected at least one image, got an empty table")
    return list_by_name(root, parts, classes, source=file)


def _pick(file: Path, headings: Sequence[str]) -> dict[str, int]:
    """Where each column stands among the headings."""
    plain = [heading.strip().lower() for heading in headings]
    found = {column: [i for i, heading in enumerate(plain) if heading in names] for column, names in COLUMNS.items()}
    for column, places in found.items():
        if len(places) > 1 and column in plain:  # "path" beats its other names
            found[column] = [plain.index(column)]
    if len(found["path"]) != 1 or len(found["label"]) != 1 or len(found["split"]) > 1:
        raise DatasetError(
            f'{file}: expected columns "path" and "label" (and perhaps "split"), got {", ".join(headings)[:300]!r}'
        )
    return {column: places[0] for column, places in found.items() if places}


def csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every row of a CSV that is not blank; the delimiter is what the first line has most of."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            first = lines.readline()
            lines.seek(0)
            for number, row in enumerate(csv.reader(lines, delimiter=max("\t;,", key=first.count)), start=1):
                if any(cell.strip() for cell in row):
                    yield number, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file}: cannot be read as a CSV file ({error})") from error


def parquet_rows(file: Path, pick: Callable[[Sequence[str]], Sequence[int]]) -> Iterator[tuple[str, ...]]:
    """The cells of every row of a Parquet file, of the columns that `pick` chooses by the headings."""
    pyarrow = need_pyarrow(f"{file}: reading Parquet")
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            headings = table.schema_arrow.names
            columns = [headings[i] for i in pick(headings)]
            for batch in table.iter_batches(columns=columns):
                cells = [[_text(cell) for cell in batch.column(name).to_pylist()] for name in columns]
                yield from zip(*cells, strict=True)
    except DatasetError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{file}: cannot be read as a Parquet file ({error})") from error


def need_pyarrow(what: str, instead: str = "") -> Any:
    """pyarrow with its Parquet part, or an ImportError that says how to get it for `what`, and what else would do."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{what} needs pyarrow; pip install 'cdc-ops[data]'{instead}") from error
    return pyarrow


def _csv_rows(file: Path) -> Iterator[Row]:
    place: dict[str, int] | None = None
    width = 0
    for number, row in csv_rows(file):
        if place is None:
            width = len(row)
            headless = width == 2 and row[0].lower().endswith(PICTURES)
            place = {"path": 0, "label": 1} if headless else _pick(file, row)
            if not headless:
                continue
        if len(row) != width:
            raise DatasetError(f"{file}, row {number}: expected {width} cells, got {len(row)}")
        yield row[place["path"]], row[place["label"]], row[place["split"]] if "split" in place else None


def _parquet_rows(file: Path) -> Iterator[Row]:
    place: dict[str, int] = {}

    def pick(headings: Sequence[str]) -> list[int]:
        place.update(_pick(file, headings))
        return list(place.values())

    for values in parquet_rows(file, pick):
        row = dict(zip(place, values, strict=True))
        yield row["path"], row["label"], row.get("split")


def _text(cell: object) -> str:
    if isinstance(cell, list | dict):
        raise ValueError(f"expected text or numbers, got {cell!r:.80}")
    return "" if cell is None else cell.decode() if isinstance(cell, bytes) else str(cell)
