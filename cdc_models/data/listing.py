"""What a dataset on disk says about itself: classes, and which image belongs to which."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DatasetError", "Listing", "in_order", "inside", "list_by_name", "lone_file", "look"]

SPLITS = ("train", "val", "test")

Item = tuple[str, int]
"""Path relative to the root of a listing, and label."""


class DatasetError(ValueError):
    """A dataset that is not there, or is not as its layout says."""


@dataclass(frozen=True)
class Listing:
    """The images of a dataset by split, unread.

    Attributes:
        root: the folder that every path is relative to, and inside of.
        classes: the K class names.
        train, val, test: (path, label) of every image, labels in [0, K); empty where there is no such split.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Item, ...] = ()
    val: tuple[Item, ...] = ()
    test: tuple[Item, ...] = ()


def inside(path: str, source: object) -> str:
    """A relative path, tidied; refused if it leaves the folder that it is relative to.

    Links are followed as they are: what is put inside the folder by its owner is inside.

    Raises:
        DatasetError: for an absolute path, one that climbs out by "..", or an empty one; `source` says who gave it.

    Example:
        >>> inside("cats/./1.jpg", "split.json")
        'cats/1.jpg'
    """
    tidy = os.path.normpath(path)
    out = os.path.isabs(tidy) or bool(os.path.splitdrive(tidy)[0]) or tidy.split(os.sep)[0] == os.pardir
    if not path or tidy == os.curdir or out or "\0" in path:
        raise DatasetError(f"{source}: expected paths that stay inside the dataset's folder, got {path!r:.200}")
    return tidy


def lone_file(path: Path) -> str:
    """The text of a small UTF-8 file of a layout.

    Raises:
        DatasetError: if it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: expected UTF-8 text, {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error


def look(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the other entries in a folder, each sorted; a dot in front hides a name.

    Raises:
        DatasetError: if it is no folder, or may not be read.
    """
    folders: list[str] = []
    others: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else others).append(entry.name)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read as a folder ({error.strerror or error})") from error
    return sorted(folders), sorted(others)


def _are_numbers(names: Iterable[str]) -> bool:
    return all(name.isdecimal() and len(name) < 20 for name in names)


def in_order(names: Collection[str]) -> list[str]:
    """Names in the order of the alphabet, or of their values if all are whole numbers.

    Example:
        >>> in_order({"10", "9"}), in_order({"b10", "b9"})
        (['9', '10'], ['b10', 'b9'])
    """
    return sorted(names, key=lambda name: (int(name), name)) if _are_numbers(names) else sorted(names)


def list_by_name(
    root: Path,
    splits: Mapping[str, Iterable[tuple[str, str]]],
    classes: Sequence[str] | None = None,
    *,
    source: object,
) -> Listing:
    """A listing from images that carry the names of their classes.

    Classes are the names `in_order`; or `classes`, and then an image may also carry its class's number among them,
    from 0.

    Args:
        root: what the paths are relative to.
        splits: "train", "val", "test" -> (path, class name) of each image.
        classes: the names in the order wanted; may hold classes without images.
        source: who says so, for error messages.

    Raises:
        DatasetError: for a path outside the root, or a name that is not among `classes`.
    """
    rows = {split: [(inside(path, source), name) for path, name in splits.get(split, ())] for split in SPLITS}
    names = {name for part in rows.values() for _, name in part}
    classes = in_order(names) if classes is None else classes
    label_of = {name: label for label, name in enumerate(classes)}
    if _are_numbers(names) and not names <= set(label_of):
        label_of = {str(label): label for label in range(len(classes))}
        rows = {split: [(path, str(int(name))) for path, name in part] for split, part in rows.items()}
        names = {str(int(name)) for name in names}
    if unknown := sorted(names - set(label_of)):
        raise DatasetError(
            f"{source}: {len(unknown)} class(es) are not among the {len(classes)} names of `classes`: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}"
        )
    parts = {split: tuple((path, label_of[name]) for path, name in part) for split, part in rows.items()}
    return Listing(root, tuple(classes), **parts)
