"""Which images a TIFF holds: its series without labels and thumbnails, each with its axes."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import tifffile

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.image_places import SEVERAL_IMAGES, check_image_number, split_image
from darcnn.runtime.readers.tiff_files import keep_own_images, number_images
from darcnn.runtime.readers.tiff_metadata import Axes, lay_out
from darcnn.runtime.readers.tiff_pages import damaged

__all__ = ["TiffImage", "axes_of", "choose_image", "find_images", "open_tiff"]

_LSM_POSITIONS = "PM"  # tifffile's letters; they are not planes of a stack
_SIDE_KINDS = 0b101  # NewSubfileType: a reduced image, a mask
_LESSER = 0.25  # values of a page by those of the first image: labels and thumbnails have no more
_SIDE_NAMES = re.compile(r"\b(label|macro|overview|thumbnail)\b", re.IGNORECASE)
_NAMED = 3  # images that a message names


@dataclass(frozen=True, slots=True)
class TiffImage:
    """One image of a file: its pages, their axes, and its number among all that the metadata describe."""

    series: tifffile.TiffPageSeries
    axes: Axes
    number: int
    doubt: str | None = None  # whether what lies beside it in the file are images too


def open_tiff(path: Path) -> tifffile.TiffFile:
    """Open the file that the image at `path` lies in, and of its metadata what is about it."""
    file = split_image(path)[0]
    tiff = tifffile.TiffFile(file)
    own = keep_own_images(tiff.ome_metadata, file.name) if tiff.ome_metadata else None
    if own is None:
        return tiff
    tiff.close()
    return tifffile.TiffFile(file, omexml=own)


def choose_image(tiff: tifffile.TiffFile, path: Path) -> TiffImage:
    """Return the image that `path` names.

    Raises:
        InputError: there is none, or no such one, or several of which none is named. Of a file whose ending
            is not that of such files it is the first.
    """
    file, number = split_image(path)
    images = find_images(tiff, file)
    if number is not None or file.suffix.lower() in SEVERAL_IMAGES or not images:
        check_image_number(number, len(images), where=file)
    image = images[number or 0]
    if image.series.kind == "lsm" and (positions := set(image.axes.pages) & set(_LSM_POSITIONS)):
        n = math.prod(size for axis, size in image.axes.items() if axis in positions)
        raise InputError(
            f"holds {n} positions of the stage", where=path, fix="export each from ZEN by itself"
        )
    return image


def find_images(tiff: tifffile.TiffFile, path: Path) -> list[TiffImage]:
    """Return the images of a file, without labels, thumbnails and masks.

    Of images that lie in several files (positions of a stage) each file knows all: those count whose first
    page it holds.
    """
    if len(tiff.pages):
        _check_chain(tiff, path)
    series = list(tiff.series)
    sizes = ((one.name, one.keyframe.imagewidth, one.keyframe.imagelength) for one in series)
    numbers = number_images(tiff.ome_metadata, tuple(sizes))
    described = [(one, axes_of(one), number) for one, number in zip(series, numbers, strict=True)]
    found = [TiffImage(one, axes, number) for one, axes, number in described if axes is not None]
    own = [image for image in found if _begins_in(image.series, tiff)] or found
    is_main = [image is own[0] or _is_main(image.series, own[0].series) for image in own]
    doubt = _doubt_of([image.series for image, main in zip(own, is_main, strict=True) if not main])
    return [replace(image, doubt=doubt) for image, main in zip(own, is_main, strict=True) if main]


def _doubt_of(left_out: list[tifffile.TiffPageSeries]) -> str | None:
    """Return a warning where series are left out for their size alone: nothing says that they are labels."""
    pages = [series.keyframe for series in left_out if not _is_told_aside(series)]
    if not pages:
        return None
    sizes = ", ".join(f"{page.imagewidth} x {page.imagelength}" for page in pages[:_NAMED])
    more = ", ..." if len(pages) > _NAMED else ""
    return f"smaller images in the file were taken for thumbnails or labels and left out ({sizes}{more} px)"


def _begins_in(series: tifffile.TiffPageSeries, tiff: tifffile.TiffFile) -> bool:
    """Tell whether the first of the pages of a series lies in this very file."""
    first = next((page for page in series.pages if page is not None), None)
    return first is not None and bool(first.parent.filename == tiff.filename)


def _is_main(series: tifffile.TiffPageSeries, first: tifffile.TiffPageSeries) -> bool:
    """Tell whether a series shows something of its own, beside the first.

    What OME-XML describes and does not call a label or the like does, however small.
    """
    if series.keyframe.subfiletype & _SIDE_KINDS:
        return False
    is_lesser = series.keyframe.size <= _LESSER * first.keyframe.size
    return not is_lesser or (series.kind == "ome" and not _is_told_aside(series))


def _is_told_aside(series: tifffile.TiffPageSeries) -> bool:
    """Tell whether the file says that a series is a reduced image, a mask, a label or a thumbnail."""
    return bool(series.keyframe.subfiletype & _SIDE_KINDS or _SIDE_NAMES.search(series.name))


def axes_of(series: tifffile.TiffPageSeries) -> Axes | None:
    """Return the axes of a series, None where it is no image."""
    page = series.keyframe
    return lay_out(series.axes, series.shape, page.axes, page.shape)


def _check_chain(tiff: tifffile.TiffFile, path: Path) -> None:
    """Refuse a file that ends before the last of its pages; tifffile would only log that."""
    layout, stream = tiff.tiff, tiff.filehandle
    page = tiff.pages[-1]
    stream.seek(page.offset)
    (n_tags,) = struct.unpack(layout.tagnoformat, stream.read(layout.tagnosize))
    stream.seek(page.offset + layout.tagnosize + n_tags * layout.tagsize)
    (after,) = struct.unpack(layout.offsetformat, stream.read(layout.offsetsize))
    if after >= stream.size:
        raise damaged(path, "is truncated")
