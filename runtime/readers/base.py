"""What all readers share: planes, regions, pixel types, pixel sizes, and closing while others read."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.closing import Closing
from darcnn.runtime.errors import InputError, ShapeError, UsageError
from darcnn.runtime.geometry import Level, Region, whole_factor
from darcnn.runtime.readers.image_places import name_image
from darcnn.runtime.readers.protocol import Location, Pixels, Planes, SlideInfo

__all__ = [
    "RGB_NAMES",
    "SECONDS",
    "PlaneReader",
    "check_channels",
    "choose_plane",
    "exact_downsample",
    "make_channel_names",
    "make_slide_name",
    "needs_package",
    "pixel_type",
    "plausible_mpp",
    "plausible_um",
    "settle_mpp",
    "suffix_of",
    "to_pixels",
]

# Seconds in the units of OME (TimeIncrementUnit), ImageJ (tunit) and OME-Zarr.
SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "millisecond"), 1e-3),
    **dict.fromkeys(("µs", "μs", "us", "microsecond"), 1e-6),
    **dict.fromkeys(("min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}

RGB_NAMES = ("red", "green", "blue")
MAX_CHANNELS = 4096  # more than any instrument has: such a number is damage, and costs memory for every pixel
MAX_MPP = 1000.0  # a millimetre a pixel is no microscopy: such a number is a mistake in the metadata


class PlaneReader(Closing):
    """A reader of one plane; subclasses say how to read pixels and how to give the file back.

    `close` waits for reads in other threads, since libraries crash when a file vanishes under them.
    """

    def __init__(self, info: SlideInfo) -> None:
        self._info = info
        self._gate = threading.Condition()
        self._n_reading = 0
        self._is_closed = False

    @classmethod
    def count_images(cls, path: Path) -> int:
        """Return how many images the file holds, one unless the format knows several.

        Raises:
            InputError: the file cannot be read.
        """
        return 1

    @classmethod
    def count_planes(cls, path: Path) -> Planes:
        """Return how many planes the file holds, one unless the format knows stacks.

        Raises:
            InputError: the file cannot be read.
        """
        return Planes()

    @property
    def info(self) -> SlideInfo:
        """Facts about the plane that `read` reads."""
        return self._info

    def read(self, region: Region, *, level: int) -> Pixels:
        """Return (H, W, C) pixels of `region` in pixels of `level`; a new array that the caller owns.

        Raises:
            DamagedPixelsError: the file is damaged there.
            InputError: the reader is closed, or the file cannot be read any more.
            ShapeError: there is no such level; the region is empty or leaves the level.
        """
        _check_region(region, level, self._info.levels)
        with self._gate:
            if self._is_closed:
                where = self._info.path or self._info.name
                raise InputError("is closed", where=where, fix="read before the reader is closed")
            self._n_reading += 1
        try:
            return self._read(region, self._info.levels[level])
        finally:
            with self._gate:
                self._n_reading -= 1
                self._gate.notify_all()

    def close(self) -> None:
        """Give the file back once running reads are done; closing twice is allowed."""
        with self._gate:
            if self._is_closed:
                return
            self._is_closed = True
            self._gate.wait_for(lambda: self._n_reading == 0)
        self._release()

    @abstractmethod
    def _read(self, region: Region, level: Level) -> Pixels:
        """Return the pixels of a checked region of an open file."""

    @abstractmethod
    def _release(self) -> None:
        """Give back what the reader holds; called once."""


def choose_plane(axis: str, asked: int | None, count: int, *, where: Location) -> int:
    """Return which of the `count` planes along `axis` ("z" or "t") to read.

    Raises:
        InputError: there are several and none was asked for, or the one asked for does not exist.

    >>> choose_plane("z", None, 1, where="a.tif"), choose_plane("z", 2, 5, where="a.tif")
    (0, 2)
    """
    if asked is None and count == 1:
        return 0
    fix = f"pass --{axis} N with N from 0 to {count - 1}" if count > 1 else f"leave --{axis} out"
    if asked is None:
        what = "time points" if axis == "t" else "planes along z"
        raise InputError(f"holds {count} {what}", where=where, fix=fix)
    if not 0 <= asked < count:
        raise InputError(f"has no plane {asked} along {axis}", where=where, fix=fix)
    return asked


def check_channels(count: int, *, where: Location) -> None:
    """Refuse a number of channels that can only be damage.

    Raises:
        InputError: there are more than `MAX_CHANNELS`.
    """
    if count > MAX_CHANNELS:
        raise InputError(
            f"holds {count} channels, at most {MAX_CHANNELS} are read", where=where, fix="copy it again"
        )


def pixel_type(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the type that a reader delivers for stored values of `dtype`, None where there is none.

    8 and 16 bits without sign stay; a bit becomes 0 or 255; all other real numbers become float32
    (32-bit integers beyond 2**24 are rounded).

    >>> [str(pixel_type(np.dtype(kind))) for kind in ("?", "u1", ">u2", "i2", "f8", "c8")]
    ['uint8', 'uint8', 'uint16', 'float32', 'float32', 'None']
    """
    if dtype.kind == "b" or dtype == np.uint8:
        return np.dtype(np.uint8)
    if dtype.kind == "u" and dtype.itemsize == 2:
        return np.dtype(np.uint16)
    return np.dtype(np.float32) if dtype.kind in "iuf" else None


def to_pixels(values: NDArray[Any]) -> Pixels:
    """Return a new array with `values` in the type that `pixel_type` names, same shape.

    Raises:
        ShapeError: the values are not real numbers.
    """
    kind = pixel_type(values.dtype)
    if kind is None:
        raise ShapeError(f"pixels of type {values.dtype} are not real numbers")
    with np.errstate(over="ignore"):  # beyond the range of float32 a number is infinite
        pixels: Pixels = np.array(values, dtype=kind, order="C")
    return pixels * np.uint8(255) if values.dtype.kind == "b" else pixels


