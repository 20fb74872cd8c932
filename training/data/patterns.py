"""Which files a recipe means by a pattern, and which images lie in files."""

from __future__ import annotations

from collections.abc import Iterable
from glob import has_magic
from pathlib import Path

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.image_places import split_image
from darcnn.runtime.readers.ome_zarr import is_ome_zarr
from darcnn.runtime.readers.open import is_readable, list_images

__all__ = ["expand_images", "find_files", "find_images", "images_of_folder", "is_left_behind"]


def find_files(folder: Path, pattern: str, *, key: str) -> list[Path]:
    """Return the files and folders in `folder` that a glob matches, sorted; perhaps none.

    Args:
        folder: the data folder.
        pattern: relative to it, or an absolute path where nothing in the folder matches.
        key: of the recipe, for errors.
    Raises:
        InputError: it is no pattern.
    """
    root = Path(pattern).anchor
    try:
        found = list(folder.glob(pattern.lstrip("/") or "nothing"))
        if root and not found:
            found = list(Path(root).glob(str(Path(pattern).relative_to(root))))
        return sorted(path for path in found if not is_left_behind(path))
    except (ValueError, IndexError, NotImplementedError) as err:
        raise InputError(
            f"{pattern!r} is no pattern ({err})", where=key, fix='correct the recipe: "images/*.png", say'
        ) from err


def find_images(folder: Path, pattern: str, *, key: str) -> list[Path]:
    """Return the places of the images in the files that a glob matches: of several in a file, each.

    A folder that is named stands for the images directly in it; folders that a * matches count for nothing.

    Raises:
        InputError: it is no pattern.
    """
    file, number = split_image(Path(pattern))
    if number is not None:
        return [found / str(number) for found in find_files(folder, str(file), key=key)]
    found = find_files(folder, pattern, key=key)
    if not has_magic(pattern) and len(found) == 1 and _is_folder(found[0]):
        return images_of_folder(found[0])
    return expand_images(path for path in found if not _is_folder(path))


def images_of_folder(folder: Path) -> list[Path]:
    """Return the places of the images directly in a folder, sorted by file: of several in a file, each."""
    files = (path for path in folder.iterdir() if is_readable(path) and not is_left_behind(path))
    return expand_images(sorted(files))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not is_ome_zarr(path)


def is_left_behind(path: Path) -> bool:
    """Tell whether a system put the file there: macOS lays ._a.png beside a.png on foreign disks."""
    return path.name.startswith("._")


def expand_images(files: Iterable[Path]) -> list[Path]:
    """Return the places of the images in files: of one that holds several, each; what is no image stays."""
    return [Path(image) for file in files for image in list_images(file)]
