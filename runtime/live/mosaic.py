"""Fields of view that make one picture: each object once, as soon as nothing can change it any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.instances import Instances
from darcnn.runtime.live.calibration import Calibrator
from darcnn.runtime.live.frames import check_frame, view_frame
from darcnn.runtime.live.mosaic_grid import MosaicGrid, MosaicReader
from darcnn.runtime.live.settling import SeamSettler
from darcnn.runtime.live.ticket import Ticket
from darcnn.runtime.live.work import Work, in_words_of_push
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sampling import SampledTile, TileSampler
from darcnn.runtime.second_look import widen
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.tiling import Tile

__all__ = ["Mosaic"]


class Mosaic:
    """Takes the fields of one grid in any order; their results hold the objects that became certain.

    The mosaic is segmented on the tile lattice of the whole picture: a tile as soon as the fields that it
    looks at are in, an object as soon as all tiles that could report it too are done. Together the results
    of all fields and of `finish` are what a segmenter finds on the stitched picture with the same
    calibration. A field is held until the last tile that looks at it is done.
    """

    def __init__(self, grid: MosaicGrid, put: Callable[[Callable[[Ticket], Work], Hashable], Ticket]) -> None:
        """Begin a mosaic; `LiveSegmenter.mosaic` does so."""
        self.grid = grid
        self._put = put
        self._canvas = _Canvas(grid)

    def push(
        self, field: Any, *, at_um: tuple[float, float], key: Hashable = None, copy: bool = True
    ) -> Ticket:
        """Queue one field of view; its result holds the objects that are certain now, mosaic pixels.

        A field that the queue's policy drops can be pushed again. A tile on which the engine fails fails the
        field that made it ready, and counts as empty.

        Args:
            field: as `LiveSegmenter.push` takes it, of the size that the grid says, all of one type.
            at_um: the stage's position (x, y); the nearest of the grid is meant.
            key: what the result calls it; None for its number.
            copy: False keeps the array itself: it must not change until the mosaic is finished.
        Raises:
            UsageError: no position of the grid is near, or the segmenter takes no more frames.
        """
        start = time.perf_counter()
        index = self.grid.find(at_um)

        def make(ticket: Ticket) -> Work:
            array, is_copy = view_frame(field)
            check_frame(array)
            if array.shape[:2] != self.grid.field_px:
                raise InputError(
                    f"is {array.shape[0]} x {array.shape[1]} px, the grid says "
                    f"{self.grid.field_px[0]} x {self.grid.field_px[1]}",
                    where="field",
                    fix="push fields of the grid's size",
                )
            # not of the pool: how long it is held depends on which fields come next
            held = np.array(array) if copy and not is_copy else array
            return _FieldWork(ticket, self._canvas, {index: held}, pushed_at=start)

        return self._put(make, key)

    def finish(self, *, key: Hashable = "finish") -> Ticket:
        """Take fields that are missing to be black; the result holds all objects that were not certain yet.

        If it fails or is dropped, call it again.

        Raises:
            UsageError: the segmenter takes no more frames.
        """
        start = time.perf_counter()
        return self._put(lambda ticket: _FieldWork(ticket, self._canvas, None, pushed_at=start), key)


class _Canvas:
    """What is known of a mosaic; the worker alone works on it."""

    def __init__(self, grid: MosaicGrid) -> None:
        self._grid = grid
        self._missing = set(range(len(grid)))
        self._early: dict[int, NDArray[Any]] = {}  # fields that wait for one that tells how to look at them
        self._reader: MosaicReader | None = None
        self._plan: SlidePlan | None = None
        self._sampler: TileSampler | None = None
        self._settler: SeamSettler | None = None
        self._todo: dict[int, Tile] = {}  # tiles not done
        self._looked_at: dict[int, set[int]] = {}  # of those -> fields that it, or a second look, looks at
        self._is_finished = False
        self._ready: list[Tile] = []
        self._found: list[tuple[Tile, Instances]] = []  # of fields that failed later on

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the mosaic."""
        return self._grid.shape

    @property
    def pixel_size_um(self) -> float:
        """Micrometres per pixel of the mosaic."""
        return self._grid.pixel_size_um

    def add(self, field: NDArray[Any], index: int, segmenter: Segmenter, calibrator: Calibrator) -> None:
        """Put a field in its place.

        Raises:
            InputError: it is in already, or of another type or number of channels than the first.
        """
        if self._is_finished:
            raise InputError("comes after `finish`", where="field", fix="begin another mosaic")
        if index not in self._missing:
            raise InputError("is in already", where="field", fix="push each position of the grid once")
        if self._reader is None:
            self._reader = MosaicReader(self._grid, field)
        self._reader.add(index, field)
        try:
            if self._plan is None:
                self._begin(field, segmenter, calibrator, must=False)
        except BaseException:  # it may come again, and no other field pays for it
            self._reader.keep(set(self._early))
            self._reader = self._reader if self._early else None
            raise
        self._early[index] = field
        self._missing.remove(index)
        self._take_early()

    def give_up_missing(self, segmenter: Segmenter, calibrator: Calibrator) -> None:
        """Go on as if the fields that are missing were black."""
        if self._plan is None and self._early:
            self._begin(next(iter(self._early.values())), segmenter, calibrator, must=True)
            self._take_early()
        self._is_finished = True
        if self._sampler is not None:
            seen = self._sampler
            self._pass_over(
                index
                for index, tile in self._todo.items()
                if self._grid.covering(seen.source(tile)) <= self._missing
            )
        self._arrive(set(self._missing))

    def take_ready(self) -> list[Tile]:
        """Return the tiles that can be computed, and forget them."""
        ready, self._ready = self._ready, []
        return ready

    def put_back(self, tiles: Sequence[Tile], found: Sequence[tuple[Tile, Instances]]) -> None:
        """Keep for the next field what a field that failed leaves undone, and what it found."""
        self._ready.extend(tiles)
        self._found.extend(found)

    def read(self, tile: Tile) -> SampledTile:
        """Return a ready tile with its pixels."""
        assert self._plan is not None  # there are tiles
        assert self._sampler is not None
        return SampledTile(self._plan, self._grid.shape, tile, self._sampler.read(tile), self._sampler)

    def settle(self, found: Sequence[tuple[Tile, Instances]]) -> Instances:
        """Note that tiles are done; return the objects that are certain now."""
        kept, self._found = self._found, []
        if self._settler is None:
            return Instances.empty(self._grid.shape)
        certain = self._settler.add([*kept, *found])
        for tile, _ in (*kept, *found):
            self._forget(tile.index)
        in_use: set[int] = set().union(*self._looked_at.values())
        assert self._reader is not None  # there is a settler
        self._reader.keep(in_use)
        return certain

    def _begin(
        self, field: NDArray[Any], segmenter: Segmenter, calibrator: Calibrator, *, must: bool
    ) -> None:
        """Plan the mosaic by a field, if that tells how or it `must` be; the others wait until one does."""
        reader, size = self._reader, self._grid.pixel_size_um
        assert reader is not None  # made of the first field
        with ArrayReader(field, mpp=size) as first:
            calibration, is_sure = calibrator.settle(segmenter, first, field.dtype, renew=False)
            if not (is_sure or must):
                return
            plan = calibrator.plan(segmenter, reader, calibration)
            window = calibrator.window(segmenter, first, plan, calibration)  # nothing else is there yet
        sampler = segmenter.sampler(reader, plan, window)
        covering = self._grid.covering
        self._settler = SeamSettler(plan, self._grid.shape)
        self._plan, self._sampler = plan, sampler
        self._todo = {tile.index: tile for tile in plan.tiles}
        self._pass_over(tile.index for tile in plan.tiles if not covering(sampler.source(tile)))  # in a gap
        self._looked_at = {index: covering(sampler.source(widen(tile))) for index, tile in self._todo.items()}

    def _take_early(self) -> None:
        """Let the fields that waited for a plan be looked at, once there is one."""
        if self._plan is not None:
            early, self._early = set(self._early), {}
            self._arrive(early)

    def _arrive(self, fields: set[int]) -> None:
        self._missing -= fields
        for index, tile in self._todo.items():
            looked_at = self._looked_at[index]
            if looked_at & fields and not looked_at & self._missing:
                self._ready.append(tile)

    def _pass_over(self, tiles: Iterable[int]) -> None:
        """Note that tiles see nothing but black."""
        black = list(tiles)
        if self._settler is not None:
            self._settler.pass_over(black)
        for index in black:
            self._forget(index)

    def _forget(self, index: int) -> None:
        self._todo.pop(index, None)
        self._looked_at.pop(index, None)


