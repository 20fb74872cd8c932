"""A series as the Cell Tracking Challenge has it: a mask a time point, and a table of tracks without gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from darcnn.runtime.sinks.atomic import atomic_folder
from darcnn.runtime.sinks.labels_tiff import label_planes

__all__ = ["write_ctc"]

_FEWEST_DIGITS = 3  # of the number of a time point in the name of its mask


def write_ctc(path: Path, labels: Path, parents: Mapping[int, int]) -> None:
    """Write the labels of a series as `mask000.tif` ... and `res_track.txt` (label, first, last, parent).

    File formats of the Cell Tracking Challenge (celltrackingchallenge.net, "Annotations, submissions"). There
    a track is on each mask from its first to its last: an object that is missed at a time point, or hidden
    there, goes on as a track of its own whose parent is the earlier one. Such tracks have numbers above all
    `id`; the first part of an object has its `id`. Masks are uint16, uint32 where there are more tracks.

    Args:
        path: folder to write; must not exist.
        labels: of the series (labels.ome.zarr), t y x.
        parents: `id` of an object to that of the one that divided into it and another, where one did.
    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    array = zarr.open_array(labels / "0", mode="r")
    seen = [np.unique(plane[plane > 0]) for plane in label_planes(array)]
    tracks = _cut_at_gaps(seen, parents)
    last = max((track.label for track in tracks), default=0)
    dtype = np.uint16 if last <= np.iinfo(np.uint16).max else np.uint32
    n_digits = max(_FEWEST_DIGITS, len(str(len(seen) - 1)))
    starts: dict[int, list[_Track]] = {}
    for track in tracks:
        starts.setdefault(track.first, []).append(track)
    label_of = np.zeros(max((int(ids[-1]) for ids in seen if ids.size), default=0) + 1, dtype)
    with atomic_folder(path) as folder:
        for t, plane in enumerate(label_planes(array)):
            for track in starts.get(t, []):
                label_of[track.number] = track.label
            tifffile.imwrite(
                folder / f"mask{t:0{n_digits}}.tif",
                label_of[plane],
                compression="zlib",
                photometric="minisblack",  # else a picture three pixels wide is one of colours
                metadata=None,
            )
        rows = (f"{track.label} {track.first} {track.last} {track.parent}\n" for track in tracks)
        (folder / "res_track.txt").write_text("".join(rows), encoding="ascii")


@dataclass(slots=True)
class _Track:
    """An object from a time point to another, on every mask between them."""

    number: int  # `id` of the object
    label: int
    first: int
    last: int
    parent: int  # label, 0: none


def _cut_at_gaps(seen: Sequence[NDArray[np.integer]], parents: Mapping[int, int]) -> list[_Track]:
    """Return the tracks in the order of their labels; `seen` are the objects of each time point."""
    latest: dict[int, _Track] = {}
    tracks: list[_Track] = []
    beyond = max((int(ids[-1]) for ids in seen if ids.size), default=0) + 1
    for t, ids in enumerate(seen):
        for number in ids.tolist():
            before = latest.get(number)
            if before is not None and before.last == t - 1:
                before.last = t
                continue
            if before is None:
                mother = latest.get(parents.get(number, 0))
                label, parent = number, 0 if mother is None else mother.label
            else:
                label, parent, beyond = beyond, before.label, beyond + 1
            latest[number] = _Track(number, label, t, t, parent)
            tracks.append(latest[number])
    return sorted(tracks, key=lambda track: track.label)
