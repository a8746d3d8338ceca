"""Opening one image file, whatever it turns out to be: an RGB image, or a reason why not."""

from __future__ import annotations

import io
import os
import stat
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["MAX_PIXELS", "REASONS", "BadImageError", "decode_image", "open_image", "to_rgb"]

MAX_PIXELS = 90_000_000
"""Most pixels that are decoded: above, a JPEG is decoded at a half, a quarter or an eighth, anything else refused."""

MAX_RATIO = 200
"""Longest side over shortest: scaling the short side of a thinner strip to a tower's size would fill the memory."""

REASONS = {
    "missing": "there is no such file",
    "unreadable": "the file may not or cannot be read, or is no plain file",
    "not an image": "no known image format",
    "damaged": "an image format, but truncated, broken or of a kind that cannot be decoded",
    "too large": "too many pixels, or too thin a strip",
}
"""Why an image is skipped -> what that means."""


class BadImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        path: the file. reason: a key of `REASONS`. detail: what was found.
    """

    def __init__(self, path: str, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {reason} ({detail})")
        self.path, self.reason, self.detail = path, reason, detail

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str, str]]:
        return BadImageError, (self.path, self.reason, self.detail)


def open_image(path: str | os.PathLike[str], *, orient: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to 8-bit RGB.

    - grey, palette, CMYK, YCbCr: converted by Pillow.
    - alpha, also of palettes and of grey: laid on white.
    - 16 bits: divided by 257. 32-bit integers above 65,535 and floating point, which have no agreed range: stretched
      from their smallest to their largest value.
    - several frames or pages: the first. PostScript, which Pillow would hand to another program: not opened.
    - EXIF orientation: applied.
    - more than `max_pixels`: a JPEG is decoded at a smaller scale, anything else is refused. More than twice
      `PIL.Image.MAX_IMAGE_PIXELS` is refused by Pillow itself.
    - truncated files are refused (half an image is another image), unless `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.

    Args:
        path: the file.
        orient: apply the EXIF orientation. The published readers of the CoOp family do not.
        max_pixels: most pixels to decode.

    Returns:
        A PIL image of mode "RGB", loaded; the file is closed.

    Raises:
        BadImageError: for whatever keeps the file from being used; a key of `REASONS` says what.

    Example:
        >>> try:
        ...     open_image("nowhere.jpg")
        ... except BadImageError as error:
        ...     print(error.reason)
        missing
    """
    name = os.fspath(path)
    size = size_of_plain(name)
    if size == 0:
        raise BadImageError(name, "not an image", "an empty file")
    return _decode(name, name, size, orient, max_pixels)


def size_of_plain(name: str) -> int:
    """Bytes in a file; a BadImageError if there is none, or it is a folder, a pipe or a device.

    A pipe would be waited for without end.
    """
    try:
        status = os.stat(name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImageError(name, "missing", error.strerror or "no file") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BadImageError(name, "unreadable", str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError(name, "unreadable", "a folder" if stat.S_ISDIR(status.st_mode) else "no plain file")
    return status.st_size


def decode_image(data: bytes, name: str, *, orient: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of an image file, as `open_image` does; `name` is only what errors call it.

    Raises:
        BadImageError: for whatever keeps the bytes from being an image.

    Example:
        >>> try:
        ...     decode_image(b"no image", "a.jpg")
        ... except BadImageError as error:
        ...     print(error)
        a.jpg: not an image (8 bytes of no known format)
    """
    if not data:
        raise BadImageError(name, "not an image", "an empty file")
    return _decode(name, io.BytesIO(data), len(data), orient, max_pixels)


def _decode(name: str, source: str | io.BytesIO, size: int, orient: bool, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is told by BadImageError, once
            with Image.open(source, formats=_formats()) as opened:
                _check_size(name, opened, max_pixels)
                opened.load()  # of several frames the first: it is the one that is open
                if orient:
                    _turn_upright(opened)
                return to_rgb(opened)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(name, "not an image", f"{size} bytes of no known format") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(name, "too large", "more than twice PIL.Image.MAX_IMAGE_PIXELS") from error
    except MemoryError as error:
        raise BadImageError(name, "too large", "no memory for its pixels") from error
    except Exception as error:  # decoders fail on broken files with whatever they come across
        if isinstance(error, OSError) and error.errno is not None:  # the system's word, not a decoder's
            raise BadImageError(name, "unreadable", error.strerror or str(error)) from error
        raise BadImageError(name, "damaged", f"{type(error).__name__}: {error}") from error


def _formats() -> list[str]:
    """What Pillow can open, without what it would hand to another program (PostScript, to Ghostscript)."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    """Refuse an image of too many pixels; a JPEG is first set to be decoded at a smaller scale."""
    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadImageError(name, "too large", f"{width} x {height} is thinner than 1 : {MAX_RATIO}")
    if width * height > max_pixels:
        scale = next((s for s in (2, 4) if (width // s) * (height // s) <= max_pixels), 8)
        image.draft(image.mode, (width // scale, height // scale))
    if image.width * image.height > max_pixels:
        raise BadImageError(name, "too large", f"{width} x {height} has more than {max_pixels} pixels")


def _turn_upright(image: Image.Image) -> None:
    with suppress(Exception):  # EXIF that cannot be read says nothing about orientation; the picture is there
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy of a loaded image of any mode."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as 8-bit ones, [H, W] -> uint8 [H, W]."""
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer) and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
    return scaled.round().astype(np.uint8)
