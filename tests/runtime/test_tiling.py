"""The lattice: who owns what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.tiling import owns, plan_tiles

FAST = settings(deadline=None, max_examples=80)

sizes = st.integers(1, 70)
lattices = st.tuples(st.integers(1, 20), st.integers(0, 9)).map(lambda p: (p[0] + 2 * p[1], p[1]))


@FAST
@given(sizes, sizes, lattices)
def test_cores_partition_the_slide(width: int, height: int, lattice: tuple[int, int]) -> None:
    tile_px, halo_px = lattice
    owners = np.zeros((height, width), int)
    for tile in plan_tiles(width, height, tile_px=tile_px, halo_px=halo_px):
        owners[tile.core.y0 : tile.core.y1, tile.core.x0 : tile.core.x1] += 1
        assert tile.core.width > 0
        assert tile.core.height > 0
    assert (owners == 1).all()


@FAST
@given(sizes, sizes, lattices)
def test_a_read_is_a_whole_tile_round_its_core(width: int, height: int, lattice: tuple[int, int]) -> None:
    tile_px, halo_px = lattice
    for index, tile in enumerate(plan_tiles(width, height, tile_px=tile_px, halo_px=halo_px)):
        assert tile.index == index
        assert (tile.read.width, tile.read.height) == (tile_px, tile_px)
        for low, high, first, last, size in (
            (tile.core.x0, tile.core.x1, tile.read.x0, tile.read.x1, width),
            (tile.core.y0, tile.core.y1, tile.read.y0, tile.read.y1, height),
        ):
            assert first >= 0
            assert first % (tile_px - 2 * halo_px) == 0
            assert first == 0 if low == 0 else low - first == halo_px
            assert last >= size if high == size else last - high == halo_px


@FAST
@given(sizes, sizes, lattices)
def test_what_fits_into_one_tile_is_one_tile(width: int, height: int, lattice: tuple[int, int]) -> None:
    tiles = plan_tiles(width, height, tile_px=lattice[0], halo_px=lattice[1])
    assert (len(tiles) == 1) == (max(width, height) <= lattice[0])


@FAST
@given(sizes, sizes, lattices, st.randoms(use_true_random=False))
def test_every_point_has_one_owner(width: int, height: int, lattice: tuple[int, int], random) -> None:  # type: ignore[no-untyped-def]
    points = np.array([(random.random() * width, random.random() * height) for _ in range(20)])
    points = np.concatenate([points, np.floor(points)])  # borders of cores lie on whole pixels
    tiles = plan_tiles(width, height, tile_px=lattice[0], halo_px=lattice[1])
    assert (np.sum([owns(tile, points) for tile in tiles], axis=0) == 1).all()


def test_a_margin_reaches_as_far_on_every_side() -> None:
    tile = plan_tiles(200, 200, tile_px=48, halo_px=8)[7]  # in the middle
    low, high = np.array([tile.core.x0, tile.core.y0]), np.array([tile.core.x1, tile.core.y1])
    for side in ([2, 0], [0, 2]):
        points = np.array([low - side, high - 1 + side, low - np.multiply(side, 1.5), high + side])
        assert owns(tile, points, margin_px=2.0).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("width", "height", "tile_px", "halo_px"), [(0, 5, 8, 2), (5, 0, 8, 2), (5, 5, 8, 4), (5, 5, 8, -1)]
)
def test_a_lattice_without_ground_is_refused(width: int, height: int, tile_px: int, halo_px: int) -> None:
    with pytest.raises(ShapeError, match="no tiles"):
        plan_tiles(width, height, tile_px=tile_px, halo_px=halo_px)
