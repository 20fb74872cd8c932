"""From grids of values to outlines and the pixels inside them, for many objects at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import shapely
from contourpy import LineType, SerialContourGenerator, ZInterp
from numpy.typing import NDArray

from darcnn.runtime.polygons import draw_polygons

__all__ = ["MASK_LEVEL", "Outlined", "outline_crops", "outline_probabilities"]

MASK_LEVEL = 0.5  # a pixel belongs to an object where its probability is above this
# Where no value comes so near to the level, no contour touches itself or the centre of a pixel.
_CLEAR = 1e-6
_CELLS = 1 << 17  # so many values are worked on at once: they stay in the cache
# Objects up to so much wider than the narrowest share a strip: fewer strips for a few more empty cells.
_WIDER, _WIDER_PX = 1.5, 8


class Outlined(NamedTuple):
    """Where an object lies on an image."""

    origin: NDArray[np.int64]  # (2,) x y of the crop's first pixel
    mask: NDArray[np.bool_]  # (h, w) without empty borders
    ring: NDArray[np.float64]  # (K, 2) x y, closed and simple, pixels


@dataclass(frozen=True, slots=True)
class _Strip:
    """Grids of N objects below one another, each with zeros all round: none knows of the others."""

    values: NDArray[np.float64]  # (R, W + 2)
    starts: NDArray[np.int64]  # (N,) the row of zeros above each; another one is below it
    regions: NDArray[np.int64]  # (N, 4) where each lies, x0 y0 x1 y1, pixels of the image

    def rows_of(self, index: int) -> slice:
        """Return the rows of one object."""
        first = int(self.starts[index]) + 1
        return slice(first, first + int(self.regions[index, 3] - self.regions[index, 1]))


def outline_probabilities(
    probabilities: NDArray[np.float32], boxes: NDArray[np.floating], shape: tuple[int, int]
) -> list[Outlined | None]:
    """Return where N objects lie on the image: the first pixel, the mask and the outline of each.

    The probabilities are interpolated at the centres of the pixels inside the box; the largest
    contour at 0.5 is the outline (holes and lesser parts are dropped), and the mask is what
    `draw_polygon` makes of the outline, so that the two always agree.

    Args:
        probabilities: (N, m, m), 0..1; the centre of cell (i, j) lies at ((j + 0.5) / m, (i + 0.5) / m) of
            the box.
        boxes: (N, 4) x0 y0 x1 y1, pixels of the image; may leave it.
        shape: (H, W) of the image.
    Returns:
        One for each object, None if no pixel of the image is in it.

    >>> boxes = np.array([[2, 3, 6, 5], [0, 0, 0, 0]], "f4")
    >>> (origin, mask, ring), nothing = outline_probabilities(np.ones((2, 7, 7), "f4"), boxes, (9, 9))
    >>> origin, mask.shape, shapely.Polygon(ring).bounds, nothing
    (array([2, 3]), (2, 4), (2.0, 3.0, 6.0, 5.0), None)
    """
    height, width = shape
    exact = boxes.astype(np.float64)
    # pixel i is in the box where its centre i + 0.5 is
    regions = np.clip(np.ceil(exact - 0.5), 0, [width, height, width, height]).astype(np.int64)
    outlined: list[Outlined | None] = [None] * len(boxes)
    for members in _share_strips(regions):
        strip = _sample(probabilities[members], exact[members], regions[members])
        for row, found in zip(members.tolist(), _outline(strip), strict=True):
            outlined[row] = found
    return outlined


def outline_crops(
    masks: Sequence[NDArray[np.bool_]], origins: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """Return the outline of the largest part of each mask, without its holes.

    Args:
        masks: N crops (h, w), each with a pixel.
        origins: (N, 2) x y of the first pixel of each.

    >>> outline_crops([np.ones((1, 2), bool)], np.array([[3, 5]]))[0].min(axis=0)
    array([3., 5.])
    """
    sizes = np.array([mask.shape[::-1] for mask in masks], np.int64).reshape(-1, 2)
    regions = np.concatenate([origins, origins + sizes], axis=1)
    rings: list[NDArray[np.float64]] = [np.zeros((0, 2))] * len(masks)
    for members in _share_strips(regions):
        strip = _empty_strip(regions[members])
        for index, row in enumerate(members.tolist()):
            strip.values[strip.rows_of(index), 1 : 1 + sizes[row, 0]] = masks[row]
        for row, ring in zip(members.tolist(), _trace(strip)[0], strict=True):
            assert ring is not None  # a pixel of 1 inside zeros always has a contour
            rings[row] = ring
    return rings


def _share_strips(regions: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of regions that have a pixel, in groups of about the same width."""
    sizes = regions[:, 2:] - regions[:, :2]  # (N, 2) w h
    rows = np.flatnonzero((sizes > 0).all(axis=1))
    rows = rows[np.argsort(sizes[rows, 0], kind="stable")]
    begin, widest, cells = 0, 0.0, 0
    for at, (width, height) in enumerate(sizes[rows].tolist()):
        if at > begin and (width > widest or cells > _CELLS):
            yield rows[begin:at]
            begin, cells = at, 0
        if at == begin:
            widest = width * _WIDER + _WIDER_PX
        cells += width * height
    if begin < len(rows):
        yield rows[begin:]


