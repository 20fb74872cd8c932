"""From the sections of all planes to the objects of a volume: linked, agreed on, cut where they overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.parts import Parts
from darcnn.runtime.volumes.agree import agree
from darcnn.runtime.volumes.find import View, plan_blocks
from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.overlaps import cut_overlaps, cut_sections
from darcnn.runtime.volumes.sections import Section, read_sections
from darcnn.runtime.volumes.solid import SolidFile, solid_of, write_solids
from darcnn.runtime.volumes.volume import AXES, Axis

__all__ = ["join_sections"]

_SLIVER = 0.2  # of the planes of a typical object: what shows in fewer is out of focus, or noise


def join_sections(views: Sequence[View], parts: Parts, folder: Path) -> tuple[SolidFile, dict[str, int]]:
    """Return the objects of all views, in a file in `folder`, and how many each axis has found.

    Args:
        views: how the volume was looked at.
        parts: with the sections of each block of planes.
        folder: for files.
    """
    found: dict[Axis, SolidFile] = {}
    is_series = views[0].stack.volume.info.is_series
    for view in views:
        stack, path = view.stack, folder / f"solids-{view.stack.axis}.arrow"
        planes = _planes(views, view, parts)
        chains = link_sections(
            (cut_sections(plane) for plane in planes) if is_series else planes,
            min_planes=min(stack.n_joined, len(stack)),
            plane_px=stack.plane_px,
            is_series=is_series,
        )
        solids = (
            solid_of(chain, axis=stack.axis, n_planes=len(stack), is_series=is_series) for chain in chains
        )
        write_solids(path, solids)
        found[stack.axis] = SolidFile(path)
    by_axis = {str(axis): len(solids) for axis, solids in found.items()}
    first, *others = found.values()
    if is_series:  # its sections share no pixel already, and a cell may be seen at one time point
        return first, by_axis
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
    return SolidFile(path), by_axis


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
