"""A folder of class-named folders, with or without folders for its splits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdc_models.data.listing import DatasetError, Listing, in_order, list_by_name, look

__all__ = ["SPLIT_OF", "read_class_folders"]

SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What people call a split -> the split."""


def read_class_folders(folder: Path, classes: Sequence[str] | None = None) -> Listing:
    """List `folder/<class>/**` or `folder/<split>/<class>/**`.

    Every file below a class's folder counts as its image, at any depth; what turns out to be none is skipped when
    it is read, and reported. Names that begin with a dot are hidden, and files beside the class folders are left
    alone. Without split folders everything is "train". Folders are those of splits if all are named so and hold
    folders. A class folder without files is a class all the same.

    Raises:
        DatasetError: for a folder without class folders, or one with split folders and others beside them.
    """
    folders, files = look(folder)
    if not folders:
        raise DatasetError(f"{folder}: expected a folder for each class, got none and {len(files)} other file(s)")
    parts = _split_folders(folder, folders) or {"train": ""}
    classes_in = {part: look(folder / part)[0] for part in parts.values()}
    rows = {
        split: [(path, name) for name in classes_in[part] for path in _files(folder, os.path.join(part, name))]
        for split, part in parts.items()
    }
    # an empty class folder is in no row, so the names are collected from the folders
    names = in_order(set().union(*classes_in.values()))
    if classes is not None:
        if missing := in_order(set(names) - set(classes)):
            raise DatasetError(f"{folder}: class folders that are not among `classes`: {_few(missing)}")
        names = list(classes)
    return list_by_name(folder, rows, names, source=folder)


def _split_folders(folder: Path, folders: Sequence[str]) -> dict[str, str]:
    """Split -> the folder of that name, if the folders are those of splits; "train" may also be a class."""
    named = {name: look(folder / name) for name in folders if name.lower() in SPLIT_OF}
    if len(named) < len(folders):
        if splits := [name for name, (inner, loose) in named.items() if inner and not loose]:
            others = [name for name in folders if name not in named]
            raise DatasetError(
                f"{folder}: expected folders of splits or of classes, got both: {_few(splits)} and {_few(others)}"
            )
        return {}
    if not any(inner for inner, _ in named.values()):
        return {}
    for name, (inner, loose) in named.items():
        if loose and not inner:
            raise DatasetError(f"{folder / name}: expected a folder for each class, got {len(loose)} file(s) and none")
    splits_of = {SPLIT_OF[name.lower()]: name for name in named}
    if len(splits_of) < len(named):
        raise DatasetError(f"{folder}: expected one folder for each split, got {_few(list(named))}")
    return splits_of


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _files(root: Path, below: str) -> Iterator[str]:
    """Paths below a folder, relative to `root`; folders that link back to one above are not entered again."""
    entered: set[tuple[int, int]] = set()
    waiting = [below]
    while waiting:
        here = waiting.pop()
        status = os.stat(root / here)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        try:
            folders, files = look(root / here)
        except DatasetError:
            if here == below:
                raise
            yield here  # which is skipped, and reported, when it is read
            continue
        yield from (os.path.join(here, name) for name in files)
        waiting += [os.path.join(here, name) for name in reversed(folders)]
