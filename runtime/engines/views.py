"""Each tile seen from several sides: what at least half of the views find, with the mean of their masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.boxes import non_maximum_suppression, pairwise_iou
from darcnn.runtime.engines.protocol import Detections, Engine, EngineSpec
from darcnn.runtime.errors import UsageError
from darcnn.runtime.manifest import Limits
from darcnn.runtime.options import N_VIEWS

__all__ = ["View", "ViewsEngine", "check_views", "choose_views", "look_from_sides", "vote"]

# A tile as it is; mirrored at one diagonal; turned by half and mirrored at the other diagonal.
_VIEWS = ((0, False), (1, True), (2, False), (3, True))  # quarter turns, mirrored first

_TINY = np.float32(1e-30)
_SAME_IOU = 0.6  # findings of two views whose boxes overlap so far are one object: a half has 0.5 of both


@dataclass(frozen=True, slots=True)
class View:
    """One way to see a square tile: mirrored left to right, then turned anticlockwise by quarters."""

    quarters: int  # 0 to 3
    is_mirrored: bool

    def tiles(self, tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return (B, S, S, C) tiles as they are seen."""
        mirrored = tiles[:, :, ::-1] if self.is_mirrored else tiles
        return np.ascontiguousarray(np.rot90(mirrored, self.quarters, axes=(1, 2)))

    def boxes(self, boxes: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
        """Return (N, 4) boxes x0 y0 x1 y1 of a tile as they lie in what is seen of it."""
        mirrored = _mirror(boxes, side_px) if self.is_mirrored else boxes
        return _turn(mirrored, self.quarters, side_px)

    def boxes_back(self, boxes: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
        """Return (N, 4) boxes seen as they lie in the tile: `boxes` undone."""
        turned = _turn(boxes, -self.quarters % 4, side_px)
        return _mirror(turned, side_px) if self.is_mirrored else turned

    def masks_back(self, masks: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (N, m, m) masks of boxes seen as those of the boxes in the tile."""
        turned = np.rot90(masks, -self.quarters, axes=(1, 2))
        return turned[:, :, ::-1] if self.is_mirrored else turned


def check_views(n_views: int) -> None:
    """Raise a UsageError unless there is a set of so many views."""
    if n_views not in N_VIEWS:
        known = ", ".join(map(str, N_VIEWS))
        raise UsageError(f"no set of {n_views} views", where="--views", fix=f"pass one of {known}")


def choose_views(n_views: int) -> tuple[View, ...]:
    """Return so many views, the tile as it is first.

    Raises:
        UsageError: there is no such set.
    """
    check_views(n_views)
    return tuple(View(quarters, is_mirrored) for quarters, is_mirrored in _VIEWS[:n_views])


def look_from_sides(engine: Engine, n_views: int, limits: Limits) -> Engine:
    """Return an engine that shows each tile to `engine` in `n_views`; `engine` itself for one.

    Raises:
        UsageError: there is no such set.
    """
    views = choose_views(n_views)
    return engine if n_views == 1 else ViewsEngine(engine, views, nms_threshold=limits.nms_threshold)


class ViewsEngine:
    """An `Engine` that shows each tile to another one from several sides; owns that engine.

    A detector should find the same from whichever side it looks; what it finds from a few only is doubtful.
    The work is that of all views.
    """

    def __init__(self, engine: Engine, views: Sequence[View], *, nms_threshold: float) -> None:
        """Look through `engine`, which suppresses boxes that overlap by more than `nms_threshold`."""
        self._engine = engine
        self._views = tuple(views)
        self._nms_threshold = nms_threshold

    @property
    def spec(self) -> EngineSpec:
        """The static sizes of the engine, and how many views it has."""
        spec = self._engine.spec
        return replace(spec, name=f"{spec.name}, {len(self._views)} views", views=len(self._views))

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        """Find objects on `tiles`, (B, S, S, C) uint8 with exactly B = spec.batch.

        Raises:
            ShapeError: `tiles` has another shape or type.
            DeviceError: memory or the device gave out.
        """
        spec, tiles = self._engine.spec, np.asarray(tiles)
        seen = [self._engine.detect(view.tiles(tiles)) for view in self._views]
        boxes = np.zeros((spec.batch, spec.detections, 4), np.float32)
        scores = np.zeros((spec.batch, spec.detections), np.float32)
        for index in range(spec.batch):
            found = [self._found(view, one, index) for view, one in zip(self._views, seen, strict=True)]
            agreed, votes = vote(*zip(*found, strict=True), nms_threshold=self._nms_threshold)
            n = min(len(votes), spec.detections)
            boxes[index, :n], scores[index, :n] = agreed[:n], votes[:n]
        return Detections(boxes, scores, np.ones(spec.batch, np.bool_), (tiles, seen))

    def _found(
        self, view: View, seen: Detections, index: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return boxes and scores of what one view found, as it lies in tile number `index`."""
        slots = np.flatnonzero(seen.scores[index] > 0)
        boxes, scores = seen.boxes[index, slots], seen.scores[index, slots]
        if not seen.converged[index]:
            kept = non_maximum_suppression(boxes, scores, self._nms_threshold)
            boxes, scores = boxes[kept], scores[kept]
        return view.boxes_back(boxes, self._engine.spec.tile_px), scores

    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return (M, m, m) mask probabilities for `boxes` (M, 4) px, the mean of all views; M is free.

        Raises:
            ShapeError: the arrays do not fit each other, or an index names no tile of the batch.
            DeviceError: memory or the device gave out.
        """
        spec = self._engine.spec
        tiles, seen = detections.atlas
        total = np.zeros((len(boxes), spec.mask_px, spec.mask_px), np.float32)
        for view, one in zip(self._views, seen, strict=True):
            current = one if spec.keeps_atlas else self._engine.detect(view.tiles(tiles))
            there = np.ascontiguousarray(view.boxes(boxes, spec.tile_px))
            total += view.masks_back(self._engine.masks(current, there, tile_index))
        return total / np.float32(len(self._views))

    def close(self) -> None:
        """Close the engine; closing twice is allowed."""
        self._engine.close()


def vote(
    boxes: Sequence[NDArray[np.float32]], scores: Sequence[NDArray[np.float32]], *, nms_threshold: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the boxes and scores of what V views together find, the best first.

    Each finding asks every view for the one that overlaps it most, with an IoU of 0.6 or more. Its box
    becomes the mean of theirs, weighted by score (weighted boxes fusion, arXiv:1910.13302), and its score the
    one that at least half of the views give: an object that more than half of them miss has 0 and is left
    out. Of findings that overlap by more than `nms_threshold` the one with the largest sum of scores stays.

    Args:
        boxes: of each view (N_v, 4) x0 y0 x1 y1, pixels of the tile.
        scores: of each view (N_v,).
        nms_threshold: IoU, 0..1.

    >>> one, other = np.array([[0, 0, 10, 10]], "f4"), np.array([[0, 0, 10, 12], [50, 50, 60, 60]], "f4")
    >>> none, sure, both = np.zeros(0, "f4"), np.ones(1, "f4"), np.ones(2, "f4")
    >>> agreed, votes = vote([one, other, one[:0]], [sure, both, none], nms_threshold=0.5)
    >>> agreed.tolist(), votes.tolist()  # what one of three found alone is left out
    ([[0.0, 0.0, 10.0, 11.0]], [1.0])
    """
    n_views = len(boxes)
    everything, rated = np.concatenate(boxes), np.concatenate(scores)
    ends = np.cumsum([0, *(len(one) for one in scores)])
    overlap = pairwise_iou(everything, everything)  # (N, N)
    given = np.zeros((len(rated), n_views), np.float32)  # the score that each view gives to each finding
    total, weighted = np.zeros(len(rated), np.float32), np.zeros((len(rated), 4), np.float32)
    for view, (start, stop) in enumerate(pairwise(ends)):
        if stop > start:
            nearest = start + overlap[:, start:stop].argmax(axis=1)  # (N,)
            agrees = overlap[np.arange(len(rated)), nearest] >= _SAME_IOU
            given[:, view] = np.where(agrees, rated[nearest], 0.0)
            total += given[:, view]
            weighted += given[:, view, None] * everything[nearest]
    fused = (weighted / np.maximum(total, _TINY)[:, None]).astype(np.float32)  # an empty box overlaps nothing
    half = (n_views + 1) // 2
    voted = -np.sort(-given, axis=1)[:, half - 1]
    kept = non_maximum_suppression(fused, total, nms_threshold)
    kept = kept[voted[kept] > 0]
    kept = kept[np.argsort(-voted[kept], kind="stable")]
    return fused[kept], voted[kept]


def _mirror(boxes: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
    x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)
    return np.stack([side_px - x1, y0, side_px - x0, y1], axis=-1)


def _turn(boxes: NDArray[np.float32], quarters: int, side_px: int) -> NDArray[np.float32]:
    """Return boxes turned with their tile, anticlockwise as `np.rot90` does."""
    for _ in range(quarters):
        x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)
        boxes = np.stack([y0, side_px - x1, y1, side_px - x0], axis=-1)
    return boxes
