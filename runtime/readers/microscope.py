"""Files that microscopes write (ND2, LIF, CZI, IMS): one or more images, whose planes a library reads."""

from __future__ import annotations

import threading
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self
from xml.etree.ElementTree import ParseError

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import DamagedPixelsError, InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.base import (
    PlaneReader,
    check_channels,
    choose_plane,
    make_channel_names,
    make_slide_name,
    needs_package,
    pixel_type,
    plausible_mpp,
    plausible_um,
    settle_mpp,
    to_pixels,
)
from darcnn.runtime.readers.image_places import check_image_number, split_image
from darcnn.runtime.readers.protocol import Pixels, Planes, SlideInfo
from darcnn.runtime.readers.tiff_pages import UNREADABLE

__all__ = ["MicroscopeFile", "MicroscopeReader", "RegionSource", "StoredImage", "WholePlane"]

_EXTRA = "microscopes"  # of setup.cfg: the packages that read these formats

# What the libraries raise on files that are damaged or end early (found by flipping bytes and cutting).
_UNREADABLE = (*UNREADABLE, ParseError, zlib.error, EOFError, AssertionError)

RegionSource = Callable[[Region, Level], NDArray[Any]]  # (H, W, C) of a plane, as they are stored


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One image of a file, as its library describes it.

    `open_plane` takes the numbers of a plane along z and t and returns what reads regions of it; nothing of
    it is read before that is called.
    """

    width_px: int
    height_px: int
    planes: Planes
    dtype: np.dtype[Any]
    channel_names: tuple[str | None, ...]  # one for each channel; of a colour picture three
    is_rgb: bool
    step_um: tuple[float | None, float | None]  # (x, y), as the file says
    open_plane: Callable[[int, int], RegionSource]
    name: str | None = None  # that the microscopist gave it
    downsamples: tuple[int, ...] = (1,)  # of its levels


class MicroscopeFile(Protocol):
    """An open file."""

    @property
    def images(self) -> tuple[StoredImage | InputError, ...]:
        """Its images, in the order of the file; of one that cannot be read, what to say to whoever asks."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class WholePlane:
    """Reads regions of a plane that comes as a whole: loaded once, when the first is asked for."""

    def __init__(self, load: Callable[[], NDArray[Any]]) -> None:
        """Take what loads the (H, W, C) values."""
        self._load = load
        self._lock = threading.Lock()
        self._values: NDArray[Any] | None = None

    def __call__(self, region: Region, level: Level) -> NDArray[Any]:
        """Return (H, W, C) values of `region`; there is one level."""
        with self._lock:
            if self._values is None:
                self._values = self._load()
        return self._values[region.y0 : region.y1, region.x0 : region.x1]


