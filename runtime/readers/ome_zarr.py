"""OME-Zarr images, 0.4 and 0.5: a folder, or any URL that fsspec knows (extra `remote`)."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from darcnn.runtime.errors import DamagedPixelsError, InputError
from darcnn.runtime.geometry import Grid, Level, Region
from darcnn.runtime.readers.base import (
    SECONDS,
    PlaneReader,
    check_channels,
    choose_plane,
    exact_downsample,
    make_channel_names,
    make_slide_name,
    pixel_type,
    plausible_mpp,
    settle_mpp,
    to_pixels,
)
from darcnn.runtime.readers.protocol import Location, Pixels, Planes, SlideInfo
from darcnn.runtime.readers.zarr_blosc import with_checked_blosc

__all__ = [
    "Multiscale",
    "OmeZarrReader",
    "is_ome_zarr",
    "is_url",
    "ome_attributes",
    "open_multiscale",
    "unreadable_zarr",
]

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")  # two letters or more: C:// is a disk
_MARKS = ("zarr.json", ".zattrs")  # of Zarr 3 and 2
_UM = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}
_OLD_AXES = ("t", "c", "z", "y", "x")  # before 0.3 there were no others
_RGB_COLOURS = ["FF0000", "00FF00", "0000FF"]
_STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # what a URL needs besides, by its scheme
# What zarr and its codecs raise on metadata that lie and on what cannot be unpacked.
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    MemoryError,
)


class OmeZarrReader(PlaneReader):
    """One plane of a multiscale OME-Zarr image, with the levels of its pyramid.

    Axes come from the metadata: c is channels, t is time, z is z. Three channels of uint8 are red, green and
    blue unless the file gives them other colours. The pixel size is that of the coordinate transformations
    where the unit is known. A chunk that is not there is 0 or the fill value, as Zarr has it.

    Raises:
        InputError: no OME-Zarr image, a plate, damaged, or not to be reached; several planes along z or t, of
            which none or a missing one was asked for; a URL without the extra `remote`.
        UsageError: `mpp` is no pixel size.
    """

    def __init__(
        self, path: Location, *, z: int | None = None, t: int | None = None, mpp: float | None = None
    ) -> None:
        settle_mpp(None, None, override=mpp)  # a wrong option is told before anything is opened
        stored = open_multiscale(path)
        planes = stored.planes()
        chosen = {
            "z": choose_plane("z", z, planes.n_z, where=path),
            "t": choose_plane("t", t, planes.n_t, where=path),
        }
        try:
            info = _describe(stored, path, mpp)
        except _UNREADABLE as err:
            raise _unreadable(path, err) from err
        super().__init__(info)
        self._stored = stored
        self._chosen = chosen

    @classmethod
    def count_planes(cls, path: Location) -> Planes:
        """Return how many planes the image holds."""
        return open_multiscale(path).planes()

    def _read(self, region: Region, level: Level) -> Pixels:
        array, axes = self._stored.arrays[level.index], self._stored.axes
        spans: dict[str, Any] = {
            "y": slice(region.y0, region.y1),
            "x": slice(region.x0, region.x1),
            "c": slice(None),
            **self._chosen,
        }
        where = self._info.path or self._info.name
        try:
            values = np.asarray(array[tuple(spans[axis] for axis in axes)])
        except unreadable_zarr(where) as err:
            raise _unreadable(where, err, is_chunk=True) from err
        left = [axis for axis in axes if axis in "cyx"]
        if "c" not in left:
            return to_pixels(values.transpose(left.index("y"), left.index("x"))[:, :, None])  # (h, w, 1)
        return to_pixels(values.transpose([left.index(axis) for axis in "yxc"]))  # (h, w, C)

    def _release(self) -> None:
        self._stored.group.store.close()


def is_url(text: Location) -> bool:
    """Tell whether a source lies on another machine.

    >>> [is_url(text) for text in ("https://a.org/b.zarr", "s3://a/b.zarr", "C://a", "a/b.zarr")]
    [True, True, False, False]
    """
    return isinstance(text, str) and _URL.match(text) is not None


def is_ome_zarr(path: Path) -> bool:
    """Tell whether a folder is a Zarr group, by the files in it."""
    return path.is_dir() and any((path / mark).is_file() for mark in _MARKS)


@dataclass(frozen=True, slots=True)
class Multiscale:
    """An open image: its axes and the array of each level, finest first."""

    group: zarr.Group
    image: Mapping[str, Any]  # the first of "multiscales"
    omero: Mapping[str, Any]
    axes: tuple[str, ...]
    arrays: tuple[zarr.Array[Any], ...]  # one a level

    def planes(self) -> Planes:
        """Return how many planes there are."""
        sizes = dict(zip(self.axes, self.arrays[0].shape, strict=True))
        return Planes(sizes.get("z", 1), sizes.get("t", 1))

    def steps_um(self) -> dict[str, float]:
        """Return micrometres per pixel of the first level by axis (x, y, z), those that are known."""
        return self._steps(_UM)

    def frame_interval_s(self) -> float | None:
        """Return the seconds from one time point to the next, None where they are not known."""
        step = self._steps(SECONDS).get("t")
        return step if step is not None and 0 < step < math.inf else None

    def grid(self, axes: Sequence[str]) -> Grid | None:
        """Return where the pixels of the first level lie along some axes, None where the file does not say.

        An axis that the image lacks has one place, 0.
        """
        try:
            steps, origin = self._scale(), self._translation()
        except (LookupError, TypeError, ValueError):  # it says something else
            return None
        units = self._units()
        found = [(steps.get(axis, 1.0), units.get(axis), origin.get(axis, 0.0)) for axis in axes]
        grid = Grid(*zip(*found, strict=True))
        return grid if steps and grid.makes_sense else None

    def _steps(self, sizes: Mapping[str, float]) -> dict[str, float]:
        """Return the step of the first level along each axis whose unit has a size, in that size."""
        units = self._units()
        return {
            axis: sizes[str(units[axis])] * step
            for axis, step in self._scale().items()
            if str(units.get(axis)) in sizes
        }

    def _units(self) -> dict[str, str | None]:
        return {
            axis["name"]: axis.get("unit") for axis in self.image.get("axes", ()) if isinstance(axis, Mapping)
        }

    def _scale(self) -> dict[str, float]:
        """Return the step of the first level by axis, nothing where it is not told."""
        scales = [one for of in self._transformations() for one in _entries(of, "scale")]
        if not scales or any(len(scale) != len(self.axes) for scale in scales):
            return {}
        steps = (math.prod(float(one) for one in along) for along in zip(*scales, strict=True))
        return dict(zip(self.axes, steps, strict=True))

    def _translation(self) -> dict[str, float]:
        """Return where the first pixel of the first level lies by axis."""
        place = [0.0] * len(self.axes)
        for of in self._transformations():  # each scales what the one before has shifted
            for factors in _entries(of, "scale"):
                place = [one * float(factor) for one, factor in zip(place, factors, strict=False)]
            for shifts in _entries(of, "translation"):
                place = [one + float(shift) for one, shift in zip(place, shifts, strict=False)]
        return dict(zip(self.axes, place, strict=True))

    def _transformations(self) -> tuple[Sequence[Mapping[str, Any]], ...]:
        """Return those of the first level, then those of all levels, in the order in which they act."""
        levels = (self.image["datasets"][0], self.image)
        return tuple(one.get("coordinateTransformations") or () for one in levels)


def open_multiscale(path: Location) -> Multiscale:
    """Return the image at `path`.

    Raises:
        InputError: no OME-Zarr image, a plate, damaged, or not to be reached.
    """
    try:
        group = zarr.open_group(path, mode="r")
        attributes = ome_attributes(group)
        if "bioformats2raw.layout" in attributes and "multiscales" not in attributes:
            group = zarr.open_group(path, mode="r", path="0")  # the first of several images
            attributes = ome_attributes(group)
        if "plate" in attributes or "well" in attributes:
            raise InputError("is a plate, not an image", where=path, fix="name an image in it: PLATE/A/1/0")
        if not attributes.get("multiscales"):
            raise InputError("is no OME-Zarr image", where=path, fix="name the folder that holds multiscales")
        image = attributes["multiscales"][0]
        axes = tuple(axis if isinstance(axis, str) else axis["name"] for axis in image.get("axes", _OLD_AXES))
        arrays = tuple(_array(group, level["path"]) for level in image["datasets"])
        if not {"y", "x"} <= set(axes) <= set("tczyx") or any(array.ndim != len(axes) for array in arrays):
            raise InputError(f"has axes {' '.join(axes)}", where=path, fix="export it with axes of t c z y x")
        if not arrays or 0 in arrays[0].shape:
            raise InputError("holds no pixels", where=path, fix="export it again")
        # a pyramid may thin out z as well: such levels have other planes and are left out
        alike = tuple(array for array in arrays if _planes_of(array, axes) == _planes_of(arrays[0], axes))
        return Multiscale(group, image, attributes.get("omero") or {}, axes, alike)
    except InputError:
        raise
    except ImportError as err:  # of fsspec, or of what it needs for this kind of URL
        store = _STORES.get(str(path).partition(":")[0], "")
        fix = f"run pip install 'darcnn[remote]' {store}".rstrip()
        raise InputError(f"cannot be fetched ({err})", where=path, fix=fix) from err
    except zarr.errors.ContainsArrayError as err:
        raise InputError(
            "is an array without the metadata of OME-Zarr",
            where=path,
            fix="name the folder above if that is an OME-Zarr image, or write one with ome-zarr",
        ) from err
    except unreadable_zarr(path) as err:
        raise _unreadable(path, err) from err


def ome_attributes(group: zarr.Group) -> dict[str, Any]:
    """Return what OME-Zarr, of any version, says of a group."""
    attributes = group.attrs.asdict()
    inner = attributes.get("ome")  # from 0.5 on
    return dict(inner) if isinstance(inner, Mapping) else dict(attributes)


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    member = group[name]
    if not isinstance(member, zarr.Array):
        raise TypeError(f"{name} is no array")
    return with_checked_blosc(member)


def _planes_of(array: zarr.Array[Any], axes: tuple[str, ...]) -> tuple[Any, ...]:
    """Return what the levels of one pyramid have in common: type, and number of channels and planes."""
    return (array.dtype, *(size for axis, size in zip(axes, array.shape, strict=True) if axis not in "yx"))


def _describe(stored: Multiscale, path: Location, mpp: float | None) -> SlideInfo:
    sizes = [dict(zip(stored.axes, array.shape, strict=True)) for array in stored.arrays]
    full = (sizes[0]["x"], sizes[0]["y"])
    levels = tuple(
        Level(index, size["x"], size["y"], exact_downsample(full, (size["x"], size["y"])))
        for index, size in enumerate(sizes)
    )
    kind = pixel_type(stored.arrays[0].dtype)
    if kind is None:
        raise TypeError(f"pixels of type {stored.arrays[0].dtype}")
    n_channels = sizes[0].get("c", 1)
    check_channels(n_channels, where=path)
    channels = stored.omero.get("channels") or []
    colours = [str(channel.get("color", "")).upper() for channel in channels]
    is_rgb = n_channels == 3 and kind == np.uint8 and colours in ([], _RGB_COLOURS)
    size, source = settle_mpp(_mpp(stored), "OME-Zarr scale", override=mpp)
    return SlideInfo(
        path=path,
        name=make_slide_name(path),
        levels=levels,
        channel_names=make_channel_names(
            [channel.get("label") for channel in channels], n_channels, is_rgb=is_rgb
        ),
        dtype=kind,
        is_rgb=is_rgb,
        mpp=size,
        mpp_source=source,
        digest=_digest(stored),
        grid=stored.grid("yx") if mpp is None else None,
    )


def _mpp(stored: Multiscale) -> tuple[float, float] | None:
    """Return the size of a pixel of the first level, um (x, y); None where its unit is not known."""
    step = stored.steps_um()
    return plausible_mpp(step.get("x"), step.get("y"))


def _entries(transformations: Sequence[Mapping[str, Any]], kind: str) -> list[Sequence[float]]:
    return [entry[kind] for entry in transformations if entry.get("type") == kind]


def _digest(stored: Multiscale) -> str:
    """Return the sha256 of the metadata: its pixels would take minutes to read."""
    arrays = [array.metadata.to_dict() for array in stored.arrays]
    content = json.dumps([stored.group.attrs.asdict(), arrays], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def unreadable_zarr(path: Location) -> tuple[type[Exception], ...]:
    """Return what is raised on an image that is damaged or cannot be fetched: each network has its own."""
    return (Exception,) if is_url(path) else _UNREADABLE


def _unreadable(path: Location, err: BaseException, *, is_chunk: bool = False) -> InputError:
    reason = str(err) or type(err).__name__
    fix = "check the address and the network" if is_url(path) else "copy the whole folder again"
    # A codec's errors have no number, those of the disk do. What comes over a network may be cut short on
    # the way, and memory may be short here: that says nothing of the image.
    is_of_machine = isinstance(err, MemoryError) or (isinstance(err, OSError) and err.errno is not None)
    kind = DamagedPixelsError if is_chunk and not is_of_machine and not is_url(path) else InputError
    return kind(f"cannot be read as OME-Zarr ({reason[:200]})", where=path, fix=fix)
