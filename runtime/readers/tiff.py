"""TIFF through tifffile: plain, tiled, BigTIFF, pyramids, ImageJ, LSM, STK, OME-TIFF in any order of axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import tifffile

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.base import (
    PlaneReader,
    check_channels,
    choose_plane,
    exact_downsample,
    make_channel_names,
    make_slide_name,
    pixel_type,
    settle_mpp,
    to_pixels,
)
from darcnn.runtime.readers.image_places import split_image
from darcnn.runtime.readers.protocol import Pixels, Planes, SlideInfo
from darcnn.runtime.readers.tiff_colours import Levels, Stored, give_meaning
from darcnn.runtime.readers.tiff_files import files_of_images
from darcnn.runtime.readers.tiff_images import TiffImage, axes_of, choose_image, find_images, open_tiff
from darcnn.runtime.readers.tiff_metadata import (
    Axes,
    PixelSize,
    frame_interval_s,
    locate_channels,
    ome_facts,
    section_um,
    tag_pixel_size,
)
from darcnn.runtime.readers.tiff_microscopes import read_microscope_tags
from darcnn.runtime.readers.tiff_pages import UNREADABLE, PageFiles, PageSource
from darcnn.runtime.readers.tiff_recorded import count_recorded
from darcnn.runtime.readers.tiff_scanners import aperio_pixel_size, qptiff_channel_names
from darcnn.runtime.readers.tiff_segments import locate_page

__all__ = ["TiffReader", "is_deep", "is_tiff", "read_own_files"]

_BITS = 8  # of a value in what OpenSlide delivers


class TiffReader(PlaneReader):
    """One plane of one image of a TIFF, with the levels of its pyramid; FILE/NUMBER is one of several.

    Axes come from the metadata: C and the samples of a pixel are channels, T is time, all other axes
    (Z, pages without a name) count together as z. Reduced images (SubIFDs, or pages that halve, third
    or quarter the one before) are levels. What the values mean tells `give_meaning`: RGB loses alpha, a
    palette becomes RGB, white-is-zero is inverted. uint8 and uint16 stay, one bit, two and four reach from
    0 to 255, all other real numbers become float32.

    A region reads and decodes only the strips or tiles under it, from several threads at once.

    Raises:
        InputError: no TIFF, damaged or truncated, no image or one of an unknown kind (CMYK, CIELAB,
            complex numbers); or several planes along z or t, of which none or a missing one was asked for.
        UsageError: `mpp` is no pixel size.
    """

    def __init__(
        self,
        path: Path,
        *,
        z: int | None = None,
        t: int | None = None,
        mpp: float | None = None,
        opened: tifffile.TiffFile | None = None,  # the same file: its pages need not be listed again
    ) -> None:
        settle_mpp(None, None, override=mpp)  # a wrong option is told before the file is opened
        try:
            with open_tiff(path) if opened is None else nullcontext(opened) as tiff:
                info, stored = _describe(tiff, path, z=z, t=t, mpp=mpp)
            files = PageFiles({page.path for level in stored.levels for page, _ in level})
        except UNREADABLE as err:
            raise _unreadable(path, err) from err
        super().__init__(info)
        self._stored = stored
        self._files = files

    @classmethod
    def count_images(cls, path: Path) -> int:
        """Return how many images the file holds, without labels and thumbnails."""
        try:
            with open_tiff(path) as tiff:
                return len(find_images(tiff, path))
        except UNREADABLE as err:
            raise _unreadable(path, err) from err

    @classmethod
    def count_planes(cls, path: Path) -> Planes:
        """Return how many planes of the image were written, and how far apart they are."""
        try:
            with open_tiff(path) as tiff:
                image = choose_image(tiff, path)
                planes = count_recorded(tiff, image, split_image(path)[0])
                tags = read_microscope_tags(tiff)
                if tags is not None:
                    return replace(planes, section_um=tags.section_um, frame_interval_s=tags.frame_interval_s)
                facts = tiff.ome_metadata, tiff.imagej_metadata, image.number
                return replace(
                    planes, section_um=section_um(*facts), frame_interval_s=frame_interval_s(*facts)
                )
        except UNREADABLE as err:
            raise _unreadable(path, err) from err

    @classmethod
    def read_planes(cls, path: Path, places: Iterable[tuple[int | None, int | None]]) -> Iterator[Self]:
        """Yield a reader of each plane (z, t) of `places`, open until the next is asked for.

        The file's pages are listed once: what a reader for each plane takes grows with their square.

        Raises:
            InputError: as `TiffReader`.
        """
        with ExitStack() as stack:
            try:
                tiff = stack.enter_context(open_tiff(path))
            except UNREADABLE as err:
                raise _unreadable(path, err) from err
            for z, t in places:
                with cls(path, z=z, t=t, opened=tiff) as reader:
                    yield reader

    def _read(self, region: Region, level: Level) -> Pixels:
        parts = [self._files.read(page, region, depth) for page, depth in self._stored.levels[level.index]]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)  # (H, W, C)
        if self._stored.tint is not None:
            values = self._stored.tint(values)
        return to_pixels(values[:, :, : self._stored.n_channels])

    def _release(self) -> None:
        self._files.close()


def read_own_files(path: Path) -> tuple[tuple[str, ...], ...]:
    """Return for each image that `path` holds a part of the names of its files, as OME-XML tells.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            return tuple(names for names in files_of_images(tiff.ome_metadata) if path.name in names)
    except UNREADABLE as err:
        raise _unreadable(path, err) from err


