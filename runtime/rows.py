"""One row of tiles, found and measured: the unit of work, the same for one process and for many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import pyarrow as pa

from darcnn.runtime.errors import DamagedPixelsError
from darcnn.runtime.ground import Ground
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import Window
from darcnn.runtime.measure import measure_on_slide
from darcnn.runtime.parts import empty_part, with_tile
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.readers.protocol import Reader
from darcnn.runtime.readers.recent import RecentReader
from darcnn.runtime.seams import lies_near_seam
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.tiling import Tile

__all__ = ["FoundRow", "Row", "RowRunner", "SlideTask", "find_row", "find_rows_here", "plan_rows"]


@dataclass(frozen=True, slots=True)
class Row:
    """The tiles of one row of the lattice that are looked at, perhaps none."""

    number: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class SlideTask:
    """What all rows of one slide share."""

    plan: SlidePlan
    window: Window
    mpp: tuple[float, float] | None  # micrometres per level-0 pixel (x, y)


@dataclass(frozen=True, slots=True)
class FoundRow:
    """What was found in a row: the part of `darcnn.runtime.parts`, and how long it took."""

    number: int
    table: pa.Table
    seconds: dict[str, float]  # by stage
    unreadable: tuple[int, ...]  # tiles whose pixels are damaged: nothing was found in them


class RowRunner(Protocol):
    """Finds the objects of rows, here or elsewhere, in any order."""

    def __call__(
        self,
        segmenter: Segmenter,
        reader: Reader,
        task: SlideTask,
        rows: Sequence[Row],
        advance: Callable[[int, int], None],
    ) -> Iterator[FoundRow]:
        """Yield each of `rows` once, found; `advance` is told of tiles done and objects reported."""
        ...


def plan_rows(plan: SlidePlan, ground: Ground) -> tuple[Row, ...]:
    """Return the rows of the lattice, each with its tiles that lie on the ground.

    No engine call spans two rows: what goes into one depends on the slide and the ground, not on where a run
    was stopped or which process computes it.
    """
    chosen = {tile.index for tile in ground.tiles}
    rows = groupby(plan.tiles, key=lambda tile: tile.core.y0)
    return tuple(
        Row(number, tuple(tile for tile in tiles if tile.index in chosen))
        for number, (_, tiles) in enumerate(rows)
    )


def find_row(
    segmenter: Segmenter,
    reader: Reader,
    task: SlideTask,
    row: Row,
    advance: Callable[[int, int], None] = lambda tiles, objects: None,
) -> FoundRow:
    """Return the measured objects of a row of tiles, in the order of the lattice.

    A tile that is damaged, or damaged where its objects are measured, holds none and is named.

    Raises:
        InputError: the slide cannot be read any more.
    """
    tables = [empty_part(reader.info.channel_names)]
    unreadable = {tile.index for tile in row.tiles}
    detect = measure = 0.0
    start = time.perf_counter()
    recent = RecentReader(reader)  # objects are measured on the pixels on which they were found
    stream = segmenter.stream(recent, task.plan, tiles=row.tiles, window=task.window, skips_damaged=True)
    for tile, instances in stream:
        found = time.perf_counter()
        with suppress(DamagedPixelsError):
            tables.append(_measure_tile(tile, instances, recent, task))
            unreadable.remove(tile.index)
            advance(1, len(instances))
        detect += found - start
        start = time.perf_counter()
        measure += start - found
    if unreadable:
        advance(len(unreadable), 0)
    seconds = {"detect": detect, "measure": measure}
    return FoundRow(row.number, pa.concat_tables(tables), seconds, tuple(sorted(unreadable)))


def find_rows_here(
    segmenter: Segmenter,
    reader: Reader,
    task: SlideTask,
    rows: Sequence[Row],
    advance: Callable[[int, int], None],
) -> Iterator[FoundRow]:
    """Find rows in this process, one after another: the `RowRunner` of a single machine."""
    for row in rows:
        yield find_row(segmenter, reader, task, row, advance)


def _measure_tile(tile: Tile, instances: Instances, reader: Reader, task: SlideTask) -> pa.Table:
    """Measure the objects of one tile, for its part file."""
    plan = task.plan
    near = lies_near_seam(tile, instances.boxes, factor=plan.factor, extent=(plan.width, plan.height))
    table = measure_on_slide(instances, reader, plan.level, task.mpp)
    return with_tile(table, tile.index, near, is_saturated=instances.is_saturated)