def plausible_um(step: float | None) -> float | None:
    """Return micrometres from one pixel or plane to the next, None unless a microscope could have them.

    >>> plausible_um(0.5), plausible_um(0.0), plausible_um(None)
    (0.5, None, None)
    """
    return step if step is not None and math.isfinite(step) and 0 < step <= MAX_MPP else None


def plausible_mpp(x: float | None, y: float | None) -> tuple[float, float] | None:
    """Return micrometres per pixel (x, y), None unless both are numbers that a microscope could have.

    >>> plausible_mpp(0.5, 0.5), plausible_mpp(0.0, 0.5), plausible_mpp(None, 0.5)
    ((0.5, 0.5), None, None)
    """
    across, down = plausible_um(x), plausible_um(y)
    return None if across is None or down is None else (across, down)


def settle_mpp(
    found: tuple[float, float] | None, source: str | None, *, override: float | None
) -> tuple[tuple[float, float] | None, str | None]:
    """Return the pixel size (x, y) and its source: `override` (from --mpp) wins over what was found.

    Raises:
        UsageError: the override is no plausible pixel size.
    """
    if override is None:
        return (found, source if found is not None else None)
    given = plausible_mpp(override, override)
    if given is None:
        raise UsageError(
            f"{override} is no pixel size", where="--mpp", fix="pass micrometres per pixel, such as 0.25"
        )
    return (given, "--mpp")


def needs_package(package: str, path: Path, *, extra: str = "volumes") -> InputError:
    """Return the error for a file whose format `package`, of the `extra`, reads.

    >>> str(needs_package("mrcfile", Path("a.mrc")))
    "a.mrc: needs the package mrcfile; run pip install 'darcnn[volumes]'"
    """
    return InputError(f"needs the package {package}", where=path, fix=f"run pip install 'darcnn[{extra}]'")


def make_channel_names(given: Sequence[str | None], count: int, *, is_rgb: bool) -> tuple[str, ...]:
    """Return `count` different channel names, those `given` in the file where they can be told apart.

    >>> make_channel_names(["DAPI", None, "DAPI"], 3, is_rgb=False)
    ('DAPI', 'channel_1', 'DAPI_2')
    >>> make_channel_names([], 1, is_rgb=False)
    ('grey',)
    """
    if is_rgb:
        return RGB_NAMES
    stripped = [(name or "").strip() for name in given]
    if len(stripped) != count:  # names of something else: samples, wells, another image
        stripped = [""] * count
    names: list[str] = []
    for index, given_name in enumerate(stripped):
        stem = given_name or ("grey" if count == 1 else "channel")
        name = stem if given_name or count == 1 else f"{stem}_{index}"
        while name in names or (name in stripped and name != given_name):
            name, index = f"{stem}_{index}", index + 1
        names.append(name)
    return tuple(names)


def make_slide_name(path: Location) -> str:
    """Return the name of a slide: that of its file without the ending, and its place in one of several.

    >>> [make_slide_name(Path(name)) for name in ("a/b.1.ome.tif", "c.svs", "d.mrc.gz", "e.lif/3")]
    ['b.1', 'c', 'd', 'e-3']
    >>> make_slide_name("s3://bucket/e.ome.zarr/?version=1"), make_slide_name(Path("p/plate.zarr/A/1/0"))
    ('e', 'plate-A-1-0')

    Bytes that are no UTF-8 become text that every format can hold.
    """
    if isinstance(path, str):
        path = Path(urlsplit(path).path.rstrip("/"))
    return name_image(path, _name_file).encode(errors="backslashreplace").decode()


_OF_MRC = (".mrc", ".rec", ".map", ".st")
_INNER = {".gz": (".nii", *_OF_MRC), ".bz2": _OF_MRC}  # endings before the last one; others: .ome


def _name_file(path: Path) -> str:
    stem = path.stem
    inner = Path(stem).suffix
    is_part = inner.lower() in _INNER.get(path.suffix.lower(), (".ome",))
    return stem.removesuffix(inner) if is_part else stem


def suffix_of(path: Path) -> str:
    """Return the ending that tells the format of a file, in lower case.

    >>> suffix_of(Path("a/b.1.nii.gz")), suffix_of(Path("c.SVS"))
    ('.nii.gz', '.svs')
    """
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def exact_downsample(full: tuple[int, int], reduced: tuple[int, int]) -> float:
    """Return how many pixels of `full` (width, height) one pixel of `reduced` spans along an axis.

    A size that a whole factor explains, rounded up or down, has that factor: 2967 halved is 1484.

    >>> exact_downsample((2220, 2967), (1110, 1484)), exact_downsample((100, 100), (40, 40))
    (2.0, 2.5)
    """
    factor = whole_factor(full, reduced)
    if factor is not None:
        return float(factor)
    return sum(whole / part for whole, part in zip(full, reduced, strict=True)) / len(full)


def _check_region(region: Region, level: int, levels: tuple[Level, ...]) -> None:
    if not 0 <= level < len(levels):
        raise ShapeError(f"level {level} of a pyramid with {len(levels)} levels")
    extent = levels[level]
    if region.width <= 0 or region.height <= 0:
        raise ShapeError(f"{region} is empty")
    if region.clip(extent.width_px, extent.height_px) != region:
        raise ShapeError(f"{region} leaves level {level}, {extent.width_px} x {extent.height_px} px")
