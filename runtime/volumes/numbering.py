"""Which objects of a volume are reported, under which numbers, and what is known of each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.measure import name_columns
from darcnn.runtime.row_filter import RowFilter
from darcnn.runtime.volumes.brightness import measure_brightness
from darcnn.runtime.volumes.joining import Joined
from darcnn.runtime.volumes.labels import Numbered
from darcnn.runtime.volumes.measure import measure_solids, solid_schema
from darcnn.runtime.volumes.tracks import as_tracks
from darcnn.runtime.volumes.volume import Volume, VolumeInfo

__all__ = ["number_solids", "table_columns"]

_BRIGHTNESS = "mean_intensity"
_BEFORE_PARENT = "n_time_points"


def number_solids(joined: Joined, volume: Volume, row_filter: RowFilter | None) -> tuple[Numbered, pa.Table]:
    """Return the reported objects, numbered from 1 in the order z y x of their boxes, and their table.

    Args:
        joined: all that were found, of which no two share a voxel.
        volume: open; stays open.
        row_filter: which of them are reported; None: all.
    Raises:
        InputError: the file cannot be read any more.
    """
    solids = joined.solids
    order = np.lexsort(solids.boxes.T[::-1])  # by z0, then y0, x0, z1, y1, x1
    tables = list(measure_solids((solids[int(row)] for row in order), volume.info.voxel_nm))
    table = pa.concat_tables(tables) if tables else solid_schema().empty_table()
    everything = Numbered(solids, order, np.arange(1, len(order) + 1))
    first, *others = measure_brightness(everything, volume).T
    table = _with_column(table, _BRIGHTNESS, first)
    for name, means in zip(_channel_columns(volume.info), others, strict=True):
        table = _with_column(table, name, means)
    if volume.info.is_series:
        table = as_tracks(table, volume.info)
    if row_filter is not None:
        keeps = row_filter.keep(table)
        order, table = order[keeps], table.filter(pa.array(keeps))
    ids = np.arange(1, len(order) + 1)
    table = table.set_column(0, table.schema.field("id"), pa.array(ids, pa.int64()))
    if joined.parents is not None:
        id_of = np.zeros(len(solids) + 1, np.int64)  # 0: not reported; the last is that of nobody, -1
        id_of[order] = ids
        mothers = id_of[joined.parents[order]]
        column = pa.array(mothers, pa.int64(), mask=mothers == 0)
        table = table.add_column(table.schema.get_field_index(_BEFORE_PARENT) + 1, "parent", column)
    return Numbered(solids, order, ids), table


def _with_column(table: pa.Table, name: str, values: NDArray[np.float64]) -> pa.Table:
    """Return the table with a column in place of one of that name, or behind all others; NaN is null."""
    column = pa.array(values, pa.float64(), from_pandas=True)
    at = table.schema.get_field_index(name)
    return table.append_column(name, column) if at < 0 else table.set_column(at, name, column)


def table_columns(info: VolumeInfo) -> list[str]:
    """Return the names of the columns of the table of a volume's objects."""
    empty = solid_schema().empty_table()
    for name in _channel_columns(info):
        empty = _with_column(empty, name, np.zeros(0))
    return list((as_tracks(empty, info) if info.is_series else empty).column_names)


def _channel_columns(info: VolumeInfo) -> list[str]:
    return [f"{_BRIGHTNESS}_{name}" for name in name_columns(info.several_channels)]
