"""Each channel of a stack is measured over the very voxels that the labels give to an object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr

from darcnn.runtime.errors import UsageError
from darcnn.runtime.pipeline import RunSummary
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume


def write_tiff(path: Path, both: np.ndarray, axes: str) -> Path:
    metadata = {"axes": axes, "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(path, both.astype(np.uint16), metadata=metadata)
    return path


def write_zarr(path: Path, both: np.ndarray, axes: str) -> Path:
    group = zarr.create_group(path, zarr_format=2)
    chunks = tuple(4 if axis in "zt" else size for axis, size in zip(axes.lower(), both.shape, strict=True))
    group.create_array("0", data=both.astype(np.uint16), chunks=chunks)
    kinds = {"t": "time", "c": "channel"}
    group.attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes.lower()],
            "datasets": [{"path": "0", "coordinateTransformations": []}],
        }
    ]
    group.attrs["omero"] = {"channels": [{"label": "DAPI"}, {"label": "GFP"}]}
    return path


def check(summary: RunSummary, both: np.ndarray) -> int:
    """Compare the table with means over the labels; `both` is (planes, C, H, W)."""
    table = pq.read_table(summary.folder / "objects.parquet").to_pandas()
    labels = np.asarray(zarr.open_array(summary.folder / "labels.ome.zarr/0", mode="r")[:])
    for channel, name in ((0, ""), (0, "_DAPI"), (1, "_GFP")):  # the first one was searched
        expected = [both[:, channel][labels == number].mean() for number in table.id]
        assert np.allclose(table[f"mean_intensity{name}"], expected)
    return len(table)


@pytest.mark.parametrize(("write", "name"), [(write_tiff, "s.ome.tif"), (write_zarr, "s.zarr")])
@pytest.mark.parametrize("axes", ["ZCYX", "TCYX"])
def test_each_channel_is_measured_over_the_labels(oracle16: Segmenter, balls, tmp_path, write, name, axes):
    rng = np.random.default_rng(0)
    both = np.stack([balls, rng.integers(0, 5000, balls.shape)], axis=1)  # the second is measured only
    path = write(tmp_path / name, both, axes)
    summary = run_volume(oracle16, path, tmp_path / "out", options=VolumeOptions(channel="DAPI"))
    n_objects = check(summary, both)
    assert n_objects > 3
    marked = VolumeOptions(channel="DAPI", row_filter="mean_intensity_GFP > 2500", overwrite=True)
    assert 0 < check(run_volume(oracle16, path, tmp_path / "out", options=marked), both) < n_objects


def test_values_that_are_not_finite_do_not_count(oracle16: Segmenter, balls, tmp_path) -> None:
    holes = balls.astype(np.float32)
    holes[5:7, :, ::2] = np.nan
    holes[balls == 3] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", holes, metadata={"axes": "ZYX"})
    summary = run_volume(oracle16, tmp_path / "a.tif", tmp_path / "out")
    table = pq.read_table(summary.folder / "objects.parquet").to_pandas()
    labels = np.asarray(zarr.open_array(summary.folder / "labels.ome.zarr/0", mode="r")[:])
    for number, mean in zip(table.id, table.mean_intensity, strict=True):
        values = holes[labels == number]
        values = values[np.isfinite(values)]
        assert mean == pytest.approx(values.mean()) if len(values) else np.isnan(mean)


def test_a_filter_on_a_channel_that_is_not_there_is_one_line(oracle16: Segmenter, balls, tmp_path) -> None:
    path = write_tiff(tmp_path / "s.ome.tif", np.stack([balls, balls], axis=1), "ZCYX")
    options = VolumeOptions(channel=0, row_filter="mean_intensity_RFP > 3")
    with pytest.raises(UsageError, match="no column mean_intensity_RFP"):
        run_volume(oracle16, path, tmp_path / "out", options=options)
    assert not (tmp_path / "out" / "s").exists()