def is_deep(path: Path) -> bool:
    """Tell whether a TIFF has more bits a value than OpenSlide delivers; False where it does not say."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return tiff.pages.first.bitspersample > _BITS
    except UNREADABLE:  # whoever opens it says why
        return False


def is_tiff(head: bytes) -> bool:
    """Tell whether a file that begins with `head` (4 bytes or more) is a TIFF or BigTIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _describe(
    tiff: tifffile.TiffFile, path: Path, *, z: int | None, t: int | None, mpp: float | None
) -> tuple[SlideInfo, Stored]:
    """Return the facts and the pages of one plane of an open file."""
    image = choose_image(tiff, path)
    series, axes = image.series, image.axes
    dtype = pixel_type(series.dtype)
    if dtype is None:
        raise InputError(f"has pixels of type {series.dtype}", where=path, fix="export real numbers")
    check_channels(axes.count("C") * series.keyframe.samplesperpixel, where=path)
    plane_z = choose_plane("z", z, axes.count("Z"), where=path)
    plane_t = choose_plane("t", t, axes.count("T"), where=path)
    # a pyramid may thin out z as well: such levels have other planes and are left out
    reduced = [s for s in series.levels if _same_planes(axes, axes_of(s))]
    pages = tuple(_pages_of(s, path, z=plane_z, t=plane_t) for s in reduced)
    n_values = sum(page.grid.n_samples * page.grid.n_contiguous for page, _ in pages[0])
    first = locate_channels(axes, z=plane_z, t=plane_t)[0].page
    stored = give_meaning(series, path, pages, n_values, first)
    size, names = _facts(tiff, image)
    found, source = settle_mpp(size.mpp if size else None, size.source if size else None, override=mpp)
    info = SlideInfo(
        path=path,
        name=make_slide_name(path),
        levels=_levels(pages),
        channel_names=make_channel_names(names, stored.n_channels, is_rgb=stored.is_rgb),
        dtype=np.dtype(np.uint8) if stored.is_rgb and n_values == 1 else dtype,
        is_rgb=stored.is_rgb,
        mpp=found,
        mpp_source=source,
        image_name=series.name or None if split_image(path)[1] is not None else None,
        doubts=tuple(filter(None, (stored.doubt, image.doubt))),
    )
    return info, stored


def _unreadable(path: Path, err: Exception) -> InputError:
    return InputError(
        f"cannot be read as a TIFF ({err})", where=path, fix="copy it again, or export it as OME-TIFF"
    )


def _same_planes(full: Axes, reduced: Axes | None) -> bool:
    return reduced is not None and all(full.count(role) == reduced.count(role) for role in "ZTC")


def _levels(pages: Levels) -> tuple[Level, ...]:
    sizes = [(channels[0][0].grid.width, channels[0][0].grid.height) for channels in pages]
    return tuple(Level(i, *size, exact_downsample(sizes[0], size)) for i, size in enumerate(sizes))


def _pages_of(
    series: tifffile.TiffPageSeries, path: Path, *, z: int, t: int
) -> tuple[tuple[PageSource, int], ...]:
    """Return the page and slice of each channel; channels inside one page (samples) share an entry."""
    axes = axes_of(series)
    if axes is None:
        raise InputError("has a level of another shape", where=path, fix="export it as OME-TIFF")
    sources: dict[int, PageSource] = {}
    places = locate_channels(axes, z=z, t=t)
    for place in places:
        if place.page not in sources:
            sources[place.page] = locate_page(series, place.page, path)
    return tuple((sources[place.page], place.depth) for place in places)


def _facts(tiff: tifffile.TiffFile, image: TiffImage) -> tuple[PixelSize | None, tuple[str | None, ...]]:
    """Return the pixel size and the channel names: of LSM, STK or OME, of ImageJ, or the resolution tags'."""
    tags_of_microscope = read_microscope_tags(tiff)
    if tags_of_microscope is not None:
        return tags_of_microscope.pixel_size, tags_of_microscope.channel_names
    size, names = ome_facts(tiff.ome_metadata, image.number) if tiff.ome_metadata else (None, ())
    if size is None:
        tags = image.series.keyframe.tags
        x, y = (_ratio(tags.valueof(name)) for name in ("XResolution", "YResolution"))
        unit = int(tags.valueof("ResolutionUnit", 2))  # 2, inch, is the default of the standard
        size = tag_pixel_size((x, y), unit=unit, imagej=tiff.imagej_metadata)
    if tiff.is_svs:
        size = aperio_pixel_size(image.series.keyframe.description) or size
    if tiff.is_qpi:
        names = qptiff_channel_names(image.series)
    return size, names


def _ratio(value: Any) -> float:
    """Return a rational tag as a number, 0 where it is absent or broken."""
    if not isinstance(value, tuple) or len(value) != 2 or not value[1]:
        return 0.0
    return float(value[0] / value[1])
