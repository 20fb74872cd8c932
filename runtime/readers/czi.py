"""CZI, the files of Zeiss' ZEN: fluorescence and greys, scene by scene, read region by region."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.microscope import MicroscopeReader, StoredImage
from darcnn.runtime.readers.protocol import Planes

__all__ = ["CziReader"]

_TYPES = {"Gray8": "u1", "Gray16": "u2", "Gray32Float": "f4", "Bgr24": "u1", "Bgr48": "u2"}  # libCZI's
_PLANE_AXES = {"T", "Z", "C", "X", "Y"}
_SMALLEST_PX = 1024  # of the longer side of the last level
_BLACK, _WHITE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_UM_PER_M = 1e6
_DIGITS = 9  # 2e-07 metres are 0.2 micrometres


class CziReader(MicroscopeReader):
    """One plane of one scene of a CZI file, at full size and reduced by powers of two.

    Reduced levels come from the pyramid that the file holds; libCZI makes what is missing of them. What was
    not scanned is black, in colours white. (Brightfield that OpenSlide knows is left to it.)
    """

    format_name = "CZI"
    mpp_source = "CZI scaling"

    @staticmethod
    def _open_file(path: Path) -> _CziFile:
        return _CziFile(path)


class _CziFile:
    def __init__(self, path: Path) -> None:
        from pylibCZIrw import czi

        self._path = path
        cache = czi.CacheOptions(type=czi.CacheType.Standard, max_memory_usage=256 << 20)
        self._file: Any = czi.CziReader(str(path), cache_options=cache)

    def close(self) -> None:
        self._file.close()

    @cached_property
    def images(self) -> tuple[StoredImage, ...]:
        path = self._path
        box = self._file.total_bounding_box_no_pyramid
        counts = {axis: stop - start for axis, (start, stop) in box.items()}
        foreign = {axis: n for axis, n in counts.items() if axis not in _PLANE_AXES and n > 1}
        if foreign:
            listed = ", ".join(f"{axis} of {n}" for axis, n in foreign.items())
            raise InputError(
                f"has axes that are not read ({listed})",
                where=path,
                fix="process it in ZEN first",
            )
        kinds = [self._file.get_channel_pixel_type(channel) for channel in range(counts["C"])]
        unknown = sorted(set(kinds) - set(_TYPES))
        if unknown:  # "Invalid" where channels are numbered as in the file that this one was cut from
            raise InputError(f"has pixels of type {unknown[0]}", where=path, fix="save it anew in ZEN")
        if len(kinds) > 1 and any(kind.startswith("Bgr") for kind in kinds):
            raise InputError("has colours beside other channels", where=path, fix="split its channels in ZEN")
        is_rgb = len(kinds) == 1 and kinds[0].startswith("Bgr")
        facts = ElementTree.fromstring(self._file.raw_metadata)
        x_um, y_um, z_um = (_scaling_um(facts, axis) for axis in "XYZ")
        planes = Planes(counts["Z"], counts["T"], section_um=z_um, frame_interval_s=_interval_s(facts))
        dtype = np.result_type(*(np.dtype(_TYPES[kind]) for kind in kinds))
        scenes = self._file.scenes_bounding_rectangle_no_pyramid
        areas = scenes or {None: self._file.total_bounding_rectangle_no_pyramid}
        return tuple(
            StoredImage(
                width_px=area.w,
                height_px=area.h,
                planes=planes,
                dtype=dtype,
                channel_names=(None,) * 3 if is_rgb else _channel_names(facts, len(kinds)),
                is_rgb=is_rgb,
                step_um=(x_um, y_um),
                open_plane=partial(_Plane, self._file, scene, (area.x, area.y), tuple(kinds)),
                name=_scene_name(facts, scene),
                downsamples=_downsamples(area.w, area.h),
            )
            for scene, area in areas.items()
        )


@dataclass(frozen=True, slots=True)
class _Plane:
    """Reads regions of all channels of a plane: a `RegionSource`."""

    file: Any
    scene: int | None
    corner: tuple[int, int]  # of the scene on the canvas that all scenes share
    kinds: tuple[str, ...]  # of its channels
    z: int
    t: int

    def __call__(self, region: Region, level: Level) -> NDArray[Any]:
        by = int(level.downsample)
        (left, top), extent = self.corner, (region.width * by, region.height * by)
        roi = (left + region.x0 * by, top + region.y0 * by, *extent)
        parts = []
        for channel, kind in enumerate(self.kinds):
            place = {"C": channel, "Z": self.z, "T": self.t}
            paper = _WHITE if kind.startswith("Bgr") else _BLACK
            values = self.file.read(roi, place, self.scene, 1.0 / by, kind, paper)
            parts.append(values[:, :, ::-1] if kind.startswith("Bgr") else values)  # blue comes first
        return np.concatenate(parts, axis=2)


def _downsamples(width_px: int, height_px: int) -> tuple[int, ...]:
    """Return 1, 2, 4 ... as long as the reduced image is not small.

    >>> _downsamples(900, 20), _downsamples(4096, 5000)
    ((1,), (1, 2, 4))
    """
    n_halved = max(0, math.floor(math.log2(max(width_px, height_px, 1) / _SMALLEST_PX)))
    return tuple(2**exponent for exponent in range(n_halved + 1))


def _scaling_um(facts: ElementTree.Element, axis: str) -> float | None:
    """Return micrometres from pixel to pixel along an axis, None where the file does not say."""
    metres = _number(facts.findtext(f".//Scaling/Items/Distance[@Id='{axis}']/Value"))
    return None if metres is None else round(metres * _UM_PER_M, _DIGITS) or None


def _interval_s(facts: ElementTree.Element) -> float | None:
    """Return the seconds from one time point to the next, None where the file does not say."""
    path = ".//Information/Image/Dimensions/T/Positions/Interval/Increment"
    return _number(facts.findtext(path)) or None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _channel_names(facts: ElementTree.Element, count: int) -> tuple[str | None, ...]:
    names = [one.get("Name") for one in facts.iterfind(".//Information/Image/Dimensions/Channels/Channel")]
    return tuple(names) if len(names) == count else (None,) * count


def _scene_name(facts: ElementTree.Element, scene: int | None) -> str | None:
    found = facts.find(f".//Information/Image/Dimensions/S/Scenes/Scene[@Index='{scene}']")
    return None if found is None else found.get("Name")
