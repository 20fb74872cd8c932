"""The pixels inside polygons are those whose centre is."""

from __future__ import annotations

import numpy as np
import shapely

from darcnn.runtime.geometry import Region
from darcnn.runtime.polygons import draw_polygon, draw_polygons


def test_drawing_holds_for_long_edges_and_crops() -> None:
    ring = np.array([[3.2, -4.0], [30.0, 11.0], [7.5, 25.3], [9.0, 9.0], [3.2, -4.0]])
    xs, ys = np.meshgrid(np.arange(5, 20) + 0.5, np.arange(2, 22) + 0.5)
    expected = shapely.contains_xy(shapely.Polygon(ring), xs, ys)
    assert expected.any()
    assert np.array_equal(draw_polygon(ring, Region(5, 2, 20, 22)), expected)
    assert np.array_equal(draw_polygon(ring[::-1], Region(5, 2, 20, 22)), expected)


def test_many_polygons_are_drawn_as_each_alone() -> None:
    generator = np.random.default_rng(8)
    rings, regions = [], []
    for number in range(40):
        angles = np.sort(generator.uniform(0, 2 * np.pi, 3 + number % 9))
        ring = generator.uniform(0, 40, 2) + generator.uniform(0.2, 12) * np.stack(
            [np.cos(angles), np.sin(angles)], axis=1
        )
        rings.append(np.concatenate([ring, ring[:1]]))
        low, high = np.floor(ring.min(axis=0)), np.ceil(ring.max(axis=0))
        regions.append([*(low + number % 2), *(np.maximum(high - number % 3, low + 2))])  # some are cropped
    owner = np.repeat(np.arange(40), [len(ring) for ring in rings])
    corners = np.array(regions, np.int64)
    polygon, y, x = draw_polygons(np.concatenate(rings), owner, corners)
    for number, ring in enumerate(rings):
        x0, y0, x1, y1 = corners[number].tolist()
        alone = np.argwhere(draw_polygon(ring, Region(x0, y0, x1, y1))) + np.array([y0, x0])
        mine = polygon == number
        assert np.array_equal(np.stack([y[mine], x[mine]], axis=1), alone)
    assert len(polygon) > 1000
