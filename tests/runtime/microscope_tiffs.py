"""Writes LSM and STK files as Zeiss' and MetaMorph's programs do (after what tifffile reads), for tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

_MAGIC = 67127628  # of the structure of an LSM
_SIZE = 500  # and its bytes
_SCAN_TYPES = {"ZCYX": 0, "TCYX": 3, "TZCYX": 6}
_FIELDS = tifffile.TIFF.CZ_LSMINFO  # names and types, in their order


def write_lsm(
    path: Path,
    values: np.ndarray,
    axes: str,
    *,
    voxel_m: tuple[float, float, float] = (0.0, 0.0, 0.0),
    names: Sequence[str] = (),
    times_s: Sequence[float] = (),
    n_positions: int = 0,
) -> Path:
    """Write `values` of `axes` (ZCYX, TCYX or TZCYX), uint8 or uint16; after each page lies its thumbnail."""
    sizes = dict(zip(axes, values.shape, strict=True))
    facts = np.zeros((), np.dtype([(name or "reserved", kind) for name, kind in _FIELDS]))
    facts["MagicNumber"], facts["StructureSize"] = _MAGIC, _SIZE
    for axis, name in (("X", "X"), ("Y", "Y"), ("Z", "Z"), ("C", "Channels"), ("T", "Time")):
        facts[f"Dimension{name}"] = sizes.get(axis, 1)
    facts["DimensionP"] = n_positions
    facts["ScanType"] = _SCAN_TYPES[axes]
    for axis, size in zip("XYZ", voxel_m, strict=True):
        facts[f"VoxelSize{axis}"] = size
    pages = values.reshape(-1, *values.shape[-3:])  # of all channels
    blank = bytes(facts).ljust(_SIZE, b"\0")
    with tifffile.TiffWriter(path, byteorder="<") as file:
        for number, page in enumerate(pages):
            tag = [(34412, 1, _SIZE, blank, True)] if number == 0 else []
            is_alone = len(page) == 1
            file.write(
                page[0] if is_alone else page,
                photometric="minisblack",
                planarconfig=None if is_alone else "separate",
                metadata=None,
                extratags=tag,
            )
            thumbnail = np.zeros((3, 16, 16), np.uint8)
            file.write(thumbnail, photometric="rgb", planarconfig="separate", metadata=None, subfiletype=1)
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<II", _MAGIC, _SIZE))
    if names:
        facts["OffsetChannelColors"] = len(content)
        content += _colours(names)
    if times_s:
        facts["OffsetTimeStamps"] = len(content)
        content += struct.pack(f"<ii{len(times_s)}d", 8 + 8 * len(times_s), len(times_s), *times_s)
    content[place : place + _SIZE] = bytes(facts).ljust(_SIZE, b"\0")
    path.write_bytes(content)
    return path


def _text(words: str) -> bytes:
    return struct.pack("<I", len(words) + 1) + words.encode() + b"\0"


def _colours(names: Sequence[str]) -> bytes:
    listed = b"".join(map(_text, names))
    colours = bytes(4 * len(names))
    begin = 24 + len(colours)
    return struct.pack("<6I", begin + len(listed), len(names), len(names), 24, begin, 0) + colours + listed


def write_stk(
    path: Path,
    planes: np.ndarray,
    *,
    size: float,
    unit: str,
    distances: Sequence[float],
    times_ms: Sequence[int],
) -> Path:
    """Write (N, H, W) planes, of which the file's only directory lists the first; `size` of a pixel."""
    tags = [(33628, 4, 4, (0,) * 4, True), (33629, 5, 1, (0, 1), True)]  # UIC1Tag and UIC2Tag
    with tifffile.TiffWriter(path, byteorder="<") as file:
        file.write(planes[0], photometric="minisblack", metadata=None, extratags=tags)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        entries = {code: tiff.pages.first.tags[code].offset for code in (33628, 33629)}
    content += planes[1:].tobytes()

    def put(code: int, count: int, values: bytes) -> None:
        struct.pack_into("<II", content, entries[code] + 4, count, len(content))
        content.extend(values)

    ratio, words = len(content), len(content) + 8
    content += struct.pack("<2I", round(size * 1000), 1000) + _text(unit)
    # spatial calibration, x, y, units
    put(33628, 4, struct.pack("<8I", 3, 1, 4, ratio, 5, ratio, 6, words))
    rows = zip(distances, times_ms, strict=True)
    put(
        33629,
        len(planes),
        b"".join(struct.pack("<6I", round(z * 1000), 1000, 2459000, ms, 2459000, ms) for z, ms in rows),
    )
    path.write_bytes(content)
    return path
