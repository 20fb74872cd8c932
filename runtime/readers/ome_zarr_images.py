"""The images that an OME-Zarr folder holds: the fields of a plate, the images of a converted file."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import zarr

from darcnn.runtime.readers.ome_zarr import ome_attributes, unreadable_zarr
from darcnn.runtime.readers.protocol import Location

__all__ = ["list_zarr_images"]


def list_zarr_images(path: Location) -> list[Location]:
    """Return the images in an OME-Zarr folder or URL, in the order of its metadata; an image is its own.

    Plates and wells hold fields (OME-Zarr 0.4 and 0.5), a file converted by bioformats2raw the images of
    that file. A well that its plate names and that cannot be read stands for itself: opening it says why.
    """
    unreadable: tuple[type[BaseException], ...] = (ImportError, *unreadable_zarr(path))
    try:
        group = zarr.open_group(path, mode="r")
        attributes = ome_attributes(group)
        if "plate" in attributes:
            wells = [_inside(path, well["path"]) for well in attributes["plate"]["wells"]]
            return [image for well in wells for image in _fields(well, unreadable)]
        if "bioformats2raw.layout" in attributes and "multiscales" not in attributes:
            names = _series(group)
            return [_inside(path, name) for name in names] if len(names) > 1 else [path]
    except unreadable:  # opening it says why
        return [path]
    return _fields(path, unreadable)


def _fields(well: Location, unreadable: tuple[type[BaseException], ...]) -> list[Location]:
    """Return the images of a well; what is none stands for itself."""
    try:
        attributes = ome_attributes(zarr.open_group(well, mode="r"))
        return [_inside(well, image["path"]) for image in attributes["well"]["images"]]
    except unreadable:
        return [well]


def _series(group: zarr.Group) -> list[str]:
    """Return the names of the images of a converted file: as it lists them, else 0, 1, 2 ..."""
    listed: Any = None
    if "OME" in group:
        listed = ome_attributes(zarr.open_group(group.store_path / "OME", mode="r")).get("series")
    if listed:
        return [str(name) for name in listed]
    names: list[str] = []
    while str(len(names)) in group:
        names.append(str(len(names)))
    return names


def _inside(path: Location, name: str) -> Location:
    if not isinstance(path, str):
        return path / name
    parts = urlsplit(path)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()
