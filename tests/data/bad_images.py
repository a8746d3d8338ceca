"""Files that are not quite images, one of every kind."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(image=None, kind="JPEG", **options):
    buffer = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    """A PNG whose header claims a size; its pixels are never reached."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_png():
    data = bytearray(encoded(kind="PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


BAD = {
    "empty.jpg": (b"", "not an image"),
    "text.jpg": (b"<html>404 not found</html>", "not an image"),
    "vector.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "postscript.jpg": (encoded(kind="EPS"), "not an image"),
    "truncated.jpg": (encoded()[:1000], "damaged"),
    "truncated.png": (encoded(kind="PNG")[:1000], "damaged"),
    "truncated.webp": (encoded(kind="WEBP", lossless=True)[:1000], "damaged"),
    "broken.png": (broken_png(), "damaged"),
    "bomb.png": (png_of_size(60_000, 60_000), "too large"),
    "big.png": (png_of_size(12_000, 10_000), "too large"),
    "strip.png": (encoded(Image.new("L", (900, 2)), "PNG"), "too large"),
    "nan.tif": (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "damaged"),
}
"""File name -> (content, reason it is skipped)."""


def write_bad_images(folder):
    """Every kind of bad file in a folder, also those that are no files; name -> reason."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in BAD.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    return {name: reason for name, (_, reason) in BAD.items()} | {
        "folder.jpg": "unreadable",
        "gone.jpg": "missing",
        "empty.jpg/inside.jpg": "missing",
        "a" * 300 + ".jpg": "unreadable",
    }
