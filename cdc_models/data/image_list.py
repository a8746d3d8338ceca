"""Labelled image files as a torch Dataset that opens each when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from cdc_models.data.image_report import ImageReport
from cdc_models.data.open_image import open_image

__all__ = ["ImageList"]

Transform = Callable[[Image.Image], Any]


class ImageList(Dataset[tuple[Any, int]]):
    """Image files with their labels; nothing is read before an item is asked for.

    An item whose file cannot be used raises `BadImageError`; `ImageLoader` skips and reports such items, and
    `scan` finds them beforehand. Lists can be pickled and shared with worker processes.

    Args:
        root: the folder that the paths start from.
        items: (path, label) of each image, labels in [0, K).
        classes: the K class names.
        transform: of the PIL image (mode RGB) of an item, such as `test_transform(backbone)`.
        orient: whether EXIF orientation is applied.

    Raises:
        ValueError: if a label names no class.

    Example:
        >>> images = ImageList("photos", [("cat/1.jpg", 0), ("dog/7.jpg", 1)], ["cat", "dog"])
        >>> len(images), images.targets.tolist(), images.path(1)
        (2, [0, 1], 'photos/dog/7.jpg')
    """

    def __init__(
        self,
        root: str | Path,
        items: Sequence[tuple[str, int]],
        classes: Sequence[str],
        transform: Transform | None = None,
        *,
        orient: bool = True,
    ) -> None:
        self.root = Path(root)
        self.paths = tuple(path for path, _ in items)
        self.targets = torch.tensor([label for _, label in items], dtype=torch.int64)
        if len(items) and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < len(classes):
            raise ValueError(
                f"items: expected labels in [0, {len(classes)}), got {int(self.targets.min())} to "
                f"{int(self.targets.max())}"
            )
        self.classes, self.transform, self.orient = tuple(classes), transform, orient

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = open_image(self.path(index), orient=self.orient)
        return (self.transform(image) if self.transform else image), int(self.targets[index])

    @property
    def items(self) -> list[tuple[str, int]]:
        """(path, label) of each image, paths from the root."""
        return list(zip(self.paths, self.targets.tolist(), strict=True))

    def path(self, index: int) -> str:
        """The file of an item."""
        return str(self.root / self.paths[index])

    def with_transform(self, transform: Transform | None) -> ImageList:
        """The same images under another transform."""
        other = copy(self)
        other.transform = transform
        return other

    def subset(self, indices: Sequence[int]) -> ImageList:
        """The images at these indices, in that order; process r of n would take ``range(r, len(images), n)``."""
        items = self.items
        return self._like([items[index] for index in indices], self.classes)

    def relabelled(self, labels: Mapping[int, int]) -> ImageList:
        """The images whose label is a key of `labels`, under the label it maps to; labels count from 0."""
        classes = [self.classes[old] for old, _ in sorted(labels.items(), key=lambda pair: pair[1])]
        items = [(path, labels[label]) for path, label in self.items if label in labels]
        return self._like(items, classes)

    def without(self, report: ImageReport) -> ImageList:
        """The images but those that a report has skipped."""
        skipped = {image.path for image in report.skipped}
        return self.subset([index for index in range(len(self)) if self.path(index) not in skipped])

    def _like(self, items: Sequence[tuple[str, int]], classes: Sequence[str]) -> ImageList:
        return ImageList(self.root, items, classes, self.transform, orient=self.orient)
