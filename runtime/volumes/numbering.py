"""Which objects of a volume are reported, under which numbers, and what is known of each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from darcnn.runtime.measure import name_columns
from darcnn.runtime.row_filter import RowFilter
from darcnn.runtime.volumes.brightness import measure_channels
from darcnn.runtime.volumes.labels import Numbered
from darcnn.runtime.volumes.measure import measure_solids, solid_schema
from darcnn.runtime.volumes.solid import SolidFile
from darcnn.runtime.volumes.volume import VolumeInfo

__all__ = ["number_solids", "table_columns"]


def number_solids(
    solids: SolidFile, info: VolumeInfo, row_filter: RowFilter | None, *, t: int | None
) -> tuple[Numbered, pa.Table]:
    """Return the reported objects, numbered from 1 in the order z y x of their boxes, and their table.

    Args:
        solids: all that were found, of which no two share a voxel.
        info: of the volume.
        row_filter: which of them are reported; None: all.
        t: the moment that the volume was opened at.
    Raises:
        InputError: the channels of the file cannot be read any more.
    """
    order = np.lexsort(solids.boxes.T[::-1])  # by z0, then y0, x0, z1, y1, x1
    tables = list(measure_solids((solids[int(row)] for row in order), info.voxel_nm))
    table = pa.concat_tables(tables) if tables else solid_schema().empty_table()
    names = _channel_columns(info)
    if names:
        means = measure_channels(Numbered(solids, order, np.arange(1, len(order) + 1)), info, t=t)
        for name, column in zip(names, means.T, strict=True):
            table = table.append_column(name, pa.array(column, pa.float64(), from_pandas=True))
    if row_filter is not None:
        keeps = row_filter.keep(table)
        order, table = order[keeps], table.filter(pa.array(keeps))
    ids = np.arange(1, len(order) + 1)
    table = table.set_column(0, table.schema.field("id"), pa.array(ids, pa.int64()))
    return Numbered(solids, order, ids), table


def table_columns(info: VolumeInfo) -> list[str]:
    """Return the names of the columns of the table of a volume's objects."""
    return [*solid_schema().names, *_channel_columns(info)]


def _channel_columns(info: VolumeInfo) -> list[str]:
    return [f"mean_intensity_{name}" for name in name_columns(info.channel_names)]
