"""Masks: from a grid of probabilities to an outline and the pixels inside it, and back."""

from __future__ import annotations

import math

import numpy as np
import shapely
from contourpy import LineType, SerialContourGenerator, ZInterp
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Region
from darcnn.runtime.instances import Instances

__all__ = [
    "MASK_LEVEL",
    "draw_polygon",
    "draw_polygons",
    "drop_covered",
    "label_instances",
    "outline_mask",
]

MASK_LEVEL = 0.5  # a pixel belongs to an object where its probability is above this
# Where no value comes so near to the level, no contour touches itself or the centre of a pixel.
_CLEAR = 1e-6
_MAX_COVERED = 0.5  # share of its pixels that an object may lose to better ones

Outlined = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]


def outline_mask(
    probabilities: NDArray[np.float32], box: NDArray[np.float32], shape: tuple[int, int]
) -> Outlined | None:
    """Return where an object lies on the image: its first pixel, its mask and its outline.

    The probabilities are interpolated at the centres of the pixels inside the box; the largest
    contour at 0.5 is the outline (holes and lesser parts are dropped), and the mask is what
    `draw_polygon` makes of the outline, so that the two always agree.

    Args:
        probabilities: (m, m), 0..1; cell (i, j) has its centre at ((j + 0.5) / m, (i + 0.5) / m) of the box.
        box: (4,) x0 y0 x1 y1, pixels of the image; may leave it.
        shape: (H, W) of the image.
    Returns:
        origin (2,) x y of the crop's first pixel; mask (h, w) without empty borders; ring (K, 2) x y,
        closed and simple, pixels. None if no pixel of the image is in the object.

    >>> origin, mask, ring = outline_mask(np.ones((7, 7), "f4"), np.array([2, 3, 6, 5], "f4"), (9, 9))
    >>> origin, mask.shape, shapely.Polygon(ring).bounds
    (array([2, 3]), (2, 4), (2.0, 3.0, 6.0, 5.0))
    """
    x0, y0, x1, y1 = (float(v) for v in box)
    height, width = shape
    # pixel i is in the box where its centre i + 0.5 is
    region = Region(math.ceil(x0 - 0.5), math.ceil(y0 - 0.5), math.ceil(x1 - 0.5), math.ceil(y1 - 0.5)).clip(
        width, height
    )
    if region.width <= 0 or region.height <= 0:
        return None
    cells = probabilities.astype(np.float64)
    at_y = (np.arange(region.y0, region.y1, dtype=np.float64) + 0.5 - y0) / (y1 - y0)  # (h,) 0..1
    at_x = (np.arange(region.x0, region.x1, dtype=np.float64) + 0.5 - x0) / (x1 - x0)  # (w,)
    cells = _interpolate(cells, at_y)  # (h, m)
    values = _interpolate(cells.T, at_x).T  # (h, w)
    values = np.where(np.isfinite(values), values, 0.0)
    contour = _largest_contour(values, region)
    if contour is None:
        return None
    ring, is_all = contour
    # all that is above the level is what `draw_polygon` would find, in less time
    mask = values > MASK_LEVEL if is_all else draw_polygon(ring, region)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    origin = np.array([region.x0 + columns[0], region.y0 + rows[0]], np.int64)
    return origin, mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy(), ring


def draw_polygon(ring: NDArray[np.float64], region: Region) -> NDArray[np.bool_]:
    """Return which pixels of `region` have their centre inside the closed `ring`.

    A centre exactly on the outline is inside on the left and upper side only, so neighbours that
    share a border share no pixel.

    Args:
        ring: (K, 2) x y, pixels, first point repeated at the end.
        region: pixels to draw on.
    Returns:
        (height, width) of the region.

    >>> square = np.array([[0, 0], [2, 0], [2, 1], [0, 1], [0, 0]], "f8")
    >>> draw_polygon(square, Region(-1, 0, 3, 2)).astype(int)
    array([[0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    corners = np.array([[region.x0, region.y0, region.x1, region.y1]], np.int64)
    inside = _is_inside(ring, np.zeros(len(ring), np.int64), corners)
    return inside.reshape(region.height, region.width + 1)[:, :-1]


def draw_polygons(
    points: NDArray[np.float64], owner: NDArray[np.int64], regions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels of N polygons, each where `draw_polygon` draws it.

    Args:
        points: (K, 2) x y of closed rings, pixels, one ring after another.
        owner: (K,) which polygon each point belongs to, ascending from 0.
        regions: (N, 4) x0 y0 x1 y1, pixels to draw each polygon on; not empty.
    Returns:
        polygon, y and x of each pixel, (P,) each; polygon by polygon, row by row.

    >>> square = np.array([[0, 0], [2, 0], [2, 1], [0, 1], [0, 0]], "f8")
    >>> draw_polygons(square, np.zeros(5, int), np.array([[-1, 0, 3, 2]]))
    (array([0, 0]), array([0, 0]), array([0, 1]))
    """
    starts, widths = _cells(regions)
    cells = np.flatnonzero(_is_inside(points, owner, regions))
    polygon = np.searchsorted(starts, cells, "right") - 1
    y, x = np.divmod(cells - starts[polygon], widths[polygon])
    return polygon, y + regions[polygon, 1], x + regions[polygon, 0]


