"""Which slides a command names, and where below `--out` the results of each go."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from darcnn.runtime.errors import InputError, UsageError, without_secrets
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.readers.image_places import split_image
from darcnn.runtime.readers.ome_zarr import is_ome_zarr, is_url
from darcnn.runtime.readers.open import is_packed_volume, is_readable, list_images
from darcnn.runtime.readers.protocol import Location
from darcnn.runtime.readers.tiff import read_own_files
from darcnn.runtime.sinks.result_folder import make_folder_name

__all__ = ["find_unread", "list_slides", "place_results"]

# Images of other programs, which a folder may hold beside those that are read.
_UNREAD = (
    *(".vsi", ".oib", ".oif", ".oir", ".dv", ".zvi"),
    *(".h5", ".hdf5", ".npy", ".npz", ".jp2", ".j2k", ".webp", ".gif", ".heic"),
)
_NAMED = 3  # files that a message names

_OME_TIFF = (".ome.tif", ".ome.tiff")
_ONE_OF_MANY = ".dcm"  # the files of a DICOM slide lie side by side: one must be named, not the folder


def list_slides(inputs: Sequence[str]) -> tuple[Location, ...]:
    """Return the files that `inputs` name, in order, each once.

    A URL is an OME-Zarr image; a plate in OME-Zarr stands for its fields, a file of several images for these.
    A folder stands for the images directly in it, sorted; a pattern with * or ? for what it matches (some
    shells leave that to the program). A file that does not exist is named all the same: opening it says so.

    Raises:
        InputError: a folder without images, or a pattern without matches.
        UsageError: two files would be written to the same folder.
    """
    slides: dict[Location, Location] = {}
    for text in inputs:
        for path in _images(_expand(text)):
            slides.setdefault(_own_place(path), path)
    found = tuple(slides.values())
    place_results(found)  # before a model is loaded
    return found


def _own_place(path: Location) -> Location:
    """Return what tells a place from others, however it is spelled; its own name where it leads nowhere."""
    if isinstance(path, str):
        return path
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return path.absolute()


def find_unread(inputs: Sequence[str]) -> Iterator[str]:
    """Yield a line for each folder of `inputs` with images that are left out, for they are not read."""
    for text in inputs:
        folder = Path(text)
        try:
            if is_url(text) or not folder.is_dir() or is_ome_zarr(folder):
                continue
            names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in _UNREAD)
        except OSError:  # listing it for its images has said so
            continue
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            listed = ", ".join(names[:_NAMED]) + more
            yield f"{text}: left out, for they are not read: {listed}; export OME-TIFF"


def place_results(slides: Sequence[Location]) -> tuple[Path, ...]:
    """Return for each slide the folder below `--out` that its own folder lies in: mostly `--out` itself.

    Slides of one name that lie in different folders keep as many of those as tell them apart.

    Raises:
        UsageError: two files would be written to the same folder.

    >>> slides = [Path("plate/A01/field.tif"), Path("plate/A02/field.tif"), Path("c.svs")]
    >>> [folder.as_posix() for folder in place_results(slides)]
    ['A01', 'A02', '.']
    """
    names = [make_folder_name(make_slide_name(slide)) for slide in slides]
    same: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        same.setdefault(name.casefold(), []).append(index)  # some disks ignore the case of names
    below = [Path() for _ in slides]
    for group in same.values():
        if len(group) > 1:
            for index, folder in zip(group, _tell_apart([slides[index] for index in group]), strict=True):
                below[index] = folder
    _refuse_nested(slides, [folder / name for folder, name in zip(below, names, strict=True)])
    return tuple(below)


def _tell_apart(slides: Sequence[Location]) -> list[Path]:
    """Return the ends of the folders that slides of one name lie in, as long as it takes."""
    above = [_folders_above(slide) for slide in slides]
    for depth in range(1, max(map(len, above)) + 1):
        ends = [Path(*folders[-depth:]) for folders in above]
        if len({str(end).casefold() for end in ends}) == len(ends):
            return ends
    first, second = (without_secrets(slide) for slide in slides[:2])
    raise UsageError(
        f"{first} and {second} would both be written there",
        where=make_folder_name(make_slide_name(slides[0])),
        fix="run them with different --out",
    )


def _folders_above(slide: Location) -> list[str]:
    if isinstance(slide, str):
        parts = PurePosixPath(urlsplit(slide).path).parts[:-1]
    else:
        parts = slide.absolute().parts[1:-1]  # not the root or the drive
    return [make_folder_name(part) for part in parts]


def _refuse_nested(slides: Sequence[Location], folders: Sequence[Path]) -> None:
    """Raise if the results of one slide would lie among those of another."""
    owners = {str(folder).casefold(): slide for folder, slide in zip(folders, slides, strict=True)}
    for folder, slide in zip(folders, slides, strict=True):
        for outer in folder.parents:
            if str(outer).casefold() in owners:
                other = without_secrets(owners[str(outer).casefold()])
                raise UsageError(
                    f"the results of {without_secrets(slide)} would lie among those of {other}",
                    where=str(outer),
                    fix="run them with different --out",
                )


def _without_parts(files: Sequence[Location]) -> Iterator[Location]:
    """Yield files without those that only go on with images that begin in another of them (OME-TIFF).

    The file that an image begins in tells so: the others may hold no metadata of their own.
    """
    names = {file.name for file in files if isinstance(file, Path)}
    begun: set[str] = set()
    parts: set[str] = set()
    for file in files:
        if isinstance(file, Path) and file.name.lower().endswith(_OME_TIFF):
            with suppress(InputError):  # running it says why
                for first, *later in read_own_files(file):
                    begun.update([first] if first in names else [first, *later])
                    parts.update(later)
    for file in files:
        if not (isinstance(file, Path) and file.name in parts - begun):
            yield file


def _images(places: Sequence[Location]) -> Iterator[Location]:
    for place in places:
        images = list_images(place)
        if not images:
            raise InputError("lists no images", where=place, fix="name an image inside it")
        yield from images


def _expand(text: str) -> list[Location]:
    if is_url(text):
        return [text]
    try:
        return _expand_path(Path(text), text)
    except (OSError, RuntimeError) as err:
        reason = err.strerror if isinstance(err, OSError) else str(err)
        raise InputError(f"cannot be looked at ({reason})", where=text, fix="check the path") from err


def _expand_path(path: Path, text: str) -> list[Location]:
    if path.is_dir() and not is_ome_zarr(path):
        files: list[Location] = sorted(
            entry
            for entry in path.iterdir()
            if (is_readable(entry) or is_packed_volume(entry))
            and entry.suffix.lower() != _ONE_OF_MANY
            and not entry.name.startswith(".")
            and (entry.is_file() or is_ome_zarr(entry))
        )
        if not files:
            raise InputError("holds no images", where=path, fix="name the files themselves")
        return list(_without_parts(files))
    file, number = split_image(path)
    if not file.exists() and glob.has_magic(text):
        found = glob.glob(str(file), recursive=True)  # noqa: PTH207  # the text may be absolute
        inside = "" if number is None else str(number)
        if not found:
            raise InputError("matches no file", where=text, fix="check the pattern")
        matches = [Path(match) / inside for match in sorted(found)]
        places = [place for match in matches for place in _expand_match(match)]
        if not places:
            raise InputError("matches folders without images", where=text, fix="check the pattern")
        return places
    return [path]


def _expand_match(path: Path) -> list[Location]:
    """Return the images of a folder, perhaps none (the companion of a slide, say), or what is no folder."""
    if not path.is_dir() or is_ome_zarr(path):
        return [path]
    with suppress(InputError):
        return _expand_path(path, str(path))
    return []
