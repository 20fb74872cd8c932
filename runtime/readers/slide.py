"""Whole slides through OpenSlide: SVS, NDPI, MRXS, SCN, BIF, VMS, SVSLIDE, DICOM and their like."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from darcnn.runtime.errors import DamagedPixelsError, InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.base import (
    RGB_NAMES,
    PlaneReader,
    choose_plane,
    make_slide_name,
    plausible_mpp,
    settle_mpp,
)
from darcnn.runtime.readers.dicom_offsets import check_offsets, is_dicom
from darcnn.runtime.readers.protocol import Pixels, SlideInfo

__all__ = ["SlideReader", "detect_vendor", "flatten_on_white", "is_slide"]

# Of one tile of a slide, 4 bytes each. Where there is no memory for what a damaged header says OpenSlide
# ends the process.
_MAX_TILE_PIXELS = 2**27


def detect_vendor(path: Path) -> str | None:
    """Return OpenSlide's name of the slide's format, None where OpenSlide does not know the file.

    "generic-tiff" is any tiled TIFF, of which OpenSlide sees 8-bit colours only.
    """
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:  # half a header: known by name, but not to be opened
        return None
    return vendor


def is_slide(path: Path) -> bool:
    """Tell whether OpenSlide opens a file: of some formats (CZI) it knows a part only."""
    try:
        openslide.OpenSlide(path).close()
    except (openslide.OpenSlideError, OSError):
        return False
    return True


def flatten_on_white(rgba: NDArray[np.uint8]) -> Pixels:
    """Return (H, W, 3) uint8 colours of (H, W, 4) with straight alpha, laid on white paper.

    Scanners leave out the glass between pieces of tissue; there alpha is 0 and the colour black.

    >>> flatten_on_white(np.array([[[0, 0, 0, 0], [9, 8, 7, 255], [0, 0, 0, 51]]], np.uint8)).tolist()
    [[[255, 255, 255], [9, 8, 7], [204, 204, 204]]]
    """
    colours, alpha = rgba[:, :, :3], rgba[:, :, 3:]
    if bool((alpha == 255).all()):
        return np.ascontiguousarray(colours)
    opacity = alpha.astype(np.uint16)
    # 127 rounds to nearest; the sum is at most 255 * 255 + 127 and fits
    return ((colours * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


class SlideReader(PlaneReader):
    """One slide, RGB uint8, all levels of its pyramid; glass that was not scanned is white.

    OpenSlide places a region of a reduced level by whole pixels of level 0, so where a level's
    downsample is not a whole number, pixels shift by up to half a pixel of level 0, otherwise in each region:
    on sharp edges the same pixel differs by some tens of grey levels. It may be read from several threads
    without a lock. After one damaged tile a handle of OpenSlide's refuses the whole file;
    the next read takes a new one.

    Raises:
        InputError: OpenSlide cannot open the file, or `z` or `t` names a plane that is not there.
        UsageError: `mpp` is no pixel size.
    """

    def __init__(
        self, path: Path, *, z: int | None = None, t: int | None = None, mpp: float | None = None
    ) -> None:
        for axis, asked in (("z", z), ("t", t)):
            choose_plane(axis, asked, 1, where=path)
        settle_mpp(None, None, override=mpp)  # a wrong option is told before the file is opened
        with _opening(path):
            if is_dicom(path):
                check_offsets(path)
            slide = openslide.OpenSlide(path)
            _check_tiles(slide, path)
            info = _describe(slide, path, mpp)
        super().__init__(info)
        self._path = path
        self._slide = slide
        self._renewal = threading.Lock()

    def _read(self, region: Region, level: Level) -> Pixels:
        corner_px0 = (round(region.x0 * level.downsample), round(region.y0 * level.downsample))
        extent = (int(region.width), int(region.height))
        slide = self._slide
        try:
            image = slide.read_region(corner_px0, level.index, extent)
        except openslide.OpenSlideError:  # damage here, or elsewhere before or in another thread
            image = self._read_anew(slide, corner_px0, level.index, extent)
        return flatten_on_white(np.asarray(image))

    def _read_anew(
        self, dead: Any, corner_px0: tuple[int, int], level: int, extent: tuple[int, int]
    ) -> Image.Image:
        """Read with a new handle, and put it in place of the `dead` one if it lives."""
        with self._renewal:
            if not self._path.exists():
                raise InputError("is gone", where=self._path, fix="bring it back; the same command goes on")
            with _opening(self._path):
                fresh = openslide.OpenSlide(self._path)
            try:
                image = fresh.read_region(corner_px0, level, extent)
            except openslide.OpenSlideError as err:
                fresh.close()
                raise DamagedPixelsError(
                    f"is damaged near x {corner_px0[0]}, y {corner_px0[1]} ({err})",
                    where=self._path,
                    fix="copy it again from the scanner",
                ) from err
            if self._slide is dead:
                self._slide = fresh  # the dead one closes itself when the last thread has left it
            else:
                fresh.close()
            return image

    def _release(self) -> None:
        self._slide.close()


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Translate what goes wrong while a slide is opened."""
    try:
        yield
    except openslide.OpenSlideUnsupportedFormatError as err:
        raise InputError(
            "is no slide that OpenSlide knows", where=path, fix="export it as a pyramidal OME-TIFF"
        ) from err
    except (openslide.OpenSlideError, OSError) as err:
        raise InputError(
            f"cannot be opened as a slide ({err})",
            where=path,
            fix="copy it again, with the files that belong to it, or export it as OME-TIFF",
        ) from err


def _check_tiles(slide: Any, path: Path) -> None:
    for level in range(slide.level_count):
        names = (f"openslide.level[{level}].tile-{side}" for side in ("width", "height"))
        width, height = (_number(slide.properties, name) or 0 for name in names)
        if width * height > _MAX_TILE_PIXELS:
            raise InputError(
                f"has tiles of {width:.0f} x {height:.0f} px",
                where=path,
                fix="copy it again from the scanner",
            )


def _describe(slide: Any, path: Path, mpp: float | None) -> SlideInfo:
    properties = slide.properties
    found = plausible_mpp(
        _number(properties, openslide.PROPERTY_NAME_MPP_X),
        _number(properties, openslide.PROPERTY_NAME_MPP_Y),
    )
    size, source = settle_mpp(found, openslide.PROPERTY_NAME_MPP_X, override=mpp)
    sizes = zip(slide.level_dimensions, slide.level_downsamples, strict=True)
    return SlideInfo(
        path=path,
        name=make_slide_name(path),
        levels=tuple(
            Level(index, width, height, float(downsample))
            for index, ((width, height), downsample) in enumerate(sizes)
        ),
        channel_names=RGB_NAMES,
        dtype=np.dtype(np.uint8),
        is_rgb=True,
        mpp=size,
        mpp_source=source,
        origin_px0=_origin(properties),
    )


def _origin(properties: Mapping[str, str]) -> tuple[int, int]:
    """Return where the scanned part begins, of slides that say so; QuPath shows them from there on.

    >>> _origin({"openslide.bounds-x": "120", "openslide.bounds-y": "80"}), _origin({})
    ((120, 80), (0, 0))
    """
    names = (openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y)
    x, y = (_number(properties, name) for name in names)
    if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
        return (0, 0)
    return (int(x), int(y))


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        return float(properties[name])
    except (KeyError, ValueError):  # absent, or not a number: the pixel size is unknown
        return None
