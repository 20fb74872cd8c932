"""What a run writes into the folder of a slide, made of the objects that were found."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from darcnn.runtime.closing import Closing
from darcnn.runtime.geometry import Grid, Region
from darcnn.runtime.manifest import Manifest
from darcnn.runtime.measure import object_schema
from darcnn.runtime.readers.protocol import Pixels, Reader, SlideInfo
from darcnn.runtime.rows import SlideTask
from darcnn.runtime.sinks.atomic import translated
from darcnn.runtime.sinks.geojson import write_geojson
from darcnn.runtime.sinks.labels_tiff import write_labels_tiff
from darcnn.runtime.sinks.ome_zarr import write_label_pyramid
from darcnn.runtime.sinks.overview import write_overview
from darcnn.runtime.sinks.parquet import write_parquet
from darcnn.runtime.sinks.result_folder import (
    CSV_FILE,
    GEOJSON_FILE,
    LABELS_FOLDER,
    LABELS_TIFF,
    OVERVIEW_FILE,
    TABLE_FILE,
    hold_folder,
)
from darcnn.runtime.sinks.table_csv import write_csv
from darcnn.runtime.tally import Tally

__all__ = ["add_formats", "write_outputs"]

_EXTRA_FILES = {"csv": CSV_FILE, "labels-tiff": LABELS_TIFF}


def write_outputs(
    folder: Path,
    rows: Iterable[pa.Table],
    reader: Reader,
    task: SlideTask,
    *,
    model: Manifest,
    also: Sequence[str],
    tally: Tally,
    plane: tuple[int, int] = (0, 0),
) -> None:
    """Write all that `rows`, the final objects, are given out as; memory does not grow with the slide.

    Args:
        folder: where to.
        rows: tables of `object_schema`, in order.
        reader: the open slide; stays open.
        task: what the rows were found with.
        model: its name is the class of the objects.
        also: formats beyond the usual ones, of `EXTRA_FORMATS`.
        tally: takes the time of each; knows the damaged tiles, which the overview shows.
        plane: of a stack or a series that `reader` is (z, t).
    Raises:
        InputError: the slide cannot be read.
        OSError: something cannot be written.
    """
    with tally.stage("table"):
        write_parquet(folder / TABLE_FILE, rows, object_schema(reader.info.channel_names))
    files = _Files(folder, reader, task, model, tally, plane)
    # outlines and picture are for a good part decoding and packing, which leave the interpreter to the others
    with ThreadPoolExecutor(2, "darcnn-output") as pool:
        others = [pool.submit(files.write_outlines), pool.submit(files.draw_overview)]
        try:
            files.write_labels()
            for other in others:
                other.result()
        finally:
            files.stop.set()  # an error or Ctrl-C does not wait for the rest of them
    with tally.stage("also"):
        for extra in also:
            _write_extra(extra, folder, mpp=task.mpp, name=reader.info.name)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a result that are made of its table; each may be written in a thread of its own."""

    folder: Path
    reader: Reader
    task: SlideTask
    model: Manifest
    tally: Tally
    plane: tuple[int, int]
    stop: threading.Event = field(
        default_factory=threading.Event
    )  # once set, outlines and picture are given up

    def write_labels(self) -> None:
        info = self.reader.info
        with self.tally.stage("labels"):
            write_label_pyramid(
                self.folder / LABELS_FOLDER,
                self.folder / TABLE_FILE,
                shape=(info.height_px0, info.width_px0),
                grid=_label_grid(info, self.task.mpp),
                name=info.name,
            )

    def write_outlines(self) -> None:
        info = self.reader.info
        with self.tally.stage("geojson"):
            write_geojson(
                self.folder / GEOJSON_FILE,
                self.folder / TABLE_FILE,
                slide_name=info.name,
                class_name=self.model.name,
                origin_px0=info.origin_px0,
                plane=self.plane,
                stop=self.stop,
            )

    def draw_overview(self) -> None:
        with self.tally.stage("overview"):
            write_overview(
                self.folder / OVERVIEW_FILE,
                self.folder / TABLE_FILE,
                _UntilStopped(self.reader, self.stop),
                window=self.task.window,
                channel=self.task.plan.channel,
                channels=self.model.input.channels,
                model_name=self.model.name,
                mpp=self.task.mpp,
                unreadable=tuple(self.tally.unreadable.values()),
            )


def _label_grid(info: SlideInfo, mpp: tuple[float, float] | None) -> Grid:
    """Return where labels lie: where the file has its pixels, in its units, unless `--mpp` says otherwise."""
    if info.grid is not None and mpp == info.mpp:
        return info.grid
    return Grid.of_steps(None if mpp is None else mpp[::-1], "micrometer", n_axes=2)  # y x


class _UntilStopped(Closing):
    """Another reader's pixels, until the event says that nobody wants them any more."""

    def __init__(self, reader: Reader, stop: threading.Event) -> None:
        self._reader, self._stop = reader, stop

    @property
    def info(self) -> SlideInfo:
        return self._reader.info

    def read(self, region: Region, *, level: int) -> Pixels:
        if self._stop.is_set():
            raise CancelledError
        return self._reader.read(region, level=level)

    def close(self) -> None:
        self._reader.close()


def add_formats(folder: Path, record: dict[str, Any], also: Sequence[str]) -> None:
    """Write into a complete result the formats of `also` that it lacks; no object is found again.

    Args:
        folder: of the result.
        record: its run.json.
        also: of `EXTRA_FORMATS`.
    Raises:
        OutputError: the folder is in use, or cannot be written.
    """
    missing = [extra for extra in also if not (folder / _EXTRA_FILES[extra]).exists()]
    if not missing:
        return
    source = record["input"]
    mpp = None if source["mpp_xy"] is None else (source["mpp_xy"][0], source["mpp_xy"][1])
    with hold_folder(folder), translated(folder):
        for extra in missing:
            _write_extra(extra, folder, mpp=mpp, name=source["name"])


def _write_extra(extra: str, folder: Path, *, mpp: tuple[float, float] | None, name: str) -> None:
    if extra == "csv":
        write_csv(folder / CSV_FILE, folder / TABLE_FILE)
    else:
        write_labels_tiff(folder / LABELS_TIFF, folder / LABELS_FOLDER, mpp=mpp, name=name)
