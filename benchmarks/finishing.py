"""How long does it take, and how much memory, to write the outputs of very many objects?

    python benchmarks/finishing.py out/CMU-1-Small-Region/objects.parquet --objects 1000000

The objects of a real result are laid side by side on an empty slide as large as it takes, as part files of
rows of tiles; then the table, and at once the GeoJSON and the labels are written, as a run writes them.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from darcnn.runtime.geometry import Grid
from darcnn.runtime.parts import Parts, with_tile
from darcnn.runtime.sinks.geojson import write_geojson
from darcnn.runtime.sinks.ome_zarr import write_label_pyramid
from darcnn.runtime.sinks.parquet import write_parquet

_TILE_ROW_PX = 416  # a row of tiles of `nuclei-he` on a slide of 0.25 um a pixel


@click.command()
@click.argument("table", type=click.Path(path_type=Path, exists=True))
@click.option("--objects", type=int, default=1_000_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(table: Path, objects: int, out: Path | None) -> None:
    """Time the outputs of so many objects, made of those in TABLE."""
    source = pq.read_table(table)
    width, height = (math.ceil(max(source[f"bbox_{axis}1"].to_pylist())) + 8 for axis in "xy")
    side = math.ceil(math.sqrt(objects / source.num_rows))  # copies along each axis
    folder = Path(tempfile.mkdtemp())
    record: dict[str, object] = {"objects": side * side * source.num_rows, "cores": os.cpu_count()}
    record["side_px"] = [side * width, side * height]
    try:
        parts, n_rows = Parts(folder), 0
        for row in range(side):
            copies = pa.concat_tables(
                [_shift(source, column * width, row * height) for column in range(side)]
            )
            tile_row = (copies["y"].to_numpy() - row * height) // _TILE_ROW_PX
            for number in range(int(tile_row.max()) + 1):
                parts.write(n_rows, copies.filter(pa.array(tile_row == number)))
                n_rows += 1
        record["peak_before_gb"] = round(_peak_gb(), 2)
        with _timed(record, "table"):
            rows = (final.table for final in parts.read(n_rows))
            write_parquet(folder / "objects.parquet", rows, source.schema.remove_metadata())
        made, shape = folder / "objects.parquet", (side * height, side * width)
        grid = Grid.of_steps(None, "micrometer", n_axes=2)
        with _timed(record, "geojson and labels"), ThreadPoolExecutor(1) as pool:
            features = pool.submit(
                write_geojson, folder / "a.geojson.gz", made, slide_name="a", class_name="b"
            )
            write_label_pyramid(folder / "labels.ome.zarr", made, shape=shape, grid=grid, name="a")
            features.result()
        record["peak_gb"] = round(_peak_gb(), 2)
        record["load"] = os.getloadavg()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    click.echo(json.dumps(record, indent=1))
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


@contextmanager
def _timed(record: dict[str, object], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    record[f"{name}_s"] = round(time.perf_counter() - wall, 1)
    record[f"{name}_cpu_s"] = round(time.process_time() - cpu, 1)


def _shift(table: pa.Table, x: int, y: int) -> pa.Table:
    moved = shapely.transform(
        shapely.from_wkb(table["geometry"].to_numpy()), lambda points: points + np.array((x, y))
    )
    columns = {"geometry": pa.array(shapely.to_wkb(moved), pa.binary())}
    for name, by in (
        ("x", x),
        ("y", y),
        *((f"bbox_{a}{n}", b) for a, b in (("x", x), ("y", y)) for n in "01"),
    ):
        columns[name] = pa.array(table[name].to_numpy() + by, table.schema.field(name).type)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    return with_tile(table, 0, np.zeros(table.num_rows, np.bool_))


def _peak_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6


if __name__ == "__main__":
    from one_line import run

    run(main)
