"""The one exception base of the project and the exit codes of its commands."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_PARTIAL",
    "EXIT_UNUSABLE",
    "BundleError",
    "DamagedPixelsError",
    "DarcnnError",
    "DeviceError",
    "InputError",
    "OutputError",
    "ShapeError",
    "UsageError",
    "without_secrets",
]

EXIT_PARTIAL = 1  # some inputs failed or are damaged, the rest is done
EXIT_UNUSABLE = 2  # nothing usable was made
EXIT_INTERRUPTED = 130  # Ctrl-C, after committing what is finished
# of a URL: user and password, and what comes after the path; in a sentence it may stand in quotes or brackets
_USER, _QUERY = re.compile(r"(?<=://)[^/?#\s]*@"), re.compile(r"(://[^?#]*)[?#][^\s'\")]*")


class DarcnnError(Exception):
    """A failure that a user can act on, printed as one line: `where: problem; fix`, without secrets of URLs.

    >>> str(InputError("no pixel size in the metadata", where="a.tif", fix="pass --mpp 0.25"))
    'a.tif: no pixel size in the metadata; pass --mpp 0.25'
    """

    def __init__(self, problem: str, *, where: str | Path, fix: str) -> None:
        self.problem = without_secrets(_one_line(problem))
        self.where = without_secrets(where)
        self.fix = _one_line(fix)
        super().__init__(f"{self.where}: {self.problem}; {self.fix}")

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments: without this an error cannot cross a process border
        return (_rebuild, (type(self), self.problem, self.where, self.fix))


class UsageError(DarcnnError):
    """An option, a recipe or a combination of them is wrong."""


class InputError(DarcnnError):
    """A slide, picture, volume or annotation cannot be used."""


class DamagedPixelsError(InputError):
    """The pixels of a region are damaged in the file itself; those elsewhere can be read.

    Reading again meets the same damage: no file that vanished, no disk, network or memory that gave way.
    """


class BundleError(DarcnnError):
    """A model bundle cannot be used."""


class DeviceError(DarcnnError):
    """A device, its driver or its memory does not serve."""


class OutputError(DarcnnError):
    """A result cannot be written: disk, permission, existing result."""


class ShapeError(ValueError):
    """An array has the wrong shape or type: a mistake of the calling program."""


def without_secrets(text: str | Path) -> str:
    """Return a path or text, its URLs without what may let others in: user, password and query.

    >>> without_secrets("https://me:secret@a.org/b.zarr?token=1"), without_secrets(Path("a?b"))
    ('https://a.org/b.zarr', 'a?b')
    """
    return _QUERY.sub(r"\1", _USER.sub("", str(text)))


def _rebuild(kind: type[DarcnnError], problem: str, where: str, fix: str) -> DarcnnError:
    return kind(problem, where=where, fix=fix)


def _one_line(text: str) -> str:
    return " ".join(text.split())