def _cells(regions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the cells of each region begin, and how many a row has: a column more than pixels."""
    widths = regions[:, 2] - regions[:, 0] + 1
    sizes = widths * (regions[:, 3] - regions[:, 1])
    return np.cumsum(sizes) - sizes, widths


def _is_inside(
    points: NDArray[np.float64], owner: NDArray[np.int64], regions: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return whether each cell of `_cells` lies in its polygon; those of the last column do not."""
    starts, widths = _cells(regions)
    x0, y0, x1, y1 = regions[owner].T
    x, y = points[:, 0], points[:, 1]
    is_edge = owner[:-1] == owner[1:]
    # an edge crosses the centre line of row r where ceil(y - 0.5) passes over r
    ends = np.clip(np.ceil(y - 0.5).astype(np.int64) - y0, 0, y1 - y0)
    first = np.minimum(ends[:-1], ends[1:])
    n_rows = np.where(is_edge, np.abs(np.diff(ends)), 0)
    edge = np.repeat(np.arange(len(n_rows)), n_rows)  # one entry a crossing
    row = np.arange(len(edge)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows) + first[edge]
    xa, ya, xb, yb = x[edge], y[edge], x[edge + 1], y[edge + 1]
    crossing = xa + (row + y0[edge] + 0.5 - ya) * ((xb - xa) / (yb - ya))
    column = np.clip(np.ceil(crossing - 0.5).astype(np.int64) - x0[edge], 0, (x1 - x0)[edge])
    of = owner[edge]
    n_cells = int((widths * (regions[:, 3] - regions[:, 1])).sum())
    turns = np.bincount(starts[of] + row * widths[of] + column, minlength=n_cells)
    # inside and outside change at each turn; a closed ring turns an even number of times in every row
    inside: NDArray[np.bool_] = np.cumsum(turns) % 2 == 1
    return inside


def drop_covered(instances: Instances) -> Instances:
    """Return `instances` without those that lie for more than half in better ones: they are the same object.

    Non-maximum suppression compares boxes; a part found inside a whole passes it. Of equal scores the
    earlier object is the better one, as in `Instances.labels`.
    """
    if len(instances) < 2:
        return instances
    low = instances.origins.min(axis=0)
    sizes = np.array([mask.shape[::-1] for mask in instances.masks])  # (N, 2) width, height
    width, height = (instances.origins + sizes).max(axis=0) - low
    taken = np.zeros((height, width), np.bool_)
    kept = np.zeros(len(instances), np.bool_)
    for row in np.argsort(-instances.scores, kind="stable"):
        (x, y), mask = instances.origins[row] - low, instances.masks[row]
        place = taken[y : y + mask.shape[0], x : x + mask.shape[1]]
        kept[row] = np.count_nonzero(place & mask) <= _MAX_COVERED * np.count_nonzero(mask)
        if kept[row]:
            place |= mask
    return instances.select(kept)


def label_instances(labels: NDArray[np.integer]) -> Instances:
    """Return the objects of a label image, in order of their label, each with score 1.

    The mask is the label's pixels. The outline redraws them exactly if they hang together by
    sides and have no hole; else it goes round the largest part, without its holes.

    Args:
        labels: (H, W), 0 is background.
    Raises:
        ShapeError: not two axes.

    >>> label_instances(np.array([[0, 7, 7], [3, 0, 0]])).boxes
    array([[0., 1., 1., 2.],
           [1., 0., 3., 1.]], dtype=float32)
    """
    if labels.ndim != 2:
        raise ShapeError(f"a label image of shape {labels.shape}, not (H, W)")
    shape = (labels.shape[0], labels.shape[1])
    ys, xs = np.nonzero(labels)
    if not ys.size:
        return Instances.empty(shape)
    ids = labels[ys, xs]
    order = np.argsort(ids, kind="stable")
    ids, ys, xs = ids[order], ys[order], xs[order]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    low = np.stack([np.minimum.reduceat(xs, starts), np.minimum.reduceat(ys, starts)], axis=1)  # (N, 2)
    high = np.stack([np.maximum.reduceat(xs, starts), np.maximum.reduceat(ys, starts)], axis=1) + 1
    masks, outlines = [], []
    for label, (x0, y0), (x1, y1) in zip(ids[starts], low.tolist(), high.tolist(), strict=True):
        mask = labels[y0:y1, x0:x1] == label
        contour = _largest_contour(mask.astype(np.float64), Region(x0, y0, x1, y1))
        assert contour is not None  # a pixel of 1 inside zeros always has a contour
        masks.append(mask)
        outlines.append(contour[0])
    return Instances(
        shape=shape,
        boxes=np.concatenate([low, high], axis=1).astype(np.float32),
        scores=np.ones(len(starts), np.float32),
        origins=low.astype(np.int64),
        masks=tuple(masks),
        outlines=tuple(outlines),
        truncated=np.zeros(len(starts), np.bool_),
    )


def _interpolate(cells: NDArray[np.float64], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (P, ...) linear samples of (m, ...) `cells` along axis 0 at `positions` of 0..1."""
    m = len(cells)
    at = np.clip(positions * m - 0.5, 0.0, m - 1.0)
    lower = np.minimum(at.astype(np.int64), max(m - 2, 0))
    upper = np.minimum(lower + 1, m - 1)
    weight = (at - lower)[:, None]
    samples: NDArray[np.float64] = cells[lower] * (1.0 - weight) + cells[upper] * weight
    return samples


def _largest_contour(values: NDArray[np.float64], region: Region) -> tuple[NDArray[np.float64], bool] | None:
    """Return the ring of largest area round `values` above 0.5, in pixels of the image; None: there is none.

    Beside it, whether the pixels inside are just those above: it is alone and touches neither itself nor the
    centre of a pixel.
    """
    padded = np.zeros((region.height + 2, region.width + 2))  # zeros all round close every contour
    padded[1:-1, 1:-1] = values
    lines = _contours_of(padded).lines(MASK_LEVEL)
    rings = [np.asarray(line, np.float64) for line in lines]
    rings = [ring for ring in rings if len(ring) >= 4]
    if not rings:
        return None
    # grid point j of `padded` is the centre of pixel j - 1
    ring = max(rings, key=_double_area) + np.array([region.x0 - 0.5, region.y0 - 0.5])
    if len(lines) == 1 and np.abs(padded - MASK_LEVEL).min() > _CLEAR:
        return ring, True
    simple = _make_simple(ring)
    return None if simple is None else (simple, False)


def _contours_of(values: NDArray[np.float64]) -> SerialContourGenerator:
    """Return what `contourpy.contour_generator` makes, without its checks: they take most of its time."""
    x, y = np.empty(values.shape), np.empty(values.shape)
    x[:], y[:] = np.arange(values.shape[1]), np.arange(values.shape[0])[:, None]
    return SerialContourGenerator(
        x,
        y,
        values,
        np.zeros(values.shape, np.bool_),  # nothing is masked
        corner_mask=True,
        line_type=LineType.Separate,
        fill_type=SerialContourGenerator.default_fill_type,
        quad_as_tri=False,
        z_interp=ZInterp.Linear,
    )


def _double_area(ring: NDArray[np.float64]) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return abs(float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])))


def _make_simple(ring: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return `ring`, or its largest part where it touches itself (a value of exactly 0.5)."""
    polygon = shapely.polygons(ring)
    if shapely.is_valid(polygon):
        return ring
    pieces = shapely.get_parts(shapely.get_parts(shapely.make_valid(polygon)))  # a collection may nest one
    parts = [piece for piece in pieces if piece.geom_type == "Polygon"]
    if not parts:
        return None
    largest: NDArray[np.float64] = shapely.get_coordinates(max(parts, key=shapely.area).exterior)
    return largest
