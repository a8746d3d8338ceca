"""Which images were skipped, and why: what a run says about its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from cdc_models.data.open_image import REASONS, BadImageError

__all__ = ["ImageReport", "SkippedImage"]


@dataclass(frozen=True)
class SkippedImage:
    """An image that was left out: its file, a key of `REASONS`, and what was found."""

    path: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.detail})"

    @classmethod
    def of(cls, error: BadImageError) -> SkippedImage:
        return cls(error.path, error.reason, error.detail)


class ImageReport:
    """Images that were to be read, and those among them that were skipped; each counts once, however often it is met.

    Args:
        total: number of images that were to be read.
        skipped: those left out.

    Example:
        >>> report = ImageReport(total=3)
        >>> report.add(SkippedImage("a.jpg", "missing", "no file"))
        >>> print(report)
        1 of 3 images skipped: 1 missing
        >>> print(report + ImageReport(total=2))
        1 of 5 images skipped: 1 missing
    """

    def __init__(self, total: int, skipped: Iterable[SkippedImage] = ()) -> None:
        self.total = total
        self._by_path = {image.path: image for image in skipped}

    def add(self, image: SkippedImage) -> None:
        self._by_path[image.path] = image

    @property
    def skipped(self) -> tuple[SkippedImage, ...]:
        """What was left out, in the order in which it was met."""
        return tuple(self._by_path.values())

    @property
    def by_reason(self) -> dict[str, int]:
        """How many were skipped for each reason that occurred."""
        counts = Counter(image.reason for image in self.skipped)
        return {reason: counts[reason] for reason in REASONS if counts[reason]}

    def __add__(self, other: ImageReport) -> ImageReport:
        """Two reports about different images as one."""
        return ImageReport(self.total + other.total, self.skipped + other.skipped)

    def __str__(self) -> str:
        if not self._by_path:
            return f"all {self.total} images can be read"
        counts = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.items())
        return f"{len(self._by_path)} of {self.total} images skipped: {counts}"

    def to_dict(self) -> dict[str, Any]:
        """Counts and every skipped image, for JSON."""
        return {
            "total": self.total,
            "skipped": len(self._by_path),
            "by_reason": self.by_reason,
            "images": [asdict(image) for image in self.skipped],
        }
