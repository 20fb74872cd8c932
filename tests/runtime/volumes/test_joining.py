"""Far flatter than its like is no object, unless the end of the volume cuts it."""

from pathlib import Path

import numpy as np

from darcnn.runtime.volumes.joining import _find_deep
from darcnn.runtime.volumes.solid import Solid, SolidFile, write_solids


def solids(folder: Path, spans: list[tuple[int, int]]) -> SolidFile:
    write_solids(
        folder / "s.arrow",
        (
            Solid((low, 0, 9 * n), np.ones((high - low, 4, 4), np.bool_), 0.9, False, high - low)
            for n, (low, high) in enumerate(spans)
        ),
    )
    return SolidFile(folder / "s.arrow")


def test_slivers_between_deep_objects_are_left_out(tmp_path: Path) -> None:
    found = solids(tmp_path, [(2, 32), (5, 40), (10, 38), (20, 21), (8, 13), (0, 1), (58, 59), (59, 60)])
    assert _find_deep(found, "z", n_planes=60).tolist() == [0, 1, 2, 4, 5, 7]


def test_flat_objects_among_flat_ones_stay_and_so_does_a_volume_of_cut_ones(tmp_path: Path) -> None:
    assert _find_deep(solids(tmp_path, [(3, 4), (5, 7), (9, 12)]), "z", n_planes=60).tolist() == [0, 1, 2]
    assert _find_deep(solids(tmp_path, [(0, 1), (0, 2)]), "z", n_planes=2).tolist() == [0, 1]
    assert _find_deep(solids(tmp_path, []), "z", n_planes=2).tolist() == []
