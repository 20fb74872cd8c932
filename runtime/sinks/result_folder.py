"""The folder of one slide's results: absent, in progress, or complete; never half-written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from darcnn.runtime.errors import OutputError
from darcnn.runtime.sinks.atomic import remove_drafts, translated

__all__ = [
    "CSV_FILE",
    "CTC_FOLDER",
    "GEOJSON_FILE",
    "LABELS_FOLDER",
    "LABELS_MRC_FILE",
    "LABELS_TIFF",
    "OVERVIEW_FILE",
    "POINTS_FILE",
    "RUN_FILE",
    "SCROLL_FILE",
    "STAR_FILE",
    "TABLE_FILE",
    "TRACKS_CSV_FILE",
    "TRACKS_FILE",
    "ResultFolder",
    "claim_folder",
    "drop_lock",
    "drop_parts",
    "hold_folder",
    "make_folder_name",
    "take_lock",
]

TABLE_FILE = "objects.parquet"
GEOJSON_FILE = "objects.geojson.gz"
LABELS_FOLDER = "labels.ome.zarr"
OVERVIEW_FILE = "overview.png"
CSV_FILE = "objects.csv"  # this and the next on request
LABELS_TIFF = "labels.ome.tiff"
RUN_FILE = "run.json"  # where it exists the folder is complete
STAR_FILE = "particles.star"  # these and the next of volumes
POINTS_FILE = "particles.txt"
SCROLL_FILE = "scroll.gif"
LABELS_MRC_FILE = "labels.mrc"
TRACKS_FILE = "tracks.parquet"  # of series
TRACKS_CSV_FILE = "tracks.csv"
CTC_FOLDER = "ctc"
_RESULTS = (
    *(TABLE_FILE, GEOJSON_FILE, LABELS_FOLDER, OVERVIEW_FILE, CSV_FILE, LABELS_TIFF),
    *(STAR_FILE, POINTS_FILE, SCROLL_FILE, LABELS_MRC_FILE, TRACKS_FILE, TRACKS_CSV_FILE, CTC_FOLDER),
    RUN_FILE,  # last, always
)
# what systems put into folders that somebody looks at
_OF_SYSTEMS = (".DS_Store", "._", "Thumbs.db", "desktop.ini", ".nfs", ".directory")
_PARTS = ".parts"
_COMMITTED = "committed"  # in the parts: the results are in place, the parts are of no more use
_LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what some network disks say to a lock

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')  # in names on Windows; results move between systems
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def make_folder_name(slide_name: str) -> str:
    """Return the name of a slide's folder, valid on every system.

    >>> [make_folder_name(name) for name in ("B12 a", "a/b:c", "nul.2", "..", "x. ")]
    ['B12 a', 'a_b_c', '_nul.2', 'slide', 'x']
    """
    name = _FORBIDDEN.sub("_", slide_name).rstrip(". ").lstrip()
    return f"_{name}" if _RESERVED.match(name) else name or "slide"


@dataclass(frozen=True, slots=True)
class ResultFolder:
    """A claimed folder: what is built in `built` becomes the result by `commit`."""

    path: Path
    parts: Path  # part files
    built: Path  # finished outputs, not yet in place

    def commit(self) -> None:
        """Put the outputs in their place, run.json last; an earlier result goes, or stays whole on failure.

        Raises:
            OSError: something cannot be moved.
        """
        earlier = self.built / "earlier"
        earlier.mkdir()
        moves = [(self.path / name, earlier / name) for name in reversed(_RESULTS)]
        moves += [(self.built / name, self.path / name) for name in _RESULTS]
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in moves:
                if source.exists():
                    source.replace(target)
                    done.append((source, target))
        except BaseException:
            for source, target in reversed(done):
                target.replace(source)
            raise
        (self.parts / _COMMITTED).touch()


@contextmanager
def claim_folder(folder: Path, *, overwrite: bool, restart: bool = False) -> Iterator[ResultFolder]:
    """Claim `folder` for one run; nobody else can until the block ends.

    If the block does not commit, its finished parts stay, for the same run to go on with, and an earlier
    result does too; all else that it wrote is removed. What a killed run left half-done is cleaned up first.

    Args:
        folder: of one slide's results; made if it is not there.
        overwrite: a complete result may be replaced.
        restart: parts of an earlier try are removed.
    Raises:
        OutputError: it cannot be written, another run uses it, it is complete and `overwrite` is False,
            or it holds files that are no results.
    """
    with translated(folder):
        _check_state(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    try:
        with translated(folder):
            _check_state(folder, overwrite=overwrite)  # another run may have ended meanwhile
            _clear(folder, keeps_parts=not restart)
            claimed = ResultFolder(folder, folder / _PARTS, folder / _PARTS / "built")
            claimed.built.mkdir(parents=True)
        yield claimed
    finally:
        _clear(folder, keeps_parts=any((folder / _PARTS).glob("row-*.parquet")))
        drop_lock(lock)
        if not _is_complete(folder):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a complete folder while something is added to it.

    Raises:
        OutputError: another run uses it, or it cannot be written.
    """
    with translated(folder):
        lock = _lock(folder)
    try:
        remove_drafts(folder)
        yield
    finally:
        drop_lock(lock)


