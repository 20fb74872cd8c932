"""Plain pictures through Pillow: PNG, JPEG and BMP."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import ExifTags, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.Image import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.base import (
    PlaneReader,
    choose_plane,
    make_channel_names,
    make_slide_name,
    settle_mpp,
    to_pixels,
)
from darcnn.runtime.readers.protocol import Pixels, SlideInfo

__all__ = ["PictureReader", "is_picture", "read_size"]

# The formats by their first bytes. Their classes are called directly: Image.open would refuse pictures
# beyond 179 megapixels, as bombs, unless a global of Pillow were changed for the whole process.
_FORMATS: dict[bytes, type[ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"BM": BmpImageFile,
}
# What Pillow raises on damaged files: OSError for truncation, SyntaxError for a broken header or chunk,
# the others from parsing sizes and compressed chunks. Of EXIF that is broken it warns, and of that it
# raises where Python is told to make errors of warnings.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    UserWarning,
    RuntimeError,  # of imagecodecs
)
# So much a byte of a file can hold at most; a header that claims more is damaged, and would cost memory
# before that is noticed. Deflate, of PNG, packs 1032 bytes into one. A byte of a JPEG holds parts of eight
# blocks of 64 pixels at most (half of this), a run of a BMP 128 pixels.
_MOST_PACKED = 1032
_PNG_GREY_ALPHA = 4  # a colour type
_PNG_CUT = (2, _PNG_GREY_ALPHA, 6)  # types of which Pillow drops eight bits of 16; 2 and 6 are colours
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type to values per pixel
_HEAD_BYTES = 26  # of a PNG: to the end of bit depth and colour type
_GREY_MODES = {"1": "L", "L": "L", "LA": "L", "I;16": "I;16", "I;16L": "I;16", "I;16B": "I;16"}
_WIDE_MODES = {"I": "I", "F": "F"}  # 32-bit grey: float32 in the end


def is_picture(head: bytes) -> bool:
    """Tell whether a file that begins with `head` (8 bytes or more) is a PNG, JPEG or BMP."""
    return any(head.startswith(magic) for magic in _FORMATS)


def read_size(path: Path) -> tuple[int, int] | None:
    """Return the width and height that a picture's head tells, None where it is no picture that is read."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
            stream.seek(0)
            for magic, kind in _FORMATS.items():
                if head.startswith(magic):
                    with kind(stream) as picture:
                        return int(picture.width), int(picture.height)
    except _DAMAGED:
        pass  # running it says why
    return None


class PictureReader(PlaneReader):
    """One picture, decoded once and as a whole when opened; the file is closed right after.

    Grey stays grey (8 or 16 bits), colours of PNG keep their 16 bits, everything else becomes 8-bit RGB:
    palettes and CMYK. Alpha is ignored, not blended: the colours under it are what was
    measured. The EXIF orientation is applied. The resolution of a picture is that of a print or a
    screen, so the pixel size is unknown unless `mpp` gives it.

    Raises:
        InputError: no PNG, JPEG or BMP; damaged; too large for the memory; or `z` or `t` names a plane
            that is not there.
        UsageError: `mpp` is no pixel size.
    """

    def __init__(
        self, path: Path, *, z: int | None = None, t: int | None = None, mpp: float | None = None
    ) -> None:
        for axis, asked in (("z", z), ("t", t)):
            choose_plane(axis, asked, 1, where=path)
        size, source = settle_mpp(None, None, override=mpp)
        pixels = _decode(path)
        height, width, channels = pixels.shape
        is_rgb = channels == 3
        super().__init__(
            SlideInfo(
                path=path,
                name=make_slide_name(path),
                levels=(Level(0, width, height, 1.0),),
                channel_names=make_channel_names((), channels, is_rgb=is_rgb),
                dtype=pixels.dtype,
                is_rgb=is_rgb,
                mpp=size,
                mpp_source=source,
            )
        )
        self._pixels = pixels

    def _read(self, region: Region, level: Level) -> Pixels:
        return self._pixels[region.y0 : region.y1, region.x0 : region.x1].copy()

    def _release(self) -> None:
        self._pixels = np.empty((0, 0, 0))


def _decode(path: Path) -> Pixels:
    """Return all pixels of the file, (H, W, 1) or (H, W, 3)."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        opener = next((kind for magic, kind in _FORMATS.items() if head.startswith(magic)), None)
        if opener is None:
            raise InputError(
                "is no PNG, JPEG or BMP picture", where=path, fix="rename it after its real format"
            )
        stream.seek(0)
        try:
            with opener(stream) as picture:
                _check_size(picture, head, path.stat().st_size)
                if isinstance(picture, PngImageFile) and _is_deep(head):
                    n_channels = 1 if head[25] == _PNG_GREY_ALPHA else 3
                    deep = imagecodecs.png_decode(path.read_bytes())[:, :, :n_channels]
                    return to_pixels(_turned(deep, picture.getexif().get(ExifTags.Base.Orientation, 1)))
                picture.load()
                return _to_array(picture)
        except _DAMAGED as err:
            raise InputError(f"is damaged ({err})", where=path, fix="copy or export it again") from err
        except MemoryError as err:
            raise InputError(
                "is too large to be decoded at once", where=path, fix="export it as a tiled TIFF"
            ) from err


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Return (H, W, C) the way up that EXIF says, as `ImageOps.exif_transpose` turns pictures."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _is_deep(head: bytes) -> bool:
    """Tell whether a PNG that begins with `head` holds values of 16 bits, of which Pillow drops eight."""
    return head[24] == 16 and head[25] in _PNG_CUT


def _check_size(picture: ImageFile, head: bytes, n_bytes: int) -> None:
    """Refuse a size that a file of `n_bytes`, which begins with `head`, cannot hold."""
    bits = 8
    if isinstance(picture, PngImageFile):
        bits = head[24] * _PNG_SAMPLES.get(head[25], 4)
    width, height = picture.size
    if width * height * bits > n_bytes * 8 * _MOST_PACKED:
        raise ValueError(f"{width} x {height} px in {n_bytes} bytes")


def _to_array(picture: Image) -> Pixels:
    upright = ImageOps.exif_transpose(picture)
    mode = _GREY_MODES.get(upright.mode) or _WIDE_MODES.get(upright.mode) or "RGB"
    converted = upright if upright.mode == mode else upright.convert(mode)
    values = to_pixels(np.asarray(converted))
    return values[:, :, None] if values.ndim == 2 else values  # (H, W, C)
