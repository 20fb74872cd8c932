"""What at least two axes agree on, voxel by voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from darcnn.runtime.volumes.agree import agree, shared_voxels
from darcnn.runtime.volumes.solid import Solid, SolidFile, write_solids


def box(z: int, y: int, x: int, side: int = 6, score: float = 0.8) -> Solid:
    return Solid((z, y, x), np.ones((side, side, side), bool), score, False, side)


def filed(folder: Path, name: str, solids: list[Solid]) -> SolidFile:
    write_solids(folder / name, solids)
    return SolidFile(folder / name)


def test_a_solid_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    solids = [
        Solid((k, 2 * k, 3 * k), random.random((3, 4, 5)) < 0.5, k / 9, k % 2 == 0, k + 1) for k in range(8)
    ]
    found = filed(tmp_path, "a", solids)
    assert len(found) == 8
    for one, other in zip(solids, found, strict=True):
        assert one.origin == other.origin
        assert np.array_equal(one.mask, other.mask)
        assert (one.truncated, one.n_planes) == (other.truncated, other.n_planes)
    assert found.boxes[3].tolist() == [3, 6, 9, 6, 10, 14]
    assert len(filed(tmp_path, "none", [])) == 0


def test_what_one_axis_alone_has_found_is_left_out(tmp_path: Path) -> None:
    views = [
        filed(tmp_path, "z", [box(0, 0, 0), box(30, 30, 30)]),
        filed(tmp_path, "y", [box(1, 0, 0)]),
        filed(tmp_path, "x", []),
    ]
    (found,) = agree(views)
    assert found.origin == (1, 0, 0)  # the voxels of both
    assert found.mask.shape == (5, 6, 6)


def test_voxels_of_two_of_three_axes_make_the_object(tmp_path: Path) -> None:
    views = [
        filed(tmp_path, name, [box(*place)])
        for name, place in (("z", (0, 0, 0)), ("y", (2, 0, 0)), ("x", (1, 0, 0)))
    ]
    (found,) = agree(views)
    assert (found.origin, found.mask.shape) == ((1, 0, 0), (6, 6, 6))
    assert found.mask.all()


def test_no_object_of_an_axis_is_used_twice(tmp_path: Path) -> None:
    views = [filed(tmp_path, "z", [box(0, 0, 0), box(0, 0, 7)]), filed(tmp_path, "y", [box(0, 0, 3)])]
    found = list(agree(views))  # the one in the middle overlaps both by half
    assert len(found) == 1


def test_shared_voxels_are_counted_where_boxes_meet() -> None:
    assert shared_voxels(box(0, 0, 0), box(3, 3, 3)) == 27
    assert shared_voxels(box(0, 0, 0), box(6, 0, 0)) == 0
