"""Places of the images in a file that holds several: FILE/0, FILE/1 and so on."""

from __future__ import annotations

from pathlib import Path

from darcnn.runtime.errors import InputError

__all__ = ["SEVERAL_IMAGES", "check_image_number", "split_image"]

SEVERAL_IMAGES = (".czi", ".lif", ".nd2", ".tif", ".tiff", ".btf", ".tf8", ".tf2")  # may hold several


def split_image(path: Path) -> tuple[Path, int | None]:
    """Return the file that an image lies in, and its number there; None where the path is that of a file.

    >>> split_image(Path("a/b.lif/3")), split_image(Path("a/b.lif")), split_image(Path("a/3"))
    ((PosixPath('a/b.lif'), 3), (PosixPath('a/b.lif'), None), (PosixPath('a/3'), None))
    """
    if path.name.isdecimal() and path.parent.suffix.lower() in SEVERAL_IMAGES:
        return path.parent, int(path.name)
    return path, None


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