def _empty_strip(regions: NDArray[np.int64]) -> _Strip:
    width = int((regions[:, 2] - regions[:, 0]).max())
    ends = np.cumsum(regions[:, 3] - regions[:, 1] + 2)
    starts = np.concatenate([[0], ends[:-1]])
    return _Strip(np.zeros((int(ends[-1]), width + 2)), starts, regions)


def _sample(
    probabilities: NDArray[np.float32], boxes: NDArray[np.float64], regions: NDArray[np.int64]
) -> _Strip:
    """Return the probabilities (N, m, m) of boxes (N, 4), interpolated at the pixels of regions (N, 4)."""
    strip = _empty_strip(regions)
    m = probabilities.shape[1]
    upper = min(1, m - 1)  # from a cell to the next, if there is one
    heights, widths = regions[:, 3] - regions[:, 1], regions[:, 2] - regions[:, 0]
    owner = np.repeat(np.arange(len(regions)), heights)  # (R,) the object of each row
    row = np.arange(len(owner)) - np.repeat(np.cumsum(heights) - heights, heights)
    left, top, right, bottom = boxes.T
    at_y = (row + regions[owner, 1] + 0.5 - top[owner]) / (bottom - top)[owner]  # (R,) 0..1
    lower, weight = _steps(at_y, m)
    cells = np.where(np.isfinite(probabilities), probabilities, np.float32(0)).astype(np.float64)
    lines = cells.reshape(-1, m)
    first = owner * m + lower
    lines = lines[first] * (1.0 - weight)[:, None] + lines[first + upper] * weight[:, None]  # (R, m)
    column = np.arange(strip.values.shape[1] - 2)
    at_x = (column + regions[:, :1] + 0.5 - left[:, None]) / (right - left)[:, None]  # (N, W)
    lower, weight = _steps(at_x, m)
    is_inside = column < widths[:, None]
    flat = lines.ravel()
    places = (np.arange(len(owner)) * m)[:, None] + lower[owner]  # (R, W)
    values = flat.take(places) * np.where(is_inside, 1.0 - weight, 0.0)[owner]
    places += upper
    values += flat.take(places) * np.where(is_inside, weight, 0.0)[owner]
    strip.values[row + strip.starts[owner] + 1, 1:-1] = values
    return strip


