"""One entry to every dataset on disk: those of the papers by name, one's own by folder or table."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cdc_models.data.class_folders import read_class_folders
from cdc_models.data.image_list import ImageList
from cdc_models.data.listing import SPLITS, DatasetError, Listing
from cdc_models.data.protocol import base_new_split, few_shot_indices, hold_out
from cdc_models.data.published import BASE_TO_NEW, IMAGENET_VARIANTS, Published, find_published
from cdc_models.data.tables import TABLES, read_table
from cdc_models.prompts.templates import GENERIC, HAND_CRAFTED

__all__ = ["ImageDataset", "load_dataset"]


@dataclass(frozen=True)
class ImageDataset:
    """A labelled image dataset: its classes, the template for their names, and its splits.

    Attributes:
        name: of the dataset.
        classes: the K class names.
        template: text with one "{}" for a class name.
        train, val, test: image lists; empty where there is no such split.
    """

    name: str
    classes: tuple[str, ...]
    template: str
    train: ImageList
    val: ImageList
    test: ImageList

    def few_shot(self, shots: int, seed: int) -> ImageDataset:
        """A few training images of each class, and min(shots, 4) validation images; the test set stays whole.

        The published draw: classes in the order of their first appearance, one `random.sample` each, first from
        train and then, by the same generator, from val. It is made over all classes, so draw first and take the base
        or new `half` of what was drawn. A class with too few images gives all it has. Where there is no validation
        split (ImageNet, or data of one's own that was not given one), those images are drawn from what is left of
        train **(our reading**: CoOp takes ImageNet's test set for one, which no choice should see).

        Raises:
            ValueError: if shots is not positive.

        Source: CoOp (Zhou et al., IJCV 2022), seeds 1, 2, 3.
        """
        generator = random.Random(seed)
        chosen = few_shot_indices(self.train.targets.tolist(), shots, generator)
        train, val = self.train.subset(chosen), self.val
        if not len(val):
            val = self.train.subset(sorted(set(range(len(self.train))) - set(chosen)))
        val = val.subset(few_shot_indices(val.targets.tolist(), min(shots, 4), generator))
        return replace(self, train=train, val=val)

    def half(self, which: str) -> ImageDataset:
        """The base (first) or new (second) half of the classes, relabelled from 0, in every split.

        Args:
            which: "base" or "new".

        Raises:
            ValueError: for another word, or fewer than two classes.

        Source: CoCoOp (Zhou et al., CVPR 2022); see `base_new_split`.
        """
        if which not in ("base", "new"):
            raise ValueError(f"which: expected 'base' or 'new', got {which!r}")
        labels = base_new_split(range(len(self.classes)))[which == "new"]
        parts = {split: getattr(self, split).relabelled(labels) for split in SPLITS}
        return replace(self, classes=tuple(self.classes[old] for old in labels), **parts)


def load_dataset(
    data: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    template: str | None = None,
    test: float = 0.2,
    val: float = 0.1,
    split_seed: int = 1,
) -> ImageDataset:
    """A dataset by its name, its folder or its table. Lists what is there; opens no image.

    - A name of the papers' datasets (`BASE_TO_NEW`, `IMAGENET_VARIANTS`; also in other spellings, such as
      "oxford_pets" or "Flowers102"): read from ``root/<its folder>`` as CoOp's users keep it, with the published
      splits and template. A folder that has such a name is meant by "./<name>".
    - A folder of class-named folders, or of train, val and test folders with class-named folders in them.
    - A .csv, .tsv or .parquet file with columns path and label, and perhaps split.

    Data without a test (or validation) split gets one: a part of each class of train, drawn by `split_seed`.
    Images of the papers' datasets are read as the published code reads them, without regard to EXIF orientation.

    Args:
        data: name or path.
        root: for a name the folder of all datasets, "data" by default; for a table the folder of its images, by
            default its own.
        classes: for a folder or table, the class names in the order wanted; labels in a table may be numbers into it.
        template: text with one "{}" instead of the dataset's ("a photo of a {}." for one's own).
        test, val: parts to hold out of each class of train where the data has no such split; 0: none.
        split_seed: of that draw.

    Raises:
        DatasetError: for a dataset that is not there (says where it was looked for and what is missing) or not as its
            layout says; a ValueError.
        ValueError: for arguments that do not fit.
        ImportError: for Parquet without pyarrow.

    Example:
        >>> try:
        ...     load_dataset("EuroSAT", root="nowhere")
        ... except DatasetError as error:
        ...     print(error)
        EuroSAT is looked for in nowhere/eurosat, where these are missing: 2750, split_zhou_EuroSAT.json
    """
    if template is not None and template.count("{}") != 1:
        raise ValueError(f"template: expected exactly one '{{}}', got {template!r}")
    if classes is not None and (isinstance(classes, str) or len(set(classes)) < len(classes) or not classes):
        raise ValueError(f"classes: expected distinct names, got {classes!r:.200}")
    published = find_published(data) if isinstance(data, str) else None
    if published is not None:
        if classes is not None:
            raise ValueError(f"classes: {published.name} has its own; they are given for a folder or a table")
        listing = _read_published(published, Path("data" if root is None else root))
        return _dataset(listing, published.name, template or HAND_CRAFTED[published.name], orient=False)

    path = Path(data)
    if path.suffix.lower() in TABLES and path.is_file():
        listing = read_table(path, None if root is None else Path(root), classes)
    elif path.is_dir():
        if root is not None:
            raise ValueError(f"root: is for a name or a table, and {path} is a folder of its own")
        listing = read_class_folders(path, classes)
    else:
        raise DatasetError(_unknown(path))
    return _dataset(_with_splits(listing, test, val, split_seed), _name(path), template or GENERIC, orient=True)


def _name(path: Path) -> str:
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def _read_published(published: Published, root: Path) -> Listing:
    folder = root / published.folder
    if missing := published.layout.missing(folder):
        raise DatasetError(f"{published.name} is looked for in {folder}, where these are missing: {', '.join(missing)}")
    listing = published.layout.read(folder)
    if len(listing.classes) != published.classes:
        warnings.warn(
            f"{published.name}: expected {published.classes} classes, found {len(listing.classes)} in {folder}; "
            "figures will not compare with published ones",
            stacklevel=3,
        )
    return listing


def _unknown(path: Path) -> str:
    if path.exists():
        return f"{path}: expected a folder, or a table that ends in {', '.join(TABLES)}"
    names = ", ".join(published.name for published in BASE_TO_NEW + IMAGENET_VARIANTS)
    return f"{path}: there is no such folder or table, and it is none of the names {names}"


def _with_splits(listing: Listing, test: float, val: float, seed: int) -> Listing:
    """Hold out of train what the listing has no split for."""
    if not listing.train:
        return listing
    parts = (0.0 if listing.test else test, 0.0 if listing.val else val)
    try:
        kept, for_test, for_val = hold_out([label for _, label in listing.train], parts, seed)
    except ValueError as error:
        raise ValueError(f"test, val: expected parts in [0, 1) with a sum below 1, got {test}, {val}") from error
    return replace(
        listing,
        train=tuple(listing.train[i] for i in kept),
        test=listing.test or tuple(listing.train[i] for i in for_test),
        val=listing.val or tuple(listing.train[i] for i in for_val),
    )


def _dataset(listing: Listing, name: str, template: str, *, orient: bool) -> ImageDataset:
    lists = {
        split: ImageList(listing.root, getattr(listing, split), listing.classes, orient=orient) for split in SPLITS
    }
    return ImageDataset(name, listing.classes, template, **lists)
