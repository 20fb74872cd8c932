"""Which images a TIFF holds: its series without labels and thumbnails, each with its axes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import tifffile

from darcnn.runtime.readers.image_places import check_image_number, split_image
from darcnn.runtime.readers.tiff_metadata import Axes, lay_out
from darcnn.runtime.readers.tiff_pages import damaged

__all__ = ["TiffImage", "axes_of", "choose_image", "find_images"]

_LESSER = 0.25  # values of an image by those of the first: labels and thumbnails have fewer


@dataclass(frozen=True, slots=True)
class TiffImage:
    """One image of a file: its pages, their axes, and its number among all that the metadata describe."""

    series: tifffile.TiffPageSeries
    axes: Axes
    number: int


def choose_image(tiff: tifffile.TiffFile, path: Path) -> TiffImage:
    """Return the image that `path` names."""
    file, number = split_image(path)
    images = find_images(tiff, file)
    check_image_number(number, len(images), where=file)
    return images[number or 0]


def find_images(tiff: tifffile.TiffFile, path: Path) -> list[TiffImage]:
    """Return the images of a file, without labels and thumbnails.

    Of images that lie in several files (positions of a stage) each file knows all: its own count.
    """
    if len(tiff.pages):
        _check_chain(tiff, path)
    described = [(number, one, axes_of(one)) for number, one in enumerate(tiff.series)]
    found = [TiffImage(one, axes, number) for number, one, axes in described if axes is not None]
    own = [image for image in found if _lies_in(image.series, tiff)] or found
    return [image for image in own if image.series.size > _LESSER * own[0].series.size]


def _lies_in(series: tifffile.TiffPageSeries, tiff: tifffile.TiffFile) -> bool:
    """Tell whether some of the pages of a series lie in this very file."""
    return any(page is not None and page.parent.filename == tiff.filename for page in series.pages)


def axes_of(series: tifffile.TiffPageSeries) -> Axes | None:
    """Return the axes of a series, None where it is no image."""
    page = series.keyframe
    return lay_out(series.get_axes(False), series.get_shape(False), page.axes, page.shape)


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
