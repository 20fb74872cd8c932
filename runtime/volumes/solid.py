"""Objects of a volume: a box of voxels and which of them belong to the object."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.volumes.matching import Chain
from darcnn.runtime.volumes.sections import Section, common_pixels, pack_mask, unpack_mask
from darcnn.runtime.volumes.volume import AXES, Axis

__all__ = ["Solid", "SolidFile", "common_box", "cropped", "solid_of", "touching", "write_solids"]

_SCHEMA = pa.schema(
    [
        ("z", pa.int32()),
        ("y", pa.int32()),
        ("x", pa.int32()),
        ("depth", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("score", pa.float32()),
        ("truncated", pa.bool_()),
        ("n_planes", pa.int32()),
        ("mask", pa.binary()),
    ]
)
_BATCH = 1024  # solids that are written at once, or fewer
_BATCH_BYTES = 64 << 20  # ... of large ones: tracks of a series are as large as the ground that they cover


@dataclass(frozen=True, slots=True, eq=False)
class Solid:
    """An object of a volume; voxel (k, j, i) of `mask` is voxel `origin` + (k, j, i) of the volume."""

    origin: tuple[int, int, int]  # z y x
    mask: NDArray[np.bool_]  # (d, h, w)
    score: float  # mean over the sections
    truncated: bool  # reaches the edge of the volume (of a series, of its pictures), or of a tile
    n_planes: int  # on which it was found

    @property
    def stop(self) -> tuple[int, int, int]:
        """The first z y x beyond the box."""
        z, y, x = (low + n for low, n in zip(self.origin, self.mask.shape, strict=True))
        return z, y, x


def common_box(one: Solid, other: Solid) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Return the parts of both masks in the box that the solids share, as views; None: they share none."""
    low = np.maximum(one.origin, other.origin)
    high = np.minimum(one.stop, other.stop)
    if (high <= low).any():
        return None
    here, there = (
        solid.mask[tuple(slice(a, b) for a, b in zip(low - solid.origin, high - solid.origin, strict=True))]
        for solid in (one, other)
    )
    return here, there


def cropped(
    origin: tuple[int, int, int], mask: NDArray[np.bool_]
) -> tuple[tuple[int, int, int], NDArray[np.bool_]]:
    """Return origin and mask without the empty planes round what is in the mask, which is not empty."""
    spans = []
    for axis in range(3):
        filled = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        spans.append((int(filled[0]), int(filled[-1]) + 1))
    z, y, x = (start + span[0] for start, span in zip(origin, spans, strict=True))
    return (z, y, x), np.ascontiguousarray(mask[tuple(slice(*span) for span in spans)])


