"""Where what a network saw on a tile lies on the slide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.boxes import clip_boxes
from darcnn.runtime.instances import Instances
from darcnn.runtime.masks import drop_covered
from darcnn.runtime.outlines import outline_probabilities
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.tiling import Tile

__all__ = ["is_cut", "is_small_enough", "lies_inside", "place", "to_slide"]

EDGE_PX = 1.0  # a box this close to a tile's edge touches it
_ON_SLIDE = 1 / 3  # share of a box on the slide that is still one half, seen by a network


def to_slide(boxes: NDArray[np.float32], tile: Tile) -> NDArray[np.float64]:
    """Return (N, 4) boxes, network pixels from the corner of what the tile reads, in those of the slide."""
    return boxes.astype(np.float64) + np.array([tile.read.x0, tile.read.y0] * 2, np.float64)


def lies_inside(boxes: NDArray[np.float64], width: int, height: int) -> NDArray[np.bool_]:
    """Tell which boxes are of objects on the slide rather than of their mirror images beyond its edges.

    An object that touches the edge is one with its mirror image, and its box reaches as far out as in, give
    or take what the network is off by; the mirror image of one that does not lies beyond the edge. So
    along each axis at least a third of the box must lie on the slide; a box wider than the slide need only
    cover a third of the slide.
    """
    extent = np.array([width, height], np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]
    covered = np.minimum(high, extent) - np.maximum(low, 0)
    is_covered = (covered > 0) & (covered >= _ON_SLIDE * np.minimum(high - low, extent))  # (N, 2)
    return np.logical_and(is_covered[:, 0], is_covered[:, 1])


def is_small_enough(boxes: NDArray[np.floating], limit_px: float | None) -> NDArray[np.bool_]:
    """Tell which boxes (N, 4) are not larger than what a model looks for; sides by geometric mean."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).astype(np.float64)
    found: NDArray[np.bool_] = np.sqrt(sides.prod(axis=1)) <= (np.inf if limit_px is None else limit_px)
    return found


def is_cut(boxes: NDArray[np.float32], tile: Tile, plan: SlidePlan) -> NDArray[np.bool_]:
    """Tell which boxes (N, 4), network pixels from the corner of what the tile reads, touch its edge.

    Only edges count beyond which the slide goes on.
    """
    read = tile.read
    cut: NDArray[np.bool_] = (
        ((boxes[:, 0] <= EDGE_PX) & (read.x0 > 0))
        | ((boxes[:, 1] <= EDGE_PX) & (read.y0 > 0))
        | ((boxes[:, 2] >= read.width - EDGE_PX) & (read.x1 < plan.width))
        | ((boxes[:, 3] >= read.height - EDGE_PX) & (read.y1 < plan.height))
    )
    return cut


def place(
    plan: SlidePlan,
    shape: tuple[int, int],
    tile: Tile,
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    masks: NDArray[np.float32],
    *,
    is_saturated: bool,
) -> Instances:
    """Return the objects of one tile at level 0, without those that have no pixel there or lie in another."""
    height, width = shape
    truncated = is_cut(boxes, tile, plan)
    boxes0 = to_slide(boxes, tile) * np.array(plan.factor * 2)
    outlined = outline_probabilities(masks, boxes0, shape)
    rows = [row for row, found in enumerate(outlined) if found is not None]
    placed = [found for found in outlined if found is not None]
    return drop_covered(
        Instances(
            shape=shape,
            boxes=clip_boxes(boxes0[rows].astype(np.float32), width, height),
            scores=scores[rows],
            origins=np.array([found.origin for found in placed], np.int64).reshape(-1, 2),
            masks=tuple(found.mask for found in placed),
            outlines=tuple(found.ring for found in placed),
            truncated=truncated[rows],
            is_saturated=is_saturated,
        )
    )