class _FieldWork(Work):
    """A field on its way to the canvas; None: what was not pushed will not come."""

    def __init__(
        self, ticket: Ticket, canvas: _Canvas, fields: dict[int, NDArray[Any]] | None, *, pushed_at: float
    ) -> None:
        super().__init__(ticket, pushed_at=pushed_at)
        self._canvas = canvas
        self._fields = fields
        self._taken: list[Tile] = []

    @property
    def pixel_size_um(self) -> float:
        return self._canvas.pixel_size_um

    def open(self, segmenter: Segmenter, calibrator: Calibrator) -> None:
        with in_words_of_push(self.ticket):
            if self._fields is None:
                self._canvas.give_up_missing(segmenter, calibrator)
            for index, field in (self._fields or {}).items():
                self._canvas.add(field, index, segmenter, calibrator)
        self._taken = self._canvas.take_ready()
        self.tiles.extend(self._taken)
        self.n_tiles = len(self.tiles)

    def read(self, tile: Tile) -> SampledTile:
        return self._canvas.read(tile)

    def join(self) -> Instances:
        return self._canvas.settle(self.found)

    def fail(self, error: Exception) -> None:
        # The tile that failed is given up, and counts as done without objects; the rest is for the next.
        left = list(self.tiles)
        super().fail(error)
        done = {tile.index for tile, _ in self.found} | {tile.index for tile in left}
        nothing = Instances.empty(self._canvas.shape)
        lost = [(tile, nothing) for tile in self._taken if tile.index not in done]
        self._canvas.put_back(left, [*self.found, *lost])
        self.found, self._taken = [], []

    def release(self) -> None:
        self._fields = None
