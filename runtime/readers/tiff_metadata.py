"""What the metadata of a TIFF say: where channels lie, what they are called, how large a pixel is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

from darcnn.runtime.readers.base import SECONDS, plausible_mpp, plausible_um

__all__ = [
    "UM",
    "Axes",
    "PixelSize",
    "Place",
    "frame_interval_s",
    "lay_out",
    "locate_channels",
    "ome_facts",
    "ome_images",
    "section_um",
    "tag_pixel_size",
]

# Micrometres in the units of OME (PhysicalSizeXUnit) and ImageJ; relative units (pixel) are missing.
UM = {
    "pm": 1e-6,
    **dict.fromkeys(("Å", "å", "angstrom"), 1e-4),  # units of ImageJ are looked up in lower case
    **dict.fromkeys(("nm", "nanometer"), 1e-3),
    "µm": 1.0,  # micro sign
    "μm": 1.0,  # Greek mu
    "\\u00b5m": 1.0,  # as ImageJ escapes it
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "inch": 25400.0,
    "in": 25400.0,
    "m": 1e6,
}
# ResolutionUnit: inch, centimetre, and beyond the standard millimetre and micrometre; 1 is "none".
_TAG_UM = {2: 25400.0, 3: 1e4, 4: 1e3, 5: 1.0}
_PRINT_UNITS_UM = (25400.0, 1e4)
# Resolutions of a screen, a printer or a default (72, 96, 300, 1200 dpi) mean pixels beyond 10 um: a
# resolution in inches or centimetres is believed only below that.
_MAX_PRINT_UM = 10.0


@dataclass(frozen=True, slots=True)
class PixelSize:
    """Micrometres per pixel (x, y), and which metadata say so."""

    mpp: tuple[float, float]
    source: str


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of a series, its pages split from what lies inside a page.

    `pages` names the axes along which pages are counted (the last runs fastest), `depth` the axis of a
    page's volume, "" where a page is flat.
    """

    pages: str
    n_pages: tuple[int, ...]
    depth: str
    n_depth: int

    def count(self, role: str) -> int:
        """Return how many planes there are along "C" (channels), "T" (time) or "Z" (all other axes)."""
        return math.prod(n for axis, n in self.items() if _role(axis) == role)

    def items(self) -> list[tuple[str, int]]:
        """Return the axes beside those of a flat page, slowest first, and their lengths."""
        inside = [(self.depth, self.n_depth)] if self.depth else []
        return [*zip(self.pages, self.n_pages, strict=True), *inside]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one channel lies: the page (index in its series) and the slice of that page's volume."""

    page: int
    depth: int


def lay_out(axes: str, shape: tuple[int, ...], page_axes: str, page_shape: tuple[int, ...]) -> Axes | None:
    """Return the axes of a series (`axes`, `shape`) of pages (`page_axes`, `page_shape`).

    Letters are tifffile's: X, Y, Z, C, T, S (samples of a pixel), others for what has no name. None
    where the series is no image, or its pages are not whole planes of it.

    >>> lay_out("CZYX", (2, 5, 8, 9), "YX", (8, 9))
    Axes(pages='CZ', n_pages=(2, 5), depth='', n_depth=1)
    """
    outer = [(axis, n) for axis, n in zip(axes, shape, strict=True) if n != 1 or axis in "XY"]
    inner = [(axis, n) for axis, n in zip(page_axes, page_shape, strict=True) if n != 1 or axis in "XY"]
    n_lead = len(outer) - len(inner)
    if 0 in (*shape, *page_shape) or n_lead < 0 or [n for _, n in outer[n_lead:]] != [n for _, n in inner]:
        return None
    if "".join(axis for axis, _ in inner if axis in "YX") != "YX" or not set(page_axes) <= set("SZYX"):
        return None
    named = zip(outer[n_lead:], inner, strict=True)
    if any(series != page for (series, _), (page, _) in named if {series, page} & {"Y", "X"}):
        return None  # pages of channels last, say: each would be a row of the image
    # a page's volume is called Z by the page, but the series knows better (it may hold channels)
    depth = [(outer[n_lead + i][0], n) for i, (axis, n) in enumerate(inner) if axis == "Z"]
    return Axes(
        pages="".join(axis for axis, _ in outer[:n_lead]),
        n_pages=tuple(n for _, n in outer[:n_lead]),
        depth=depth[0][0] if depth else "",
        n_depth=depth[0][1] if depth else 1,
    )


def locate_channels(axes: Axes, *, z: int, t: int) -> tuple[Place, ...]:
    """Return where each channel of plane (`z`, `t`) lies, in the order of the channels.

    Axes other than C, S and T count together as z, in their order in the file.

    >>> [p.page for p in locate_channels(Axes("ZC", (3, 2), "", 1), z=1, t=0)]
    [2, 3]
    """
    items = axes.items()
    return tuple(
        _place(axes, _coordinates(items, {"Z": z, "T": t, "C": channel}))
        for channel in range(axes.count("C"))
    )


