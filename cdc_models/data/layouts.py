"""The directory layouts of CoOp's datasets: where each kind keeps its images and its labels.

A layout says which files it needs and turns them into a listing. Which dataset has which layout is said in
`published`. The facts are those of CoOp's published instructions and readers (Zhou et al., IJCV 2022).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cdc_models.data.listing import SPLITS, DatasetError, Item, Listing, inside, lone_file, look

__all__ = ["AircraftLists", "Layout", "SplitFile", "SynsetFolders"]


class Layout(Protocol):
    """How a dataset lies in its folder."""

    def missing(self, folder: Path) -> list[str]:
        """What the layout needs and `folder` lacks."""

    def read(self, folder: Path) -> Listing:
        """What the folder lists. Raises DatasetError where it is not as the layout says."""


def _absent(folder: Path, *needed: str) -> list[str]:
    return [name for name in needed if not (folder / name).exists()]


@dataclass(frozen=True)
class SplitFile:
    """One JSON file {"train" | "val" | "test": [[path, label, class name], ...]} beside one folder of images.

    images: what the paths are relative to; "" if it is the dataset's own folder. file: name of the JSON file.
    folders: where the paths lead, if `images` does not say it.
    """

    images: str
    file: str
    folders: tuple[str, ...] = ()

    def missing(self, folder: Path) -> list[str]:
        return _absent(folder, *filter(None, (self.images, *self.folders, self.file)))

    def read(self, folder: Path) -> Listing:
        path = folder / self.file
        text = lone_file(path)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, endless brackets
            raise DatasetError(f"{path}: expected JSON, got something else ({error})") from error
        if not isinstance(data, dict) or not all(isinstance(data.get(split), list) for split in SPLITS):
            raise DatasetError(f'{path}: expected {{"train": [...], "val": [...], "test": [...]}}')
        rows = {
            split: [_split_row(row, f"{path}, {split}[{i}]") for i, row in enumerate(data[split])] for split in SPLITS
        }
        name_of: dict[int, str] = {}
        for part in rows.values():
            for _, label, name in part:
                if name_of.setdefault(label, name) != name:
                    raise DatasetError(f"{path}: label {label} is both {name_of[label]!r} and {name!r}")
        position = {label: i for i, label in enumerate(sorted(name_of))}
        parts = {split: tuple((p, position[label]) for p, label, _ in part) for split, part in rows.items()}
        return Listing(folder / self.images, tuple(name_of[label] for label in position), **parts)


def _split_row(row: Any, source: str) -> tuple[str, int, str]:
    good = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[2], str)
    if not good or type(row[1]) is not int or not row[2].strip():
        raise DatasetError(f"{source}: expected [path, whole number, class name], got {json.dumps(row):.200}")
    return inside(row[0], source), row[1], row[2]


@dataclass(frozen=True)
class AircraftLists:
    """FGVC-Aircraft: variants.txt names the classes; images_variant_{train,val,test}.txt have "<image> <variant>"."""

    def missing(self, folder: Path) -> list[str]:
        return _absent(folder, "images", "variants.txt", *(f"images_variant_{split}.txt" for split in SPLITS))

    def read(self, folder: Path) -> Listing:
        classes = tuple(filter(None, map(str.strip, lone_file(folder / "variants.txt").splitlines())))
        label_of = {name: label for label, name in enumerate(classes)}

        def items(path: Path) -> Iterator[Item]:
            for number, line in enumerate(lone_file(path).splitlines(), start=1):
                if not line.strip():
                    continue
                image, _, name = line.strip().partition(" ")
                if name.strip() not in label_of:
                    raise DatasetError(f"{path}, line {number}: {name!r:.100} is not in variants.txt")
                yield inside(f"{image}.jpg", path), label_of[name.strip()]

        parts = {split: tuple(items(folder / f"images_variant_{split}.txt")) for split in SPLITS}
        return Listing(folder / "images", classes, **parts)


# Two pairs of ImageNet's 1,000 published names are alike ("missile", "sunglasses"), and no classifier by name can
# tell such classes apart. Of each pair, one takes another name that WordNet gives it; all others stay as published.
_ANOTHER_NAME = {"n04008634": "projectile", "n04355933": "sunglass"}


def _names_of_synsets(path: Path) -> dict[str, str]:
    """WordNet id -> class name, in the order of the file's lines."""
    name_of: dict[str, str] = {}
    for number, line in enumerate(lone_file(path).splitlines(), start=1):
        wnid, _, name = line.strip().partition(" ")
        if wnid and not name.strip():
            raise DatasetError(f'{path}, line {number}: expected "<WordNet id> <name>", got {line!r:.100}')
        if wnid:
            name_of[wnid] = name.strip()
    counts = Counter(name_of.values())
    return {wnid: _ANOTHER_NAME.get(wnid, name) if counts[name] > 1 else name for wnid, name in name_of.items()}


@dataclass(frozen=True)
class SynsetFolders:
    """ImageNet and its variants: one folder of images per WordNet id, and classnames.txt with "<id> <name>" lines.

    Labels count the folders that are there, in the order of their ids: a variant with 200 folders has 200 classes.

    test, train: folders of class folders; train may be None. There is no validation split: ImageNet's own is the
    test set, and what it is tested on must not be chosen by it.
    numbered: folders are named by the line of their class in classnames.txt, from 0 (ImageNetV2).
    """

    test: str
    train: str | None = None
    numbered: bool = False

    def missing(self, folder: Path) -> list[str]:
        names = [] if self._classnames(folder).exists() else ["classnames.txt"]
        return _absent(folder, *filter(None, (self.train, self.test))) + names

    def _classnames(self, folder: Path) -> Path:
        """The file in the dataset's folder, or else ImageNet's, of which it is a copy."""
        own, imagenets = folder / "classnames.txt", folder.parent / "imagenet" / "classnames.txt"
        return imagenets if imagenets.exists() and not own.exists() else own

    def read(self, folder: Path) -> Listing:
        path = self._classnames(folder)
        name_of = _names_of_synsets(path)
        class_of = dict(zip(map(str, range(len(name_of))), name_of, strict=True)) if self.numbered else None

        splits = {"train": self.train, "test": self.test}
        found = {split: look(folder / part)[0] for split, part in splits.items() if part}
        id_of = {name: class_of.get(name, "") if class_of else name for part in found.values() for name in part}
        if unknown := [name for name, wnid in id_of.items() if wnid not in name_of]:
            raise DatasetError(f"{folder}: folder {unknown[0]!r} stands for no line of {path}")
        present, order = set(id_of.values()), list(name_of) if self.numbered else sorted(name_of)
        label_of = {wnid: label for label, wnid in enumerate(wnid for wnid in order if wnid in present)}
        parts = {
            split: tuple(
                (os.path.join(splits[split] or "", name, image), label_of[id_of[name]])
                for name in names
                for image in look(folder / (splits[split] or "") / name)[1]
            )
            for split, names in found.items()
        }
        return Listing(folder, tuple(name_of[wnid] for wnid in label_of), **parts)
