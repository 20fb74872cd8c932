"""Each voxel is the best object's; what better ones cover for more than half is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.volumes.overlaps import cut_overlaps
from darcnn.runtime.volumes.solid import Solid, SolidFile, write_solids


def box(z: int, y: int, x: int, side: int = 6, score: float = 0.8) -> Solid:
    return Solid((z, y, x), np.ones((side, side, side), bool), score, False, side)


def cut(folder: Path, solids: list[Solid]) -> list[Solid]:
    write_solids(folder / "solids", solids)
    return list(cut_overlaps(SolidFile(folder / "solids")))


def drawn(solid: Solid) -> np.ndarray:
    volume = np.zeros((30, 30, 30), bool)
    volume[tuple(slice(a, b) for a, b in zip(solid.origin, solid.stop, strict=True))] = solid.mask
    return volume


def test_the_better_one_keeps_what_both_have(tmp_path: Path) -> None:
    best, other = cut(tmp_path, [box(0, 0, 0, score=0.7), box(0, 0, 4, score=0.9)])
    assert (best.origin, best.mask.all(), best.mask.shape) == ((0, 0, 4), True, (6, 6, 6))
    assert (other.origin, other.mask.all(), other.mask.shape) == ((0, 0, 0), True, (6, 6, 4))


def test_of_equal_ones_the_first_is_better(tmp_path: Path) -> None:
    first, second = cut(tmp_path, [box(0, 0, 4), box(0, 0, 0)])
    assert first.mask.shape == (6, 6, 6)
    assert (second.origin, second.mask.shape) == ((0, 0, 6), (6, 6, 4))


def test_what_better_ones_cover_is_left_out_and_covers_nothing(tmp_path: Path) -> None:
    # the second is the first again; the third, beside it, loses nothing to it
    found = cut(tmp_path, [box(0, 0, 0, score=0.9), box(0, 0, 2, score=0.8), box(0, 0, 6, score=0.7)])
    assert [solid.origin for solid in found] == [(0, 0, 0), (0, 0, 6)]
    assert found[1].mask.shape == (6, 6, 6)


def test_boxes_that_touch_are_whole(tmp_path: Path) -> None:
    found = cut(tmp_path, [box(0, 0, 0), box(6, 0, 0), box(0, 6, 0), box(0, 0, 6)])
    assert [solid.mask.size for solid in found] == [216] * 4
    assert cut(tmp_path, []) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 20)] * 3, st.integers(2, 8), st.integers(0, 3)), max_size=12))
def test_no_voxel_has_two_owners_and_nothing_is_made_up(
    tmp_path_factory: object, places: list[tuple[int, int, int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("solids")  # type: ignore[attr-defined]
    solids = [box(z, y, x, side, score / 4) for z, y, x, side, score in places]
    found = cut(folder, solids)
    owners = sum((drawn(solid).astype(int) for solid in found), np.zeros((30, 30, 30), int))
    assert owners.max(initial=0) <= 1
    whole = [drawn(solid) for solid in solids]
    for solid in found:
        assert any(not (drawn(solid) & ~one).any() and 2 * drawn(solid).sum() >= one.sum() for one in whole)
        assert all(solid.mask.any(axis=axes).all() for axes in ((1, 2), (0, 2), (0, 1)))