@lru_cache(maxsize=1)  # a stack is asked for it plane by plane, and it is long where planes are many
def ome_facts(xml: str, number: int = 0) -> tuple[PixelSize | None, tuple[str | None, ...]]:
    """Return the pixel size and the channel names of an image that OME-XML describes.

    Broken XML says nothing; tifffile has then read the file as a plain TIFF.
    """
    pixels = _pixels_of(xml, number)
    if pixels is None:
        return (None, ())
    names = tuple(channel.get("Name") for channel in pixels.findall("{*}Channel"))
    x, y = (
        _um(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY"
    )
    mpp = plausible_mpp(x, y)
    return (PixelSize(mpp, "OME PhysicalSizeX") if mpp else None, names)


def section_um(ome: str | None, imagej: Mapping[str, Any] | None, number: int = 0) -> float | None:
    """Return the distance of the planes of a stack: OME's PhysicalSizeZ or ImageJ's spacing, in micrometres.

    `number` is that of the image among those of the file.

    >>> section_um(None, {"spacing": 0.3, "unit": "um"}), section_um(None, None)
    (0.3, None)
    """
    found = None
    if ome is not None:
        pixels = _pixels_of(ome, number)
        if pixels is not None:
            found = _um(pixels.get("PhysicalSizeZ"), pixels.get("PhysicalSizeZUnit", "µm"))
    elif imagej is not None and "spacing" in imagej:
        found = _um(str(imagej["spacing"]), str(imagej.get("unit", "")).lower())
    return plausible_um(found)


def frame_interval_s(ome: str | None, imagej: Mapping[str, Any] | None, number: int = 0) -> float | None:
    """Return the seconds from one time point to the next, None where the file does not say.

    OME tells it as TimeIncrement, or by the DeltaT of planes, whose mean step is taken; ImageJ as finterval.

    >>> frame_interval_s(None, {"finterval": 2, "tunit": "min"}), frame_interval_s(None, {})
    (120.0, None)
    """
    found = None
    if ome is not None:
        pixels = _pixels_of(ome, number)
        if pixels is not None:
            found = _seconds(pixels.get("TimeIncrement"), pixels.get("TimeIncrementUnit", "s"))
            found = found or _mean_step_s(pixels)
    elif imagej is not None:
        found = _seconds(imagej.get("finterval"), str(imagej.get("tunit", "sec")))
    return found if found is not None and 0 < found < math.inf else None


def ome_images(ome: str) -> list[ElementTree.Element]:
    """Return the images that OME-XML describes; broken XML describes none."""
    try:
        return ElementTree.fromstring(ome).findall("{*}Image")
    except ElementTree.ParseError:
        return []


def _pixels_of(ome: str, number: int) -> ElementTree.Element | None:
    """Return what OME-XML says of the pixels of an image, else of the first that it says anything of."""
    described = [image.find("{*}Pixels") for image in ome_images(ome)]
    if number < len(described) and described[number] is not None:
        return described[number]
    return next((pixels for pixels in described if pixels is not None), None)


def _mean_step_s(pixels: ElementTree.Element) -> float | None:
    """Return the mean time between the planes of the first channel and section, where each is told."""
    moments = {
        int(plane.get("TheT", "0")): _seconds(plane.get("DeltaT"), plane.get("DeltaTUnit", "s"))
        for plane in pixels.findall("{*}Plane")
        if plane.get("TheZ") == "0" and plane.get("TheC") == "0" and plane.get("TheT", "").isdigit()
    }
    first, last = moments.get(0), moments.get(max(moments, default=0))
    return None if first is None or last is None or len(moments) < 2 else (last - first) / max(moments)


def tag_pixel_size(
    resolution: tuple[float, float], *, unit: int, imagej: Mapping[str, Any] | None
) -> PixelSize | None:
    """Return the pixel size that the resolution tags give, None where they do not mean a microscope.

    Args:
        resolution: pixels per unit, x and y; zero where the tag is absent.
        unit: ResolutionUnit: 1 none, 2 inch, 3 centimetre, 4 millimetre, 5 micrometre.
        imagej: ImageJ's own metadata, whose `unit` replaces the tag.
    """
    if min(resolution) <= 0:
        return None
    if imagej is not None and "unit" in imagej:
        unit_um, source = UM.get(str(imagej["unit"]).strip().lower()), "ImageJ unit"
    else:
        unit_um, source = _TAG_UM.get(unit), "TIFF XResolution"
    if unit_um is None:
        return None
    mpp = plausible_mpp(unit_um / resolution[0], unit_um / resolution[1])
    if mpp is None or (unit_um in _PRINT_UNITS_UM and max(mpp) > _MAX_PRINT_UM):
        return None
    return PixelSize(mpp, source)


def _role(axis: str) -> str:
    return {"C": "C", "S": "C", "T": "T"}.get(axis, "Z")


def _coordinates(items: list[tuple[str, int]], wanted: Mapping[str, int]) -> list[int]:
    """Return the index along each axis; axes of one role count together, the last runs fastest."""
    left = dict(wanted)
    indices: list[int] = []
    for axis, n in reversed(items):
        left[_role(axis)], index = divmod(left[_role(axis)], n)
        indices.append(index)
    return indices[::-1]


def _place(axes: Axes, coordinates: list[int]) -> Place:
    page = 0
    for index, n in zip(coordinates, axes.n_pages, strict=False):  # a depth may follow
        page = page * n + index
    return Place(page, coordinates[-1] if axes.depth else 0)


def _seconds(value: object, unit: str) -> float | None:
    try:
        return float(str(value)) * SECONDS[unit.strip().lower()]
    except (ValueError, KeyError):  # absent, no number, or a unit that is no time
        return None


def _um(value: str | None, unit: str) -> float | None:
    try:
        return float(value or "") * UM[unit.strip()]
    except (ValueError, KeyError):  # absent, no number, or a unit without a length
        return None