def touching(one: SolidFile, other: SolidFile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers (P,) of the solids of both files whose boxes share more than a face along z."""
    if not len(one) or not len(other):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    theirs, ours = shapely.STRtree(one._footprints()).query(other._footprints(), predicate="intersects")
    a, b = one.boxes[ours], other.boxes[theirs]
    near = (a[:, 0] < b[:, 3]) & (b[:, 0] < a[:, 3])
    return ours[near], theirs[near]


def solid_of(chain: Chain, *, axis: Axis, n_planes: int, is_series: bool = False) -> Solid:
    """Return the object of a chain of sections across `axis`, of a volume with `n_planes` planes there.

    On a plane where it was missed the object has the pixels that it has on both planes beside; at a time
    point of a series it has none, for it may have been anywhere.
    """
    filled = list(chain if is_series else _without_gaps(chain))
    x0, y0 = min(one.x for one in filled), min(one.y for one in filled)
    x1 = max(one.x + one.mask.shape[1] for one in filled)
    y1 = max(one.y + one.mask.shape[0] for one in filled)
    first = filled[0].plane
    mask = np.zeros((filled[-1].plane - first + 1, y1 - y0, x1 - x0), np.bool_)
    for one in filled:
        h, w = one.mask.shape
        mask[one.plane - first, one.y - y0 : one.y - y0 + h, one.x - x0 : one.x - x0 + w] = one.mask
    areas = np.array([one.area_px for one in chain], np.float64)
    which = AXES.index(axis)
    origin = [y0, x0]
    origin.insert(which, first)
    is_cut = any(one.truncated for one in chain)
    if not is_series:
        is_cut = is_cut or first == 0 or filled[-1].plane == n_planes - 1
    return Solid(
        origin=(origin[0], origin[1], origin[2]),
        mask=np.ascontiguousarray(np.moveaxis(mask, 0, which)),
        score=float(np.average([one.score for one in chain], weights=areas)),
        truncated=is_cut,
        n_planes=len(chain),
    )


def _without_gaps(chain: Chain) -> Iterator[Section]:
    for before, after in zip(chain, [*chain[1:], None], strict=True):
        yield before
        if after is not None and after.plane > before.plane + 1:
            both = common_pixels(before, after)
            for plane in range(before.plane + 1, after.plane):
                yield Section(plane, before.x, before.y, both, before.score, False)


def write_solids(path: Path, solids: Iterable[Solid]) -> int:
    """Write solids to a file that `SolidFile` reads, and return their number.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    n_written = n_bytes = 0
    with atomic_file(path) as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        rows: list[dict[str, object]] = []
        for solid in solids:
            rows.append(_row(solid))
            n_written, n_bytes = n_written + 1, n_bytes + solid.mask.size // 8
            if len(rows) == _BATCH or n_bytes > _BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
                rows, n_bytes = [], 0
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    return n_written


def _row(solid: Solid) -> dict[str, object]:
    (z, y, x), (depth, height, width) = solid.origin, solid.mask.shape
    return {
        "z": z,
        "y": y,
        "x": x,
        "depth": depth,
        "height": height,
        "width": width,
        "score": solid.score,
        "truncated": solid.truncated,
        "n_planes": solid.n_planes,
        "mask": pack_mask(solid.mask),
    }


class SolidFile:
    """Solids on the disk, any of which can be had by its number; a context manager would hold no more.

    `boxes` (N, 6) z0 y0 x0 z1 y1 x1 and `scores` (N,) are in memory, the masks are not.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(os.fsencode(path)) as source:  # as text it would have to be UTF-8
            self._table = pa.ipc.open_file(source).read_all()
        columns = {name: self._table[name].to_numpy() for name in _SCHEMA.names[:7]}
        low = np.stack([columns[name] for name in ("z", "y", "x")], axis=1).reshape(-1, 3)
        size = np.stack([columns[name] for name in ("depth", "height", "width")], axis=1).reshape(-1, 3)
        self.boxes: NDArray[np.int64] = np.concatenate([low, low + size], axis=1).astype(np.int64)
        self.scores: NDArray[np.float32] = columns["score"]

    def __len__(self) -> int:
        return len(self.boxes)

    def _footprints(self) -> NDArray[np.object_]:
        """Return the boxes as seen along z, (N,) polygons."""
        _, y0, x0, _, y1, x1 = self.boxes.T
        boxes: NDArray[np.object_] = shapely.box(x0, y0, x1, y1)
        return boxes

    def __getitem__(self, number: int) -> Solid:
        """Return solid `number`."""
        row = self._table.slice(number, 1).to_pylist()[0]
        shape = (row["depth"], row["height"], row["width"])
        return Solid(
            (row["z"], row["y"], row["x"]),
            unpack_mask(row["mask"], shape),
            row["score"],
            row["truncated"],
            row["n_planes"],
        )

    def planes(self, number: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Return (stop - start, h, w) of the mask of solid `number`; no more is unpacked."""
        _, y0, x0, _, y1, x1 = self.boxes[number].tolist()
        size = (y1 - y0) * (x1 - x0)
        bits = np.frombuffer(self._table["mask"][number].as_buffer(), np.uint8)
        first, last = (start * size) // 8, -(-stop * size // 8)
        flat = np.unpackbits(bits[first:last])[start * size - 8 * first :][: (stop - start) * size]
        return flat.astype(np.bool_).reshape(stop - start, y1 - y0, x1 - x0)

    def __iter__(self) -> Iterator[Solid]:
        return (self[number] for number in range(len(self)))
