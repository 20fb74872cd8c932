"""Which images OME-XML describes, and which files they lie in: one in several, or several in one."""

from __future__ import annotations

from functools import lru_cache
from xml.etree import ElementTree

from darcnn.runtime.readers.tiff_metadata import ome_images

__all__ = ["files_of_images", "has_other_name", "keep_own_images", "number_images"]


def files_of_images(ome: str | None) -> tuple[tuple[str, ...], ...]:
    """Return for each image the names of the files that hold its planes, the first one's first.

    Names are missing where the image lies in the file that says so alone.
    """
    found = []
    for image in [] if ome is None else ome_images(ome):
        names = (one.get("FileName") for one in image.iterfind("{*}Pixels/{*}TiffData/{*}UUID"))
        found.append(tuple(dict.fromkeys(name for name in names if name)))
    return tuple(found)


def has_other_name(ome: str | None, own: str) -> bool:
    """Tell whether OME-XML names files, and none of them is called `own`: it was given another name."""
    files = files_of_images(ome)
    return any(files) and not any(own in names for names in files)


def keep_own_images(ome: str, own: str) -> str | None:
    """Return OME-XML without images that the file called `own` holds no part of; None where there are none.

    All files of a plate describe all its images, and whoever looks at one image need not open them all.
    """
    files = files_of_images(ome)
    if not any(own in names for names in files):
        return None
    is_own = [not names or own in names for names in files]
    if all(is_own):
        return None
    root = ElementTree.fromstring(ome)
    for image, keep in zip(root.findall("{*}Image"), is_own, strict=True):
        if not keep:
            root.remove(image)
    return ElementTree.tostring(root, encoding="unicode")


@lru_cache(maxsize=1)  # a stack is asked for it plane by plane, and it is long where planes are many
def number_images(ome: str | None, series: tuple[tuple[str, int, int], ...]) -> tuple[int, ...]:
    """Return which image of OME-XML each series is (its name, width and height): tifffile leaves some out.

    Both have the same order. Where names and sizes do not tell, the place in the order does.
    """
    images = [] if ome is None else ome_images(ome)
    numbers: list[int] = []
    after = 0
    for place, (name, width, height) in enumerate(series):
        alike = (
            number
            for number in range(after, len(images))
            if images[number].get("Name", "") == name and _has_size(images[number], width, height)
        )
        found = next(alike, None)
        numbers.append(place if found is None else found)
        after = after if found is None else found + 1
    return tuple(numbers)


def _has_size(image: ElementTree.Element, width: int, height: int) -> bool:
    pixels = image.find("{*}Pixels")
    return pixels is not None and (pixels.get("SizeX"), pixels.get("SizeY")) == (str(width), str(height))
