"""PNG, JPEG and BMP: every mode becomes grey or RGB, whatever the size."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import ExifTags, Image

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.picture import PictureReader

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5) * 10
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)


def whole(path: Path) -> np.ndarray:
    with PictureReader(path) as reader:
        return reader.read(Region(0, 0, reader.info.width_px0, reader.info.height_px0), level=0)


def save(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp"])
def test_colours_survive(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(whole(save(Image.fromarray(COLOUR), tmp_path / name)), COLOUR)


def test_grey_stays_one_channel(tmp_path: Path) -> None:
    path = save(Image.fromarray(GREY), tmp_path / "a.png")
    np.testing.assert_array_equal(whole(path)[:, :, 0], GREY)
    info = PictureReader(path).info
    assert (info.channel_names, info.is_rgb, info.mpp, info.name) == (("grey",), False, None, "a")


def test_sixteen_bits_of_grey_survive(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    pixels = whole(save(Image.fromarray(deep), tmp_path / "a.png"))
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels[:, :, 0], deep)


def test_sixteen_bits_of_grey_with_alpha_survive(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 14 + 3  # a camera of 12 bits
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(np.stack([deep, np.full_like(deep, 65535)], axis=2)))
    with PictureReader(path) as reader:
        assert (reader.info.dtype, reader.info.channel_names) == (np.uint16, ("grey",))
    np.testing.assert_array_equal(whole(path)[:, :, 0], deep)


@pytest.mark.parametrize("n_values", [3, 4])
def test_sixteen_bits_of_colours_survive(tmp_path: Path, n_values: int) -> None:
    deep = COLOUR.astype(np.uint16) * 14 + 3  # a camera of 12 bits
    alpha = np.full((*deep.shape[:2], n_values - 3), 65535, np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(np.concatenate([deep, alpha], axis=2)))
    with PictureReader(path) as reader:
        assert (reader.info.dtype, reader.info.is_rgb) == (np.uint16, True)
    np.testing.assert_array_equal(whole(path), deep)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="is damaged"):
        PictureReader(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_colours_of_sixteen_bits_are_turned_as_others_are(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    shallow = save(Image.fromarray(COLOUR), tmp_path / "shallow.png", exif=exif)
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = imagecodecs.png_encode(COLOUR.astype(np.uint16) * 257)
    at = content.index(b"IDAT") - 4
    (tmp_path / "deep.png").write_bytes(content[:at] + packed + content[at:])
    np.testing.assert_array_equal(whole(tmp_path / "deep.png"), whole(shallow).astype(np.uint16) * 257)


def test_a_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    path = save(Image.fromarray(COLOUR), tmp_path / "a.jpg", quality=95)
    np.testing.assert_array_equal(whole(path), np.asarray(Image.open(path)))


def test_alpha_is_ignored_not_blended(tmp_path: Path) -> None:
    alpha = np.full((4, 5, 1), 7, np.uint8)
    rgba = save(Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)), tmp_path / "rgba.png")
    la = save(Image.fromarray(np.concatenate([GREY[:, :, None], alpha], axis=2), "LA"), tmp_path / "la.png")
    np.testing.assert_array_equal(whole(rgba), COLOUR)
    np.testing.assert_array_equal(whole(la)[:, :, 0], GREY)


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(COLOUR).quantize(8)
    path = save(picture, tmp_path / "a.png")
    np.testing.assert_array_equal(whole(path), np.asarray(picture.convert("RGB")))


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    pixels = whole(save(Image.fromarray(GREY > 90), tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels[:, :, 0], np.where(GREY > 90, 255, 0))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    pixels = whole(save(Image.fromarray(COLOUR).convert("CMYK"), tmp_path / "a.jpg"))
    assert pixels.shape == (4, 5, 3)


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees clockwise
    pixels = whole(save(Image.fromarray(COLOUR), tmp_path / "a.png", exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(COLOUR, -1))


def test_no_limit_of_pillow_applies_and_none_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(Image.fromarray(COLOUR), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    assert whole(path).shape == (4, 5, 3)
    assert Image.MAX_IMAGE_PIXELS == 4


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_picture_is_an_input_error(tmp_path: Path, name: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = save(Image.fromarray(noise), tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match=name) as caught:
        PictureReader(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(1)
    path = save(Image.fromarray(COLOUR), tmp_path / name)
    sound = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(150):
        flipped = sound.copy()
        flipped[random.integers(8, len(sound), 3)] = random.integers(0, 256, 3)
        path.write_bytes(flipped.tobytes())
        try:
            PictureReader(path).close()
        except InputError as error:
            assert error.where == str(path)  # noqa: PT017


def test_broken_exif_is_an_error_only_where_warnings_are(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "a description"
    path = tmp_path / "a.jpg"
    Image.fromarray(COLOUR).save(path, exif=exif)
    path.write_bytes(path.read_bytes().replace(b"\x01\x0e\x00\x02\x00", b"\x01\x0e\x00\x02\x7f"))
    with pytest.warns(UserWarning, match=r"EXIF|Tag data|Truncated"):
        PictureReader(path).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="is damaged"):
            PictureReader(path)


def test_a_picture_has_one_plane(tmp_path: Path) -> None:
    path = save(Image.fromarray(COLOUR), tmp_path / "a.png")
    PictureReader(path, z=0, t=0).close()
    with pytest.raises(InputError, match="leave --z out"):
        PictureReader(path, z=1)
