"""Which files a recipe means by a pattern, and which images lie in files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.image_places import split_image
from darcnn.runtime.readers.open import list_images

__all__ = ["expand_images", "find_files", "find_images"]


def find_files(folder: Path, pattern: str, *, key: str) -> list[Path]:
    """Return the files and folders in `folder` that a glob matches, sorted; perhaps none.

    Args:
        folder: the data folder.
        pattern: relative to it; a slash in front changes nothing.
        key: of the recipe, for errors.
    Raises:
        InputError: it is no pattern.
    """
    try:
        return sorted(folder.glob(pattern.lstrip("/") or "nothing"))
    except (ValueError, IndexError, NotImplementedError) as err:
        raise InputError(
            f"{pattern!r} is no pattern ({err})", where=key, fix='correct the recipe: "images/*.png", say'
        ) from err


def find_images(folder: Path, pattern: str, *, key: str) -> list[Path]:
    """Return the places of the images in the files that a glob matches: of several in a file, each.

    Raises:
        InputError: it is no pattern.
    """
    file, number = split_image(Path(pattern))
    if number is not None:
        return [found / str(number) for found in find_files(folder, str(file), key=key)]
    return expand_images(find_files(folder, pattern, key=key))


def expand_images(files: Iterable[Path]) -> list[Path]:
    """Return the places of the images in files: of one that holds several, each; what is no image stays."""
    return [Path(image) for file in files for image in list_images(file)]
