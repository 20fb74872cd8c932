"""Places of the images in a file that holds several: FILE/0, FILE/1 and so on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from darcnn.runtime.errors import InputError

__all__ = ["SEVERAL_IMAGES", "check_image_number", "name_image", "split_image", "stem_of"]

# Endings of files that may hold several.
SEVERAL_IMAGES = (
    *(".czi", ".ims", ".lif", ".nd2"),
    *(".tif", ".tiff", ".btf", ".tf8", ".tf2", ".qptiff", ".svs", ".ndpi", ".scn", ".bif"),
)


def split_image(path: Path) -> tuple[Path, int | None]:
    """Return the file that an image lies in, and its number there; None where the path is that of a file.

    >>> [(place.name, number) for place, number in map(split_image, map(Path, ("a.lif/3", "a.lif", "a/3")))]
    [('a.lif', 3), ('a.lif', None), ('3', None)]
    """
    file, name = path.parent, path.name
    is_number = name.isascii() and name.isdecimal()
    if is_number and file.suffix.lower() in SEVERAL_IMAGES and not file.is_dir():
        return file, int(name)
    return path, None


def name_image(path: Path, name_file: Callable[[Path], str]) -> str:
    """Return what `name_file` calls the file or OME-Zarr that an image lies in, and its place in there."""
    file, number = split_image(path)
    if number is not None:
        return f"{name_file(file)}-{number}"
    for folder in path.parents:
        if folder.suffix.lower() == ".zarr" and not path.suffix:  # a file may lie in a folder of that name
            return "-".join([name_file(folder), *path.relative_to(folder).parts])
    return name_file(path)


def stem_of(path: Path) -> str:
    """Return the name that the labels of an image have before their ending.

    >>> [stem_of(Path(name)) for name in ("plate.tif/2", "b.1.png", "p.zarr/A/1/0", "p.zarr")]
    ['plate-2', 'b.1', 'p-A-1-0', 'p']
    """
    return name_image(path, lambda file: file.stem)


def check_image_number(number: int | None, count: int, *, where: Path) -> None:
    """Refuse a file without images, or of several of which `number` names none.

    Raises:
        InputError: it says how to name one.
    """
    if not count:
        raise InputError("holds no image", where=where, fix="export it as OME-TIFF")
    fix = f"name one: {where}/0 to {where}/{count - 1}" if count > 1 else f"name {where}"
    if number is None and count > 1:
        raise InputError(f"holds {count} images", where=where, fix=fix)
    if number is not None and number >= count:
        raise InputError(f"has no image {number}", where=where, fix=fix)
