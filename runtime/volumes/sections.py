"""What was found on the planes of a volume: one row an object and plane, kept in part files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.instances import Instances

__all__ = [
    "Section",
    "common_pixels",
    "cut_mask",
    "pack_mask",
    "read_sections",
    "sections_of",
    "to_table",
    "trimmed",
    "unpack_mask",
]

_SCHEMA = pa.schema(
    [
        ("plane", pa.int32()),
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("score", pa.float32()),
        ("truncated", pa.bool_()),
        ("mask", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """An object on one plane. `mask` (h, w) is a crop whose first pixel lies in column `x`, row `y`."""

    plane: int
    x: int
    y: int
    mask: NDArray[np.bool_]
    score: float
    truncated: bool  # the object goes on where a tile or the plane ended

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.mask))


def sections_of(instances: Instances, plane: int) -> list[Section]:
    """Return the objects found on plane number `plane`."""
    height, width = instances.shape
    found = []
    for (x, y), mask, score, truncated in zip(
        instances.origins.tolist(),
        instances.masks,
        instances.scores.tolist(),
        instances.truncated.tolist(),
        strict=True,
    ):
        h, w = mask.shape
        is_cut = truncated or x == 0 or y == 0 or x + w == width or y + h == height
        found.append(Section(plane, x, y, mask, score, is_cut))
    return found


def cut_mask(
    mask: NDArray[np.bool_], origin: Sequence[int], middles: NDArray[np.float64]
) -> list[NDArray[np.bool_]]:
    """Return the parts of a mask that are nearest to each of some places; a place may have none.

    Args:
        mask: (h, w) or (d, h, w).
        origin: the place of its first pixel or voxel.
        middles: (N, 2) or (N, 3), in the order of the axes.
    """
    inside = np.argwhere(mask)  # (P, 2) or (P, 3)
    nearest = ((inside[:, None] + np.array(origin) - middles) ** 2).sum(axis=2).argmin(axis=1)
    parts = []
    for number in range(len(middles)):
        own = inside[nearest == number]
        if len(own):
            part = np.zeros_like(mask)
            part[tuple(own.T)] = True
            parts.append(part)
    return parts


def common_pixels(one: Section, other: Section) -> NDArray[np.bool_]:
    """Return which pixels of `one`, in its crop (h, w), belong to `other` too, whatever their planes."""
    mask = np.zeros_like(one.mask)
    x0, y0 = max(one.x, other.x), max(one.y, other.y)
    x1 = min(one.x + one.mask.shape[1], other.x + other.mask.shape[1])
    y1 = min(one.y + one.mask.shape[0], other.y + other.mask.shape[0])
    if x1 > x0 and y1 > y0:
        mine = (slice(y0 - one.y, y1 - one.y), slice(x0 - one.x, x1 - one.x))
        mask[mine] = one.mask[mine] & other.mask[y0 - other.y : y1 - other.y, x0 - other.x : x1 - other.x]
    return mask


def trimmed(section: Section) -> Section:
    """Return the section without empty borders."""
    rows, columns = np.flatnonzero(section.mask.any(axis=1)), np.flatnonzero(section.mask.any(axis=0))
    mask = section.mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return replace(section, x=section.x + int(columns[0]), y=section.y + int(rows[0]), mask=mask)


def to_table(sections: Sequence[Section]) -> pa.Table:
    """Return sections as a table; `read_sections` gives them back."""
    rows = [
        {
            "plane": one.plane,
            "x": one.x,
            "y": one.y,
            "width": one.mask.shape[1],
            "height": one.mask.shape[0],
            "score": one.score,
            "truncated": one.truncated,
            "mask": pack_mask(one.mask),
        }
        for one in sections
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def read_sections(table: pa.Table) -> list[Section]:
    """Return the sections of a table of `to_table`, in its order."""
    return [
        Section(
            row["plane"],
            row["x"],
            row["y"],
            unpack_mask(row["mask"], (row["height"], row["width"])),
            row["score"],
            row["truncated"],
        )
        for row in table.to_pylist()
    ]


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """Return a mask of any shape as bits."""
    return np.packbits(mask).tobytes()


def unpack_mask(bits: bytes, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the mask of `shape` that `pack_mask` made `bits` of.

    >>> unpack_mask(pack_mask(np.array([[True, False]])), (1, 2))
    array([[ True, False]])
    """
    size = int(np.prod(shape))
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=size).astype(np.bool_).reshape(shape)