def drop_parts(folder: Path) -> None:
    """Remove from a complete folder what an interrupted --overwrite has left, unless another run is at it."""
    if (folder / _PARTS).exists():
        with suppress(OutputError), hold_folder(folder):  # nobody needs it gone
            _clear(folder, keeps_parts=False)


def _is_complete(folder: Path) -> bool:
    return (folder / RUN_FILE).exists()


def _check_state(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if _is_complete(folder):
        if not overwrite:
            raise OutputError(
                "holds a complete result", where=folder, fix="pass --overwrite or choose another --out"
            )
        return
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(_OF_SYSTEMS)}
    is_ours = _PARTS in names  # else what has the names of results is somebody's own
    foreign = sorted(names - {_PARTS, _LOCK} - (set(_RESULTS) if is_ours else set()))
    if foreign:
        raise OutputError(
            f"holds files that are no results, such as {foreign[0]}", where=folder, fix="choose another --out"
        )


def _lock(folder: Path) -> FileLock:
    try:
        lock = take_lock(folder / _LOCK, wait_s=0)
    except Timeout as err:
        raise OutputError(
            "is in use by another run", where=folder, fix="wait for it or choose another --out"
        ) from err
    if lock is None:
        with suppress(OSError):  # it is empty where we made it
            folder.rmdir()
        raise OutputError("is on a disk without locks", where=folder, fix="choose another --out")
    return lock


def take_lock(path: Path, *, wait_s: float) -> FileLock | None:
    """Return the lock of that name, held; None on a disk without locks.

    Raises:
        Timeout: another process has it, `wait_s` later too.
        OSError: its file cannot be made.
    """
    # where flock is missing, filelock >= 4 takes a file for a lock: one of a killed run stays for ever
    native: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    lock = FileLock(path, timeout=wait_s, **native)
    try:
        lock.acquire()
    except NotImplementedError:  # so earlier versions say it
        pass
    except OSError as err:
        if err.errno not in _WITHOUT_LOCKS:
            raise
    else:
        return lock
    path.unlink(missing_ok=True)
    return None


def drop_lock(lock: FileLock) -> None:
    """Release a lock and remove its file, of which nobody must get hold in between."""
    if os.name == "nt":  # where no open file can be removed, that of another who has it by then included
        lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _clear(folder: Path, *, keeps_parts: bool) -> None:
    """Remove what is half-done, and without run.json the outputs too; never a file that no run writes."""
    parts = folder / _PARTS
    if keeps_parts and not (parts / _COMMITTED).exists():
        shutil.rmtree(parts / "built", ignore_errors=True)
        remove_drafts(parts)
    else:
        shutil.rmtree(parts, ignore_errors=True)
    if _is_complete(folder):
        return
    for name in _RESULTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)
