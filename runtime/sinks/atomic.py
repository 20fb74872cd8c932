"""Writing so that a name that exists is complete, and so that a full disk is said in one line."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from darcnn.runtime.errors import OutputError

__all__ = ["atomic_file", "atomic_folder", "output_error", "remove_drafts", "translated"]

_FIXES = {
    errno.ENOSPC: ("no space left on the disk", "free some space or choose another --out"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another --out"),
    errno.EACCES: ("no permission to write", "choose a folder you may write to with --out"),
    errno.EPERM: ("no permission to write", "choose a folder you may write to with --out"),
    errno.EROFS: ("the disk is read-only", "choose another --out"),
    errno.ENOTDIR: ("a file stands where a folder is needed", "move the file or choose another --out"),
    errno.EEXIST: ("a file stands where a folder is needed", "move the file or choose another --out"),
    errno.ENAMETOOLONG: ("the name is too long for this disk", "choose a shorter --out"),
}
STALE_SECONDS = 3600  # a draft that old is of a process that was killed: none takes that long
_NAME_CHARACTERS = 50  # of a name that a temporary one has: so the longest, 255 bytes, have one too


def output_error(error: OSError, where: Path) -> OutputError:
    """Return what the user is told when the system refuses to write at `where`.

    >>> str(output_error(OSError(errno.ENOSPC, "No space left on device"), Path("out")))
    'out: no space left on the disk; free some space or choose another --out'
    """
    reason = error.strerror or str(error) or type(error).__name__
    fallback = (f"cannot be written ({reason})", "check the disk or choose another --out")
    problem, fix = _FIXES.get(error.errno or 0, fallback)
    return OutputError(problem, where=where, fix=fix)


@contextmanager
def translated(where: Path) -> Iterator[None]:
    """Turn every OSError of the block into an OutputError that names `where`."""
    try:
        yield
    except OSError as err:
        raise output_error(err, where) from err


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write; it gets the name `path` only if the block ends well, else it is removed."""
    temporary = _temporary(path)
    _remove_stale(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; it gets the name `path` if the block ends well.

    The name must be free, unless `replaces`: then what has it goes when the new folder is whole, not before.
    """
    temporary = _temporary(path)
    _remove_stale(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if replaces and path.exists():
            _swap(temporary, path)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that nobody else writes to, which `remove_drafts` knows."""
    return path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove_stale(path: Path) -> None:
    """Remove drafts of `path` that processes which were killed have left."""
    name = glob.escape(path.name[:_NAME_CHARACTERS])
    remove_drafts(path.parent, f".{name}.*-*.tmp", min_age_s=STALE_SECONDS)


def remove_drafts(folder: Path, pattern: str = ".*.tmp", *, min_age_s: float = 0.0) -> None:
    """Remove what writers that were killed left in `folder` under names of their own.

    Args:
        folder: where; it need not exist.
        pattern: of the names, all drafts by default.
        min_age_s: what is younger stays: another process may be writing it. 0 removes all.
    """
    limit = time.time() - min_age_s
    for draft in folder.glob(pattern):
        with suppress(OSError):  # another process removes it too
            if min_age_s and draft.stat().st_mtime >= limit:
                continue
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink()


def _swap(draft: Path, path: Path) -> None:
    """Give `draft` the name `path`; what has it goes, or gets it back where that fails."""
    earlier = _temporary(path)
    path.replace(earlier)
    os.utime(earlier)  # it is no stale draft
    try:
        draft.replace(path)
    except BaseException:
        with suppress(OSError):  # another process may have put its own there meanwhile
            earlier.replace(path)
        raise
    finally:
        if path.exists():  # else it is all that is left
            shutil.rmtree(earlier, ignore_errors=True)
