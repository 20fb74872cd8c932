"""Series along t: time points are searched one by one, whatever is on them and wherever the file has them."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr

from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.slab import Slab
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume


def test_a_time_point_without_background_is_one_like_others(oracle16: Segmenter, tmp_path: Path) -> None:
    series = np.zeros((3, 40, 40), np.uint8)
    series[:, 4:14, 4:14] = 1
    series[1, :, :20], series[1, :, 20:] = 1, 2  # two objects cover all of it
    tifffile.imwrite(tmp_path / "s.tif", series, imagej=True, metadata={"axes": "TYX"})
    folder = run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out").folder
    tracks = pq.read_table(folder / "tracks.parquet").to_pandas()
    assert tracks.groupby("t").area_px.apply(sorted).tolist() == [[100], [800, 800], [100]]


def test_time_points_are_not_averaged(oracle16: Segmenter, tmp_path: Path) -> None:
    series = np.zeros((12, 40, 40), np.uint8)
    series[:, 4:14, 4:14] = 1
    series[5:8, 24:34, 24:34] = 2  # fewer time points than the slab of the model joins planes
    tifffile.imwrite(tmp_path / "s.tif", series, imagej=True, metadata={"axes": "TYX"})
    model = oracle16.manifest.input
    slabs = replace(model, slab=Slab(0.5), nominal_diameter_px=12.0)
    with Segmenter(oracle16.engine, replace(oracle16.manifest, input=slabs)) as segmenter:
        folder = run_volume(segmenter, tmp_path / "s.tif", tmp_path / "out").folder
    assert json.loads((folder / "run.json").read_text())["network"]["planes_joined"] == 1
    objects = pq.read_table(folder / "objects.parquet").to_pandas()
    assert objects[["t_first", "t_last", "area_px"]].to_numpy().tolist() == [[0, 11, 100], [5, 7, 100]]


def test_a_series_is_looked_at_along_time_alone_whatever_the_model_does_with_volumes(
    oracle16: Segmenter, tmp_path: Path
) -> None:
    series = np.zeros((40, 40, 40), np.uint8)
    series[:, 4:14, 4:14] = 1
    tifffile.imwrite(tmp_path / "s.tif", series, imagej=True, metadata={"axes": "TYX"})
    slabs = replace(oracle16.manifest.input, slab=Slab(0.5), nominal_diameter_px=12.0)
    with Segmenter(oracle16.engine, replace(oracle16.manifest, input=slabs)) as segmenter:
        folder = run_volume(segmenter, tmp_path / "s.tif", tmp_path / "out").folder
    assert json.loads((folder / "run.json").read_text())["network"]["axes"] == ["z"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse these names")
@pytest.mark.parametrize("name", ["~", "run:1"])
def test_the_name_of_the_folder_is_taken_as_it_is(
    oracle16: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    series = np.zeros((3, 40, 40), np.uint8)
    series[:, 4:14, 4:14] = 1
    tifffile.imwrite(tmp_path / "s.tif", series, imagej=True, metadata={"axes": "TYX"})
    monkeypatch.chdir(tmp_path)
    options = VolumeOptions(also=("csv", "ctc"))
    folder = run_volume(oracle16, Path("s.tif"), Path(name), options=options).folder
    assert folder == Path(name, "s")
    names = {path.name for path in (tmp_path / folder).iterdir()}
    assert names >= {"objects.parquet", "objects.csv", "tracks.csv", "ctc", "overview.png", "run.json"}


@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_sections_taken_for_time_points_keep_the_time_point_that_they_lie_in(
    oracle16: Segmenter, tmp_path: Path, kind: str
) -> None:
    values = np.zeros((2, 4, 2, 40, 40), np.uint16)  # t z c y x
    values[:, :, 0, 10:20, 10:20] = 1
    values[0, :, 1], values[1, :, 1] = 10, 99
    path = tmp_path / ("s.ome.tif" if kind == "tiff" else "s.zarr")
    if kind == "tiff":
        tifffile.imwrite(path, values, metadata={"axes": "TZCYX"})
    else:
        group = zarr.create_group(path, zarr_format=2)
        group.create_array("0", data=values)
        kinds = {"t": "time", "c": "channel"}
        axes = [{"name": axis, "type": kinds.get(axis, "space")} for axis in "tzcyx"]
        datasets = [{"path": "0", "coordinateTransformations": []}]
        group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    options = VolumeOptions(t=1, channel=0, series=True)
    folder = run_volume(oracle16, path, tmp_path / "out", options=options).folder
    for name in ("objects", "tracks"):
        table = pq.read_table(folder / f"{name}.parquet").to_pandas()
        (second,) = (column for column in table if column.startswith("mean_intensity") and "1" in column)
        assert set(table[second]) == {99.0}, name


def test_of_a_series_that_was_stopped_what_was_written_is_searched(
    oracle16: Segmenter, tmp_path: Path
) -> None:
    series = np.zeros((5, 40, 40), np.uint8)
    series[:, 4:14, 4:14] = 1
    tifffile.imwrite(tmp_path / "whole.ome.tif", series, metadata={"axes": "TYX"})
    with tifffile.TiffFile(tmp_path / "whole.ome.tif") as tiff:
        assert tiff.ome_metadata is not None
        announced = tiff.ome_metadata.encode()
    tifffile.imwrite(
        tmp_path / "s.ome.tif", series[:3], description=announced, metadata=None, photometric="minisblack"
    )
    summary = run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "out")
    assert "of 5 time points that the file announces, the last 2 are missing" in summary.warnings
    assert pq.read_table(summary.folder / "tracks.parquet")["t"].to_pylist() == [0, 1, 2]
    assert json.loads((summary.folder / "run.json").read_text())["input"]["file"]["lacking"] == 2


def test_daughters_name_their_mother_unless_she_is_left_out(oracle16: Segmenter, tmp_path: Path) -> None:
    """One cell divides and one of its daughters again; another one only moves."""
    series = np.zeros((5, 60, 80), np.uint8)
    for t in range(5):
        series[t, 40:50, 5 + t : 15 + t] = 9
    series[0, 10:22, 30:42] = 1
    series[1:, 12:20, 38:46] = 2
    series[1:3, 12:20, 26:34] = 3
    series[3:, 13:19, 23:29], series[3:, 13:19, 31:37] = 4, 5
    tifffile.imwrite(tmp_path / "s.tif", series, imagej=True, metadata={"axes": "TYX"})
    summary = run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out")
    objects = pq.read_table(summary.folder / "objects.parquet")
    assert objects.column_names[:6] == ["id", "score", "t_first", "t_last", "n_time_points", "parent"]
    rows = objects.select(["id", "parent", "t_first", "t_last"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1, None, 0, 0), (2, None, 0, 4), (3, 1, 1, 2), (4, 1, 1, 4), (5, 3, 3, 4), (6, 3, 3, 4)
    ]  # fmt: skip
    assert json.loads((summary.folder / "run.json").read_text())["counts"]["divisions"] == 2
    few = VolumeOptions(row_filter="area_px < 100", overwrite=True, also=("csv",))
    folder = run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out", options=few).folder
    rows = pq.read_table(folder / "objects.parquet").select(["id", "parent", "area_px"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1, None, 64), (2, None, 64), (3, 1, 36), (4, 1, 36)
    ]  # fmt: skip
    with (folder / "objects.csv").open(newline="") as file:
        assert [row["parent"] for row in csv.DictReader(file)] == ["", "", "1", "1"]
