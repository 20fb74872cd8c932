"""From the sections of all planes to the objects of a volume: linked, agreed on, cut where they overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.parts import Parts
from darcnn.runtime.volumes.agree import agree
from darcnn.runtime.volumes.find import View, plan_blocks
from darcnn.runtime.volumes.follow import follow_sections
from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.overlaps import cut_overlaps, cut_sections
from darcnn.runtime.volumes.sections import Section, read_sections
from darcnn.runtime.volumes.solid import Solid, SolidFile, solid_of, write_solids
from darcnn.runtime.volumes.volume import AXES, Axis

__all__ = ["Joined", "join_sections"]

_SLIVER = 0.2  # of the planes of a typical object: what shows in fewer is out of focus, or noise


@dataclass(frozen=True, slots=True)
class Joined:
    """The objects of a volume or series, N of them."""

    solids: SolidFile
    by_axis: Mapping[str, int]  # how many each axis has found
    parents: NDArray[np.int64] | None = None  # (N,) of a series: which object divided into this one; -1: none


def join_sections(views: Sequence[View], parts: Parts, folder: Path) -> Joined:
    """Return the objects of all views, in a file in `folder`.

    Args:
        views: how the volume was looked at.
        parts: with the sections of each block of planes.
        folder: for files.
    """
    if views[0].stack.volume.info.is_series:
        return _follow(views, parts, folder)
    found: dict[Axis, SolidFile] = {}
    for view in views:
        stack, path = view.stack, folder / f"solids-{view.stack.axis}.arrow"
        chains = link_sections(
            _planes(views, view, parts),
            min_planes=min(stack.n_joined, len(stack)),
            plane_px=stack.plane_px,
        )
        write_solids(path, (solid_of(chain, axis=stack.axis, n_planes=len(stack)) for chain in chains))
        found[stack.axis] = SolidFile(path)
    by_axis = {str(axis): len(solids) for axis, solids in found.items()}
    first, *others = found.values()
    stack = views[0].stack
    path = folder / "chosen.arrow"
    if others:
        write_solids(path, agree([first, *others]))
    else:
        rows = np.arange(len(first))
        if stack.axis == "z" and stack.n_joined == 1:  # slabs have a rule of their own
            rows = _find_deep(first, stack.axis, n_planes=len(stack))
        write_solids(path, (first[int(row)] for row in rows))
    chosen = SolidFile(path)
    path = folder / "solids.arrow"
    write_solids(path, cut_overlaps(chosen))
    return Joined(SolidFile(path), by_axis)


def _follow(views: Sequence[View], parts: Parts, folder: Path) -> Joined:
    """Return the objects of a series: they share no pixel, and a cell may be seen at one time point."""
    (view,) = views
    path, n_times = folder / "solids.arrow", len(view.stack)
    rows: dict[int, int] = {}  # of the tracks so far
    parents: list[int] = []

    def solids() -> Iterator[Solid]:
        for track in follow_sections(cut_sections(plane) for plane in _planes(views, view, parts)):
            rows[track.number] = len(parents)
            parents.append(-1 if track.parent is None else rows[track.parent])  # a mother ends first
            yield solid_of(track.sections, axis=view.stack.axis, n_planes=n_times, is_series=True)

    write_solids(path, solids())
    found = SolidFile(path)
    return Joined(found, {str(view.stack.axis): len(found)}, np.array(parents, np.int64))


def _planes(views: Sequence[View], wanted: View, parts: Parts) -> Iterator[list[Section]]:
    """Yield the sections of each plane of one view, from its parts."""
    for block in plan_blocks(views):
        if block.view is wanted:
            planes: list[list[Section]] = [[] for _ in range(block.start, block.stop)]
            for section in read_sections(parts.load(block.number)):
                planes[section.plane - block.start].append(section)
            yield from planes


def _find_deep(solids: SolidFile, axis: Axis, *, n_planes: int) -> NDArray[np.int64]:
    """Return the rows of the objects that are not far fewer planes deep than the typical one.

    Where objects are many planes deep, what shows in one or two is no object of their kind. Those at the ends
    of the volume are cut there, and stay.
    """
    low, high = (solids.boxes[:, AXES.index(axis) + shift].astype(np.int64) for shift in (0, 3))
    depth = high - low
    is_cut = (low == 0) | (high == n_planes)
    whole = depth[~is_cut]
    if not whole.size:
        return np.arange(len(depth))
    return np.flatnonzero(is_cut | (depth >= _SLIVER * np.median(whole)))
