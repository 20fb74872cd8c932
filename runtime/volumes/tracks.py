"""Of a series: where each object lies at each time point, how large and how bright it is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.geometry import Region
from darcnn.runtime.masks import label_instances
from darcnn.runtime.measure import measure, object_schema
from darcnn.runtime.readers.base import make_channel_names
from darcnn.runtime.volumes.channels import read_channels
from darcnn.runtime.volumes.labels import Numbered, draw_planes
from darcnn.runtime.volumes.volume import Volume, VolumeInfo

__all__ = ["as_tracks", "measure_tracks", "tracks_schema"]

_SAME = ("id", "score")
_PLACE = ("y", "x", "bbox_y0", "bbox_x0", "bbox_y1", "bbox_x1")
_OF_SPACE = ("sphericity", "volume_nm3", "diameter_nm", "major_axis_nm", "middle_axis_nm", "minor_axis_nm")


def as_tracks(table: pa.Table, info: VolumeInfo) -> pa.Table:
    """Return the table of the solids of a series with what is true of objects in time.

    `t_first` and `t_last` are time points, `n_time_points` counts those with the object, `y` and
    `x` are the mean place of its pixels, `area_px` is its mean area (`area_um2`: null without a pixel size).
    """
    n_found = table["n_planes"].to_numpy().astype(np.float64)
    area = table["volume_voxels"].to_numpy() / np.maximum(n_found, 1.0)
    um2 = np.full(len(area), np.nan) if info.pixel_um is None else area * float(np.prod(info.pixel_um))
    columns = {name: table[name] for name in _SAME}
    columns["t_first"] = table["bbox_z0"]
    columns["t_last"] = pa.array(table["bbox_z1"].to_numpy() - 1, pa.int32())
    columns["n_time_points"] = table["n_planes"]
    columns |= {name: table[name] for name in _PLACE}
    columns["area_px"] = pa.array(area, pa.float64())
    columns["area_um2"] = pa.array(um2, pa.float64(), from_pandas=True)
    gone = {*columns, *_OF_SPACE, "z", "bbox_z0", "bbox_z1", "volume_voxels", "n_planes"}
    columns |= {name: table[name] for name in table.column_names if name not in gone}
    return pa.table(columns)


def tracks_schema(info: VolumeInfo) -> pa.Schema:
    """Return the columns of the table of tracks: those of a slide's objects, `t` and `time_s` behind `id`."""
    schema = object_schema(_names(info)).insert(1, pa.field("t", pa.int32()))
    return schema.insert(2, pa.field("time_s", pa.float64()))


def measure_tracks(numbered: Numbered, volume: Volume) -> Iterator[pa.Table]:
    """Yield a table of `tracks_schema` for each time point on which there are objects, in order of time.

    `id` is the number of the object; a time point on which an object was missed has no row of it. `time_s`
    counts from the first time point, where the file tells the interval. Lengths are in pixels, and in
    micrometres where the pixel size is known. `score` is that of the object in all, and `truncated` says that
    the edge of the image cuts it at this time point.

    Args:
        numbered: the objects of a series, numbered from 1 without a gap.
        volume: open; stays open. Its planes are read once more, one after another.
    Raises:
        InputError: the file cannot be read any more.
    """
    info = volume.info
    _, height, width = info.shape
    schema, names = tracks_schema(info), _names(info)
    mpp = None if info.pixel_um is None else info.pixel_um[::-1]
    scores = numbered.solids.scores[numbered.rows]
    planes = zip(draw_planes(numbered, info.shape), read_channels(info), strict=True)
    for moment, (labels, channels) in enumerate(planes):
        if not labels.any():
            continue
        ids = np.unique(labels[labels > 0]).astype(np.int64)
        found = label_instances(labels.astype(np.int64))
        found = replace(found, scores=scores[ids - 1], truncated=_is_cut(found.boxes, width, height))
        pixels = channels if info.several_channels else volume.read("z", moment)[:, :, None]
        table = measure(found, pixels, Region(0, 0, width, height), (1.0, 1.0), names, mpp)
        table = table.set_column(0, "id", pa.array(ids))
        table = table.add_column(1, "t", pa.array(np.full(len(ids), moment, np.int32)))
        time_s = None if info.frame_interval_s is None else moment * info.frame_interval_s
        yield table.add_column(2, "time_s", pa.array([time_s] * len(ids), pa.float64())).cast(schema)


def _is_cut(boxes: NDArray[np.float32], width: int, height: int) -> NDArray[np.bool_]:
    cut: NDArray[np.bool_] = np.array(np.c_[boxes[:, :2] <= 0, boxes[:, 2:] >= (width, height)].any(axis=1))
    return cut


def _names(info: VolumeInfo) -> tuple[str, ...]:
    return info.channel_names or make_channel_names((), 1, is_rgb=False)
