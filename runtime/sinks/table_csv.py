"""The table of objects as CSV, for spreadsheets: all columns but the outline."""

from __future__ import annotations

from pathlib import Path

from pyarrow import csv

from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.sinks.parquet import open_table, read_objects

__all__ = ["write_csv"]

_OUTLINE = "geometry"


def write_csv(path: Path, objects: Path) -> None:
    """Write the table `objects` (objects.parquet) as comma-separated values; what is not known is empty.

    Raises:
        OutputError: the table is damaged.
        OSError: the file cannot be written; nothing is left behind.
    """
    with open_table(objects) as table:
        schema = table.schema_arrow
    if _OUTLINE in schema.names:  # objects of volumes have none
        schema = schema.remove(schema.get_field_index(_OUTLINE))
    with atomic_file(path) as file, csv.CSVWriter(file, schema) as writer:
        for part in read_objects(objects, schema.names):
            writer.write_table(part.select(schema.names).cast(schema))
