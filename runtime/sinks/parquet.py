"""The table of objects as GeoParquet: one row an object, written and read row group by row group."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from darcnn.runtime.errors import OutputError
from darcnn.runtime.sinks.atomic import atomic_file

__all__ = ["count_objects", "open_table", "read_objects", "write_parquet"]

_GEOPARQUET = "1.1.0"
_ROWS = 65536  # at most so many objects are in memory at once
_COMPRESSION = "zstd"


def write_parquet(path: Path, parts: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write `parts`, one after another, as the GeoParquet 1.1 file `path`; return the number of rows.

    The column `geometry` holds WKB polygons in pixels, so there is no coordinate reference system:
    `crs` is null.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    n_rows, extents = 0, []
    with (
        atomic_file(path) as file,
        # without Arrow's own copy of the schema, which would hide the file's metadata (`geo`) from pyarrow
        pq.ParquetWriter(file, schema, compression=_COMPRESSION, version="2.6", store_schema=False) as writer,
    ):
        for part in parts:
            if part.num_rows:
                writer.write_table(part.cast(schema), row_group_size=_ROWS)
                extents.append(shapely.total_bounds(_polygons(part)))
                n_rows += part.num_rows
        writer.add_key_value_metadata({"geo": json.dumps(_geo(extents))})
    return n_rows


@contextmanager
def open_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open the table at `path`, whatever its name: pyarrow takes paths with `~` or `:` for other places.

    Raises:
        OutputError: it is cut off or holds something else.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as table:
            yield table
    except pa.ArrowInvalid as err:
        raise OutputError("is damaged", where=path, fix="pass --overwrite --restart to make it anew") from err


def count_objects(path: Path) -> int:
    """Return the number of rows of the table at `path`; raises as `open_table`."""
    with open_table(path) as table:
        return int(table.metadata.num_rows)


def read_objects(
    path: Path, columns: Sequence[str] | None = None, *, rows_px0: tuple[int, int] | None = None
) -> Iterator[pa.Table]:
    """Yield the table at `path` row group by row group, with `columns` only.

    With `rows_px0` (y0, y1), row groups without an object in these level-0 rows are not read; those
    that are read still hold objects elsewhere. Raises as `open_table`.
    """
    with open_table(path) as file:
        for index in range(file.metadata.num_row_groups):
            if rows_px0 is None or _reaches(file, index, rows_px0):
                yield file.read_row_group(index, columns=None if columns is None else list(columns))


def _reaches(file: pq.ParquetFile, index: int, rows_px0: tuple[int, int]) -> bool:
    group = file.metadata.row_group(index)
    names = file.schema_arrow.names
    top = group.column(names.index("bbox_y0")).statistics
    bottom = group.column(names.index("bbox_y1")).statistics
    return bool(top.min < rows_px0[1] and bottom.max > rows_px0[0])


def _polygons(part: pa.Table) -> NDArray[np.object_]:
    polygons: NDArray[np.object_] = shapely.from_wkb(part["geometry"].to_numpy())
    return polygons


def _geo(extents: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}
    if extents:
        edges = np.stack(extents)  # (parts, 4) x0 y0 x1 y1
        column["bbox"] = [*edges[:, :2].min(axis=0).tolist(), *edges[:, 2:].max(axis=0).tolist()]
    return {"version": _GEOPARQUET, "primary_column": "geometry", "columns": {"geometry": column}}
