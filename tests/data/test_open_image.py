"""Every kind of image file becomes RGB, or says why not."""

import os
import pickle
import warnings

import numpy as np
import pytest
from bad_images import NOISE, encoded, write_bad_images
from PIL import Image

from cdc_models.data import BadImageError, open_image
from cdc_models.data.open_image import REASONS


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixel(path, **options):
    image = open_image(path, **options)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_bad_files_say_why(tmp_path):
    reasons = write_bad_images(tmp_path)
    assert set(reasons.values()) == set(REASONS)
    for name, reason in reasons.items():
        with warnings.catch_warnings(), pytest.raises(BadImageError) as error:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            open_image(tmp_path / name)
        assert error.value.reason == reason, name
        assert str(error.value).startswith(f"{tmp_path / name}: {reason} (")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BadImageError, match="unreadable .no plain file"):
        open_image(tmp_path / "pipe.jpg")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "secret.jpg").write_bytes(encoded())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)  # tests may run as root, whom no permission stops
    with pytest.raises(BadImageError, match="unreadable .Permission denied"):
        open_image(tmp_path / "secret.jpg")


def test_names_no_file_can_have():
    for name in ("a\0b.jpg", "\ud800.jpg"):
        with pytest.raises(BadImageError) as error:
            open_image(name)
        assert error.value.reason == "unreadable"


def test_ordinary_files_are_decoded_as_pillow_does(tmp_path):
    for name, options in (("a.jpg", {}), ("a.png", {}), ("a.webp", {"lossless": True}), ("a.bmp", {}), ("a.tif", {})):
        path = saved(tmp_path, Image.fromarray(NOISE), name, **options)
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(Image.open(path).convert("RGB")))


def test_a_format_under_another_name(tmp_path):
    (tmp_path / "a.JPEG").write_bytes(encoded(kind="PNG"))
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.JPEG")), NOISE)


def test_grey_and_black_and_white(tmp_path):
    assert pixel(saved(tmp_path, Image.new("L", (4, 4), 77), "l.png")) == (77, 77, 77)
    assert pixel(saved(tmp_path, Image.new("1", (4, 4), 1), "1.png")) == (255, 255, 255)


def test_cmyk(tmp_path):
    red = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "cmyk.jpg")
    r, g, b = pixel(red)
    assert r > 240 and g < 15 and b < 15


def test_alpha_is_laid_on_white(tmp_path):
    assert pixel(saved(tmp_path, Image.new("RGBA", (4, 4), (200, 0, 0, 0)), "rgba.png")) == (255, 255, 255)
    assert pixel(saved(tmp_path, Image.new("RGBA", (4, 4), (200, 0, 0, 255)), "full.png")) == (200, 0, 0)
    half = pixel(saved(tmp_path, Image.new("LA", (4, 4), (0, 128)), "la.png"))
    assert half == (127, 127, 127)


def test_palettes_with_and_without_alpha(tmp_path):
    colours = Image.new("P", (4, 4), 1)
    colours.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(saved(tmp_path, colours, "p.png")) == (10, 200, 30)
    assert pixel(saved(tmp_path, colours, "alpha.png", transparency=1)) == (255, 255, 255)
    assert pixel(saved(tmp_path, colours, "bytes.png", transparency=bytes([255, 0]))) == (255, 255, 255)
    keyed = saved(tmp_path, Image.new("RGB", (4, 4), (9, 8, 7)), "key.png", transparency=(9, 8, 7))
    assert pixel(keyed) == (255, 255, 255)


@pytest.mark.parametrize(
    ("value", "kind", "grey"),
    [
        (0, np.uint16, 0), (32768, np.uint16, 128), (65535, np.uint16, 255), (32768, np.int32, 128),
    ],
)  # fmt: skip
def test_sixteen_bits_keep_their_brightness(tmp_path, value, kind, grey):
    name = "a.png" if kind is np.uint16 else "a.tif"
    assert pixel(saved(tmp_path, Image.fromarray(np.full((4, 4), value, kind)), name)) == (grey,) * 3


def test_numbers_without_a_range_are_stretched(tmp_path):
    ramp = np.linspace(-3, 7, 6, dtype=np.float32).reshape(2, 3)
    grey = np.asarray(open_image(saved(tmp_path, Image.fromarray(ramp), "f.tif")))[..., 0]
    assert grey.ravel().tolist() == [0, 51, 102, 153, 204, 255]
    wide = np.array([[0, 100_000]], dtype=np.int32)
    assert np.asarray(open_image(saved(tmp_path, Image.fromarray(wide), "i.tif")))[0, :, 0].tolist() == [0, 255]
    assert pixel(saved(tmp_path, Image.fromarray(np.full((2, 2), 5, np.float32)), "flat.tif")) == (0, 0, 0)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_of_several_frames(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    r, g, b = pixel(path)
    assert r > 240 and g < 15 and b < 15


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    path = saved(tmp_path, image, "turned.jpg", exif=exif)
    upright = open_image(path)
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[0] > 200
    assert open_image(path, orient=False).size == (40, 20)


def test_exif_that_cannot_be_read_does_not_cost_the_image(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8)), "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(path).size == (8, 8)


def test_huge_jpegs_are_decoded_at_a_smaller_scale(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (640, 480), (10, 200, 30)), "big.jpg")
    assert open_image(path).size == (640, 480)
    assert open_image(path, max_pixels=640 * 480).size == (640, 480)
    assert open_image(path, max_pixels=640 * 480 - 1).size == (320, 240)
    assert open_image(path, max_pixels=5000).size == (80, 60)
    with pytest.raises(BadImageError, match="too large .640 x 480 has more than 4000 pixels"):
        open_image(path, max_pixels=4000)
    with pytest.raises(BadImageError, match="too large"):
        open_image(saved(tmp_path, Image.new("RGB", (64, 48)), "big.png"), max_pixels=1000)


def test_memory_that_runs_out_costs_one_image(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("RGB", (8, 8)), "a.png")

    def exhausted(*args):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", exhausted)
    with pytest.raises(BadImageError, match="too large .no memory"):
        open_image(path)


def test_every_cut_and_every_flipped_byte_is_an_image_or_a_bad_image(tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(NOISE[:12, :16])
    path = tmp_path / "a.img"
    outcomes = set()
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(small, kind)
        for _ in range(40):
            changed = bytearray(data)
            for place in rng.integers(0, min(len(data), 120), 3):
                changed[place] = rng.integers(256)
            path.write_bytes(changed[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else changed)
            try:
                assert open_image(path).mode == "RGB"
                outcomes.add("image")
            except BadImageError as error:
                outcomes.add(error.reason)
    assert {"image", "damaged", "not an image"} <= outcomes


def test_the_error_can_cross_processes():
    error = pickle.loads(pickle.dumps(BadImageError("a.jpg", "damaged", "half of it")))
    assert (error.path, error.reason, error.detail) == ("a.jpg", "damaged", "half of it")