class MicroscopeReader(PlaneReader):
    """One plane of one image of a file; the place of an image among several is FILE/NUMBER, from 0.

    Raises:
        InputError: damaged, of a kind that is not read, or the package that reads it is not installed; the
            file holds several images or planes, of which none or a missing one was named.
        UsageError: `mpp` is no pixel size.
    """

    format_name: ClassVar[str]
    mpp_source: ClassVar[str]

    def __init__(
        self,
        path: Path,
        *,
        z: int | None = None,
        t: int | None = None,
        mpp: float | None = None,
        opened: MicroscopeFile | None = None,  # the same file, which whoever opened it closes
    ) -> None:
        settle_mpp(None, None, override=mpp)  # a wrong option is told before the file is opened
        file = self._open(path) if opened is None else opened
        try:
            image = _choose(file, path)
            plane_z = choose_plane("z", z, image.planes.n_z, where=path)
            plane_t = choose_plane("t", t, image.planes.n_t, where=path)
            super().__init__(self._describe(image, path, mpp))
            self._source: RegionSource | None = image.open_plane(plane_z, plane_t)
        except BaseException:
            if opened is None:
                file.close()
            raise
        self._file = file if opened is None else None

    @staticmethod
    @abstractmethod
    def _open_file(path: Path) -> MicroscopeFile:
        """Import its library and open a file; what the library raises is translated by the caller."""

    @classmethod
    def count_images(cls, path: Path) -> int:
        """Return how many images the file holds.

        Raises:
            InputError: it cannot be read.
        """
        file = cls._open(path)
        try:
            return len(file.images)
        finally:
            file.close()

    @classmethod
    def count_planes(cls, path: Path) -> Planes:
        """Return how many planes the image holds, and how far apart they are."""
        file = cls._open(path)
        try:
            planes = _choose(file, path).planes
            return replace(planes, section_um=plausible_um(planes.section_um))
        finally:
            file.close()

    @classmethod
    def read_planes(cls, path: Path, places: Iterable[tuple[int | None, int | None]]) -> Iterator[Self]:
        """Yield a reader of each plane (z, t) of `places`, open until the next is asked for."""
        file = cls._open(path)
        try:
            for z, t in places:
                with cls(path, z=z, t=t, opened=file) as reader:
                    yield reader
        finally:
            file.close()

    @classmethod
    def _open(cls, path: Path) -> MicroscopeFile:
        place, _ = split_image(path)
        try:
            file = cls._open_file(place)
            try:
                _ = file.images  # what is wrong with them is said now
            except BaseException:
                file.close()
                raise
            return file
        except InputError:
            raise
        except ImportError as err:  # there is none, or one of its libraries does not load
            raise needs_package(err.name or _reason(err), place, extra=_EXTRA) from err
        except _UNREADABLE as err:
            raise InputError(
                f"cannot be read as {cls.format_name} ({_reason(err)})",
                where=place,
                fix="copy it again, or export it as OME-TIFF",
            ) from err

    @classmethod
    def _describe(cls, image: StoredImage, path: Path, mpp: float | None) -> SlideInfo:
        dtype = pixel_type(image.dtype)
        if dtype is None:
            raise InputError(f"has pixels of type {image.dtype}", where=path, fix="export real numbers")
        check_channels(len(image.channel_names), where=path)
        width, height = image.width_px, image.height_px
        if min(width, height) < 1:
            raise InputError(f"has an image of {width} x {height} px", where=path, fix="export it anew")
        found = plausible_mpp(*image.step_um)
        size, source = settle_mpp(found, cls.mpp_source, override=mpp)
        return SlideInfo(
            path=path,
            name=make_slide_name(path),
            levels=tuple(
                Level(index, max(1, width // by), max(1, height // by), float(by))
                for index, by in enumerate(image.downsamples)
            ),
            channel_names=make_channel_names(
                image.channel_names, len(image.channel_names), is_rgb=image.is_rgb
            ),
            dtype=dtype,
            is_rgb=image.is_rgb,
            mpp=size,
            mpp_source=source,
            image_name=image.name,
        )

    def _read(self, region: Region, level: Level) -> Pixels:
        assert self._source is not None
        where = self._info.path or self._info.name
        try:
            values = self._source(region, level)
            if values.shape[:2] != (region.height, region.width):
                raise ValueError("holds fewer pixels than it announces")
            return to_pixels(values)
        except (OSError, MemoryError) as err:  # not the file but what it lies on, or the machine
            raise InputError(
                f"cannot be read any more ({_reason(err)})", where=where, fix="check the disk"
            ) from err
        except _UNREADABLE as err:
            problem = f"cannot be read near x {region.x0}, y {region.y0} ({_reason(err)})"
            raise DamagedPixelsError(problem, where=where, fix="copy the file again") from err

    def _release(self) -> None:
        self._source = None  # it may look into the file, which cannot be closed before
        if self._file is not None:
            self._file.close()


def _choose(file: MicroscopeFile, path: Path) -> StoredImage:
    """Return the image that `path` names."""
    place, number = split_image(path)
    images = file.images
    check_image_number(number, len(images), where=place)
    image = images[number or 0]
    if isinstance(image, InputError):
        raise image
    return image


def _reason(err: BaseException) -> str:
    """Return what a library says, in one line."""
    return " ".join(str(err).split()) or type(err).__name__
