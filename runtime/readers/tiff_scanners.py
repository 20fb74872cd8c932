"""What scanners of Aperio and Akoya say in the descriptions of the pages of their TIFFs."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import tifffile

from darcnn.runtime.readers.base import plausible_mpp
from darcnn.runtime.readers.tiff_metadata import PixelSize

__all__ = ["aperio_pixel_size", "qptiff_channel_names"]

_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)\s*(?:\||$)")
_NAMES = ("Biomarker", "Name")  # what was stained, else the filter


def aperio_pixel_size(description: str) -> PixelSize | None:
    """Return the pixel size that the description of an SVS tells.

    >>> aperio_pixel_size("Aperio Image Library v12|AppMag = 20|MPP = 0.5")
    PixelSize(mpp=(0.5, 0.5), source='Aperio MPP')
    """
    told = _MPP.search(description)
    try:
        um = float(told[1]) if told else None
    except ValueError:  # 0.5.1
        return None
    mpp = plausible_mpp(um, um)
    return None if mpp is None else PixelSize(mpp, "Aperio MPP")


def qptiff_channel_names(series: tifffile.TiffPageSeries) -> tuple[str | None, ...]:
    """Return what the description of each page of a QPTIFF calls its channel."""
    return tuple(None if page is None else _channel_name(page.aspage().description) for page in series.pages)


def _channel_name(description: str) -> str | None:
    """Return the name in the description of a page.

    >>> _channel_name("<A><Name>DAPI</Name></A>")
    'DAPI'
    """
    try:
        told = ElementTree.fromstring(description)
    except ElementTree.ParseError:
        return None
    return next(filter(None, (told.findtext(tag) for tag in _NAMES)), None)