def _steps(positions: NDArray[np.float64], m: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the lower of the two cells that positions 0..1 lie between, and the weight of the upper one."""
    at = np.clip(positions * m - 0.5, 0.0, m - 1.0)
    lower = np.minimum(at.astype(np.int64), max(m - 2, 0))
    return lower, at - lower


def _outline(strip: _Strip) -> list[Outlined | None]:
    rings, is_plain = _trace(strip)
    # all that is above the level is what `draw_polygon` would find, in less time
    inside = strip.values > MASK_LEVEL
    drawn: dict[int, NDArray[np.float64]] = {}
    for index in np.flatnonzero(~is_plain).tolist():
        inside[strip.rows_of(index)] = False
        ring = rings[index]
        if ring is not None:
            drawn[index] = ring
    if drawn:
        owner = np.repeat(np.arange(len(drawn)), [len(ring) for ring in drawn.values()])
        regions = strip.regions[list(drawn)]
        which, y, x = draw_polygons(np.concatenate(list(drawn.values())), owner, regions)
        top = strip.starts[list(drawn)] + 1 - regions[:, 1]
        inside[y + top[which], x - regions[which, 0] + 1] = True
    return _crop(strip, inside, rings)


def _crop(
    strip: _Strip, inside: NDArray[np.bool_], rings: Sequence[NDArray[np.float64] | None]
) -> list[Outlined | None]:
    """Return the pixels `inside` of each object without empty borders, and where they lie."""
    line = np.arange(len(inside))
    has_pixel = inside.any(axis=1)
    top = np.minimum.reduceat(np.where(has_pixel, line, len(line)), strip.starts)
    bottom = np.maximum.reduceat(np.where(has_pixel, line, -1), strip.starts)
    columns = np.logical_or.reduceat(inside, strip.starts, axis=0)  # (N, W + 2)
    left = columns.argmax(axis=1)
    right = columns.shape[1] - columns[:, ::-1].argmax(axis=1)
    origins = strip.regions[:, :2] + np.stack([left - 1, top - strip.starts - 1], axis=1)
    corners = np.stack([top, bottom + 1, left, right], axis=1).tolist()
    return [
        None if ring is None or y1 == 0 else Outlined(origin, inside[y0:y1, x0:x1].copy(), ring)
        for ring, origin, (y0, y1, x0, x1) in zip(rings, origins, corners, strict=True)
    ]


def _trace(strip: _Strip) -> tuple[list[NDArray[np.float64] | None], NDArray[np.bool_]]:
    """Return the ring of largest area round the values above 0.5 of each object, in pixels of the image.

    Beside it, (N,), whether the pixels inside are just those above: it is alone and touches neither itself
    nor the centre of a pixel.
    """
    n, starts = len(strip.starts), strip.starts
    row = np.arange(len(strip.values))
    points, offsets = _contours(strip.values, row)
    owner = np.searchsorted(starts, points[offsets[:-1], 1], "right") - 1  # (L,) the object of each line
    # once more with rows counted from the object's own: no bit of an outline depends on what is above it
    points, _ = _contours(strip.values, row - np.repeat(starts, np.diff(starts, append=len(row))))
    distance = np.abs(strip.values - MASK_LEVEL).min(axis=1)
    is_plain = (np.bincount(owner, minlength=n) == 1) & (np.minimum.reduceat(distance, starts) > _CLEAR)
    # grid point j of a row is the centre of pixel j - 1
    points += np.repeat(strip.regions[owner, :2] - 0.5, np.diff(offsets), axis=0)
    rings: list[NDArray[np.float64] | None] = [None] * n
    # the largest comes last, of equals the first
    for line in np.lexsort((-np.arange(len(owner)), _areas(points, offsets))).tolist():
        if offsets[line + 1] - offsets[line] >= 4:
            rings[owner[line]] = points[offsets[line] : offsets[line + 1]]
    for index in np.flatnonzero(~is_plain).tolist():
        ring = rings[index]
        rings[index] = None if ring is None else _make_simple(ring)
    return rings, is_plain


def _contours(
    values: NDArray[np.float64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the points (K, 2) x y of all closed lines at the level, and where each of L begins (L + 1,).

    This is `contourpy.contour_generator` without its checks. Which lines there are, and in which order,
    depends on the values alone; `rows` (R,) is the y of each row.
    """
    x, y = np.empty(values.shape), np.empty(values.shape)
    x[:], y[:] = np.arange(values.shape[1]), rows[:, None]
    generator = SerialContourGenerator(
        x,
        y,
        values,
        np.zeros(values.shape, np.bool_),  # nothing is masked
        corner_mask=True,
        line_type=LineType.ChunkCombinedOffset,
        fill_type=SerialContourGenerator.default_fill_type,
        quad_as_tri=False,
        z_interp=ZInterp.Linear,
    )
    found: Any = generator.lines(MASK_LEVEL)
    (points,), (offsets,) = found
    if points is None:  # there is none
        return np.zeros((0, 2)), np.zeros(1, np.int64)
    return points, offsets.astype(np.int64)


def _areas(points: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return twice the area of each of the rings that follow one another in `points`."""
    if len(offsets) == 1:
        return np.zeros(0)
    near = points - np.repeat(points[offsets[:-1]], np.diff(offsets), axis=0)  # small numbers, small errors
    cross = np.zeros(len(points))
    cross[:-1] = near[:-1, 0] * near[1:, 1] - near[1:, 0] * near[:-1, 1]
    cross[offsets[1:] - 1] = 0.0  # from the end of one to the beginning of the next
    areas: NDArray[np.float64] = np.abs(np.add.reduceat(cross, offsets[:-1]))
    return areas


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
