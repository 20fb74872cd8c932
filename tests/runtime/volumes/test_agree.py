"""What at least two axes agree on, voxel by voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from darcnn.runtime.volumes.agree import agree, cut_merged, shared_voxels
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


def long_box(x: int, length: int) -> Solid:
    return Solid((0, 0, x), np.ones((6, 6, length), bool), 0.9, False, 6)


def cut_all(folder: Path, views: list[list[Solid]]) -> list[list[tuple[int, int]]]:
    """Return (first x, beyond the last) of the solids of each view once they are cut."""
    files = [filed(folder, f"view-{number}", view) for number, view in enumerate(views)]
    cut = [list(cut_merged(files, number)) for number in range(len(files))]
    return [[(one.origin[2], one.stop[2]) for one in view] for view in cut]


def test_what_one_axis_has_merged_is_cut_where_another_has_not(tmp_path: Path) -> None:
    merged, apart = [long_box(0, 12)], [long_box(0, 6), long_box(6, 6)]
    assert cut_all(tmp_path, [merged, apart, merged]) == [[(0, 6), (6, 12)]] * 3
    three = [long_box(0, 4), long_box(4, 4), long_box(8, 4)]  # more pieces are more
    assert cut_all(tmp_path, [merged, apart, three])[0] == [(0, 4), (4, 8), (8, 12)]
    both = [filed(tmp_path, str(number), view) for number, view in enumerate([merged, apart])]
    found = list(agree([filed(tmp_path, f"c{n}", list(cut_merged(both, n))) for n in (0, 1)]))
    assert [(one.origin[2], one.stop[2]) for one in found] == [(0, 6), (6, 12)]


def test_what_was_found_twice_is_no_two_pieces(tmp_path: Path) -> None:
    whole, twice = [long_box(0, 10)], [long_box(0, 10), long_box(2, 10)]
    assert cut_all(tmp_path, [whole, twice])[0] == [(0, 10)]


def test_what_is_no_piece_cuts_nothing(tmp_path: Path) -> None:
    whole = [long_box(0, 12)]
    for others in (
        [long_box(0, 6)],  # one piece
        [long_box(0, 10), long_box(10, 2)],  # a scrap: less than a fifth
        [long_box(0, 6), long_box(9, 8)],  # a neighbour, that lies outside for more than half
        [],
    ):
        assert cut_all(tmp_path, [whole, others])[0] == [(0, 12)]


def test_shared_voxels_are_counted_where_boxes_meet() -> None:
    assert shared_voxels(box(0, 0, 0), box(3, 3, 3)) == 27
    assert shared_voxels(box(0, 0, 0), box(6, 0, 0)) == 0
