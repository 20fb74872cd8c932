"""A series in the format of the Cell Tracking Challenge: the same objects, and tracks without gaps."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.ctc import write_ctc
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume


def read(folder: Path) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    masks = [tifffile.imread(path) for path in sorted(folder.glob("mask*.tif"))]
    rows = (folder / "res_track.txt").read_text().splitlines()
    return np.array(masks), [tuple(map(int, row.split())) for row in rows]


def write(
    labels: np.ndarray, folder: Path, parents: dict[int, int]
) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    group = zarr.create_group(folder / "labels")
    group.create_array("0", data=labels.astype(np.uint32), chunks=(2, *labels.shape[1:]))
    write_ctc(folder / "ctc", folder / "labels", parents)
    return read(folder / "ctc")


def test_a_missed_time_point_ends_a_track_and_begins_another(tmp_path: Path) -> None:
    labels = np.zeros((6, 1, 4), np.uint32)
    labels[:2, 0, 0] = 1  # divides
    labels[2:, 0, 0] = 2
    labels[[2, 4, 5], 0, 1] = 3  # missed at 3
    masks, rows = write(labels, tmp_path, {2: 1, 3: 1})
    assert rows == [(1, 0, 1, 0), (2, 2, 5, 1), (3, 2, 2, 1), (4, 4, 5, 3)]
    assert masks[:, 0, :2].tolist() == [[1, 0], [1, 0], [2, 3], [2, 0], [2, 4], [2, 4]]
    assert masks.dtype == np.uint16


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint32, (5, 3, 4), elements=st.integers(0, 6)))
def test_masks_and_tracks_say_the_same_of_the_same_objects(labels: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        masks, rows = write(labels, Path(folder), {})
    assert np.array_equal(masks > 0, labels > 0)
    assert [row[0] for row in rows] == list(dict.fromkeys(sorted(np.unique(masks[masks > 0]).tolist())))
    last = {label: (end, set(labels[masks == label].tolist())) for label, _, end, _ in rows}
    for label, first, end, parent in rows:
        assert np.flatnonzero((masks == label).any(axis=(1, 2))).tolist() == list(range(first, end + 1))
        (number,) = last[label][1]  # one object
        if parent:  # the earlier part of the same object
            assert last[parent][0] < first - 1
            assert last[parent][1] == {number}
        else:
            assert label == number


def test_only_series_are_written_so_and_later_too(oracle16: Segmenter, tmp_path: Path) -> None:
    planes = np.zeros((4, 40, 40), np.uint8)
    planes[:, 4:14, 4:14], planes[[0, 2, 3], 24:34, 24:34] = 1, 2
    options = VolumeOptions(also=("ctc",))
    for axes in ("TYX", "ZYX"):
        path = tmp_path / f"{axes}.tif"
        tifffile.imwrite(path, planes, imagej=True, metadata={"axes": axes})
        folder = run_volume(oracle16, path, tmp_path / "out").folder
        assert not (folder / "ctc").exists()
        assert run_volume(oracle16, path, tmp_path / "out", options=options).was_done
        assert (folder / "ctc").exists() == (axes == "TYX")
    masks, rows = read(tmp_path / "out" / "TYX" / "ctc")
    assert rows == [(1, 0, 3, 0), (2, 0, 0, 0), (3, 2, 3, 2)]
    assert np.array_equal(masks > 0, planes > 0)
