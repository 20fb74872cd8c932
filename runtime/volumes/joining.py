"""From the sections of all planes to the objects of a volume: linked, agreed on, cut where they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.parts import Parts
from darcnn.runtime.volumes.agree import Agreement, agree, cut_merged
from darcnn.runtime.volumes.find import View, plan_blocks
from darcnn.runtime.volumes.follow import follow_sections
from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.overlaps import cut_overlaps, cut_sections
from darcnn.runtime.volumes.sections import Section, read_sections
from darcnn.runtime.volumes.solid import Solid, SolidFile, solid_of, write_solids
from darcnn.runtime.volumes.stack import Stack
from darcnn.runtime.volumes.volume import AXES, Axis

__all__ = ["Joined", "join_sections"]

_SLIVER = 0.2  # of the planes of a typical object: what shows in fewer is out of focus, or noise


@dataclass(frozen=True, slots=True)
class Joined:
    """The objects of a volume or series, N of them."""

    solids: SolidFile
    agreement: Agreement
    parents: NDArray[np.int64] | None = None  # (N,) of a series: which object divided into this one; -1: none


def join_sections(
    views: Sequence[View], parts: Parts, folder: Path, *, may_be_of_one: bool = False
) -> Joined:
    """Return the objects of all views, in a file in `folder`.

    Args:
        views: how the volume was looked at.
        parts: with the sections of each block of planes.
        folder: for files.
        may_be_of_one: where two axes agree on few, the objects are those of the first axis: in much noise
            each misses others, and what two have found is less than what one has.
    """
    if views[0].stack.volume.info.is_series:
        return _follow(views, parts, folder)
    found = [_link(views, view, parts, folder) for view in views]
    agreement = Agreement({view.stack.axis: len(solids) for view, solids in zip(views, found, strict=True)})
    if len(found) > 1:
        pieces = _cut_views(found, folder)
        chosen = _write(folder / "agreed.arrow", agree(pieces))
        agreement = replace(agreement, n_agreed=len(chosen))
        if may_be_of_one and agreement.is_little and len(pieces[0]) > len(chosen):
            agreement = replace(agreement, is_of_one=True)
            chosen = _without_slivers(pieces[0], views[0].stack, folder)
    else:
        chosen = _without_slivers(found[0], views[0].stack, folder)
    return Joined(_write(folder / "solids.arrow", cut_overlaps(chosen)), agreement)


def _link(views: Sequence[View], view: View, parts: Parts, folder: Path) -> SolidFile:
    """Return the objects that one axis has found."""
    stack = view.stack
    chains = link_sections(
        _planes(views, view, parts),
        min_planes=min(stack.n_joined, len(stack)),
        plane_px=stack.plane_px,
    )
    solids = (solid_of(chain, axis=stack.axis, n_planes=len(stack)) for chain in chains)
    return _write(folder / f"solids-{stack.axis}.arrow", solids)


def _without_slivers(found: SolidFile, stack: Stack, folder: Path) -> SolidFile:
    """Return what one axis has found, of light microscopy without haze; slabs have a rule of their own."""
    if stack.axis != "z" or stack.n_joined > 1:
        return found
    rows = _find_deep(found, stack.axis, n_planes=len(stack))
    return _write(folder / "deep.arrow", (found[int(row)] for row in rows))


def _write(path: Path, solids: Iterable[Solid]) -> SolidFile:
    write_solids(path, solids)
    return SolidFile(path)


def _cut_views(found: Sequence[SolidFile], folder: Path) -> list[SolidFile]:
    """Return what each axis has found without merged objects, in files in `folder`."""
    return [
        _write(folder / f"pieces-{number}.arrow", cut_merged(found, number)) for number in range(len(found))
    ]


def _follow(views: Sequence[View], parts: Parts, folder: Path) -> Joined:
    """Return the objects of a series: they share no pixel, and a cell may be seen at one time point."""
    (view,) = views
    n_times = len(view.stack)
    rows: dict[int, int] = {}  # of the tracks so far
    parents: list[int] = []

    def solids() -> Iterator[Solid]:
        for track in follow_sections(cut_sections(plane) for plane in _planes(views, view, parts)):
            rows[track.number] = len(parents)
            parents.append(-1 if track.parent is None else rows[track.parent])  # a mother ends first
            yield solid_of(track.sections, axis=view.stack.axis, n_planes=n_times, is_series=True)

    found = _write(folder / "solids.arrow", solids())
    return Joined(found, Agreement({view.stack.axis: len(found)}), np.array(parents, np.int64))


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
