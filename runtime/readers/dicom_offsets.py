"""The offset table of a DICOM slide, checked before OpenSlide reads frames by it.

Frames lie one behind the other; libdicom, below OpenSlide, takes the difference of two offsets for the size
of a frame, and ends the process where an offset is not larger than the one before it.
"""

from __future__ import annotations

import mmap
import os
import struct
from itertools import pairwise
from pathlib import Path

from darcnn.runtime.errors import InputError

__all__ = ["check_offsets", "is_dicom"]

_MAGIC_AT, _MAGIC = 128, b"DICM"
# Encapsulated pixels begin so: tag 7FE0,0010, type OB or OW, length undefined, then the item of the table.
_PIXELS = tuple(
    b"\xe0\x7f\x10\x00" + kind + b"\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0" for kind in (b"OB", b"OW")
)
_SERIES = b"\x20\x00\x0e\x00UI"  # tag 0020,000E: the files of one slide have the same
_SEARCHED = 256 * 2**20  # bytes; before the pixels lie descriptions, of each frame a hundred bytes or so


def is_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC


def check_offsets(path: Path) -> None:
    """Look at the offset table of a DICOM file, and of the files beside it that belong to the same slide.

    Raises:
        InputError: an offset is not larger than the one before it, or lies outside of the file.
    """
    series = _check_file(path, None)
    if series is None:
        return
    for other in sorted(path.parent.iterdir()):
        if other != path and other.is_file() and os.access(other, os.R_OK) and is_dicom(other):
            _check_file(other, series)


def _check_file(path: Path, series: bytes | None) -> bytes | None:
    """Check one file, of another series not; return what names its series, None where nothing does."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(_SERIES, 0, _SEARCHED)
        (n_bytes,) = struct.unpack("<H", content[at + 6 : at + 8].ljust(2, b"\0"))
        found = None if at < 0 else content[at : at + 8 + n_bytes]
        starts = [content.find(mark, 0, _SEARCHED) for mark in _PIXELS]
        start = max(starts)
        if (series is not None and found != series) or start < 0:
            return found
        table_at = start + len(_PIXELS[0]) + 4
        (n_bytes,) = struct.unpack("<I", content[table_at - 4 : table_at].ljust(4, b"\0"))
        table = content[table_at : table_at + n_bytes]
        offsets = struct.unpack(f"<{len(table) // 4}I", table[: len(table) // 4 * 4])
        rises = all(before < after for before, after in pairwise(offsets))
        if len(table) != n_bytes or not rises or max(offsets, default=0) > len(content) - table_at:
            raise InputError(
                "has a damaged table of frames", where=path, fix="copy it again, with the files beside it"
            )
        return found
