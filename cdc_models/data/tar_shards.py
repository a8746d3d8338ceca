"""Images within .tar files (WebDataset shards): read where they lie, never unpacked."""

from __future__ import annotations

import io
import math
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from cdc_models.data.image_report import SkippedImage
from cdc_models.data.listing import DatasetError
from cdc_models.data.open_image import BadImageError, decode_image, size_of_plain
from cdc_models.data.tables import PICTURES

__all__ = ["MAX_BYTES", "TarImages", "expand_braces"]

MAX_BYTES = 2**29
"""Largest member that is read, since it is read whole."""

MAX_HEADER = 2**20
"""Most bytes of headers in front of one member: tarfile reads a long name or other facts whole, of whatever length."""

MAX_NAME = 2**12
"""Longest name of a member; the names of an archive are held."""

MAX_FILES = 10**6
"""Most names that one pattern may stand for."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarImages(Dataset[tuple[Any, int]]):
    """The images of one .tar file as a dataset of (transformed image, place).

    An image is a plain member whose name ends as pictures do and whose last part does not begin with a dot; other
    members (labels, captions) are passed over. A member's name is a label and never a path: nothing is written, links
    are not followed, and a name such as "../x.jpg" is one like any other.

    Args:
        file: an uncompressed .tar file.
        transform: of the PIL image (mode RGB).

    Raises:
        BadImageError: from `dataset[i]`, for a member that cannot be decoded, as of an `ImageList`.

    Attributes:
        names: "file.tar::member" of each image.
        damage: what is wrong with the file itself, after which no more members can be found; None if nothing is.

    Example:
        >>> import tempfile
        >>> file = os.path.join(tempfile.mkdtemp(), "a.tar")
        >>> with tarfile.open(file, "w") as tar:
        ...     tar.addfile(tarfile.TarInfo("0001.jpg"))
        ...     tar.addfile(tarfile.TarInfo("0001.cls"))
        >>> [name.rsplit("/")[-1] for name in TarImages(file).names]
        ['a.tar::0001.jpg']
    """

    def __init__(self, file: str | os.PathLike[str], transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.file, self.transform = os.fspath(file), transform
        self.names: list[str] = []
        self.damage: SkippedImage | None = None
        self._places: list[tuple[int, int] | None] = []
        try:
            size_of_plain(self.file)
            for name, place in _pictures(self.file):
                self.names.append(f"{self.file}::{name}")
                self._places.append(place)
        except BadImageError as error:
            self.damage = SkippedImage.of(error)
        except OSError as error:
            self.damage = SkippedImage(self.file, "unreadable", error.strerror or str(error))
        except Exception as error:  # tarfile fails on broken headers with whatever it comes across
            self.damage = SkippedImage(self.file, "damaged", f"{error}, after {len(self.names)} images")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name, place = self.names[index], self._places[index]
        if place is None:
            raise BadImageError(name, "unreadable", "no plain file")
        start, size = place
        if size > MAX_BYTES:
            raise BadImageError(name, "too large", f"{size} bytes are more than {MAX_BYTES}")
        try:
            with open(self.file, "rb") as tar:
                tar.seek(start)
                data = tar.read(size)
        except OSError as error:
            raise BadImageError(name, "unreadable", error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImageError(name, "damaged", f"{len(data)} of {size} bytes are there")
        image = decode_image(data, name)
        return (self.transform(image) if self.transform else image), index


class _Headers(io.BufferedReader):
    """A file of which only so much is read between two calls of `begin`."""

    def begin(self) -> None:
        self.left = MAX_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER} bytes in front of one member")
        self.left -= size
        return super().read(size)


def _pictures(file: str) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Name, and first byte and size, of each image in a .tar file; no place for one that is a link or has holes."""
    headers = _Headers(io.FileIO(file))
    headers.begin()
    with headers, tarfile.open(fileobj=headers, mode="r:") as tar:  # which reads the first header
        before = -1
        while (member := tar.next()) is not None:
            headers.begin()
            if tar.offset <= before:  # a size below zero would lead round in a circle
                raise tarfile.ReadError(f"a member that ends before it begins, at byte {before}")
            before = tar.offset
            tar.members = []  # type: ignore[attr-defined]  # they would be kept for good
            if len(member.name) > MAX_NAME:
                raise tarfile.ReadError(f"a name of {len(member.name)} characters")
            last = posixpath.basename(member.name)
            if not member.isdir() and last.lower().endswith(PICTURES) and not last.startswith("."):
                plain = member.isreg() and not member.issparse()
                yield member.name, (member.offset_data, member.size) if plain else None
        # tarfile takes whatever is no header for the end
        headers.seek(tar.offset)
        if headers.read(512) != bytes(512):
            raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern such as "shards-{000..099}.tar" stands for; numbers keep the width of the first.

    Raises:
        DatasetError: for a range that runs backwards, or more than a million names.

    Example:
        >>> expand_braces("a-{08..10}.tar")
        ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    ranges: list[range] = []
    widths = []
    for first, last in _RANGE.findall(pattern):
        if int(last) < int(first):
            raise DatasetError(f"images: {pattern}: {{{first}..{last}}} runs backwards")
        ranges.append(range(int(first), int(last) + 1))
        widths.append(len(first))
    if math.prod(numbers.stop - numbers.start for numbers in ranges) > MAX_FILES:
        raise DatasetError(f"images: {pattern} stands for more than {MAX_FILES} files")
    between = _RANGE.split(pattern)[::3]
    written = ([f"{number:0{width}}" for number in numbers] for numbers, width in zip(ranges, widths, strict=True))
    return ["".join(part for pair in zip(between, (*ns, ""), strict=True) for part in pair) for ns in product(*written)]
