"""From an open slide to a folder of results: find, measure, number, write."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.diameter import choose_diameter
from darcnn.runtime.fit import ModelFit
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import Window
from darcnn.runtime.measure import measure_on_slide, object_schema
from darcnn.runtime.parts import Parts, with_tile
from darcnn.runtime.planning import find_channel
from darcnn.runtime.readers.protocol import Reader, SlideInfo
from darcnn.runtime.record import (
    describe_plan,
    describe_slide,
    fingerprint,
    fingerprint_pixels,
    make_record,
    model_hash,
    read_record,
)
from darcnn.runtime.row_filter import parse_filter
from darcnn.runtime.seams import lies_near_seam
from darcnn.runtime.segmenter import Segmenter, SlidePlan
from darcnn.runtime.sinks.atomic import atomic_file, translated
from darcnn.runtime.sinks.geojson import write_geojson
from darcnn.runtime.sinks.ome_zarr import write_label_pyramid
from darcnn.runtime.sinks.overview import write_overview
from darcnn.runtime.sinks.parquet import write_parquet
from darcnn.runtime.sinks.result_folder import (
    GEOJSON_FILE,
    LABELS_FOLDER,
    OVERVIEW_FILE,
    RUN_FILE,
    TABLE_FILE,
    ResultFolder,
    claim_folder,
    make_folder_name,
)
from darcnn.runtime.tiling import Tile

__all__ = ["RunOptions", "RunSummary", "run_slide"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a user may choose for a run."""

    mpp: float | None = None  # micrometres per level-0 pixel, in place of what the file says
    pixels: bool = False  # take the pixels as they are, whatever their size
    diameter_px: float | Literal["auto"] | None = None  # of a typical object, level-0 pixels; auto: estimated
    channel: int | str | None = None  # number or name
    z: int | None = None  # the plane that the reader was opened at; recorded
    t: int | None = None  # the moment, likewise
    row_filter: str | None = None  # a condition on the measurements of the objects that are reported
    overwrite: bool = False  # replace a complete result
    restart: bool = False  # begin anew where an earlier try stopped


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What came of one slide."""

    name: str
    folder: Path
    overview: Path
    n_objects: int
    seconds: float
    megapixels: float  # of level 0
    warnings: tuple[str, ...]
    was_done: bool = False  # by an earlier run that asked for the same


@dataclass(slots=True)
class _Tally:
    """What is counted and timed on the way."""

    fit: ModelFit
    n_objects: int = 0
    n_truncated: int = 0
    n_tiles_with_objects: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def count(self, table: pa.Table, tiles: NDArray[np.int64]) -> None:
        """Take the final objects of a row of tiles, and the tile of each."""
        self.n_objects += table.num_rows
        self.n_truncated += int(table["truncated"].to_numpy().sum())
        self.n_tiles_with_objects += len(np.unique(tiles))
        self.fit.add(*(table[name].to_numpy().astype(np.float64) for name in ("area_px", "score")))


def run_slide(
    segmenter: Segmenter,
    reader: Reader,
    out_dir: Path,
    *,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunSummary:
    """Find the objects of one slide and write them to `out_dir`/<slide name>/.

    The folder is complete when run.json is in it. Each row of tiles goes to a part file, and the outputs are
    made of those: memory does not grow with the slide, and a run that was stopped or killed goes on with the
    rows that it lacks and ends with the same objects, labels and outlines. An earlier result, about to be
    overwritten, stays until then.

    Args:
        segmenter: the model.
        reader: the open slide; stays open.
        out_dir: made if it is not there.
        options: None for the defaults.
        progress: called with (tiles done, tiles in all) after each tile.
    Raises:
        InputError: the slide cannot be read, or its pixel size or channels do not serve.
        UsageError: an option is out of range.
        OutputError: the results cannot be written, or exist.
    """
    chosen, info = options or RunOptions(), reader.info
    start = time.perf_counter()
    channel = find_channel(info, chosen.channel)
    folder = out_dir / make_folder_name(info.name)
    row_filter = None
    if chosen.row_filter is not None:
        row_filter = parse_filter(chosen.row_filter, object_schema(info.channel_names).names)
    asked = _asked(segmenter, reader, chosen)
    final = {**asked, "filter": chosen.row_filter}
    if not chosen.overwrite and (earlier := read_record(folder / RUN_FILE, final)) is not None:
        return RunSummary(
            info.name,
            folder,
            folder / OVERVIEW_FILE,
            earlier["counts"]["objects"],
            time.perf_counter() - start,
            info.width_px0 * info.height_px0 / 1e6,
            (),
            was_done=True,
        )
    _check_plan(segmenter, info, chosen, channel)
    with claim_folder(folder, overwrite=chosen.overwrite, restart=chosen.restart) as claimed:
        parts = Parts(claimed.parts)
        noted = parts.begin(asked)
        before = time.perf_counter()
        diameter_px = noted["diameter_px"] if noted else _diameter(segmenter, reader, chosen, channel)
        plan = segmenter.plan(
            info, mpp=chosen.mpp, diameter_px=diameter_px, pixels=chosen.pixels, channel=channel
        )
        tally = _Tally(ModelFit(segmenter.manifest.input.nominal_diameter_px / plan.scale))
        tally.seconds["diameter"] = time.perf_counter() - before
        mpp = info.mpp if chosen.mpp is None else (chosen.mpp, chosen.mpp)
        with tally.stage("intensity"):
            window = segmenter.measure(reader, plan)
        with translated(folder):
            parts.note(asked, {"diameter_px": diameter_px})
        rows = _find_rows(segmenter, reader, plan, window, parts, mpp, tally, progress, folder)
        final_rows = _counted(parts.read(rows, row_filter), tally)
        _write_outputs(segmenter, reader, plan, window, claimed, final_rows, mpp, tally)
        warnings = _warnings(tally, mpp)
        record = make_record(
            segmenter,
            asked=final,
            source=describe_slide(info, plan, asked["slide"]),
            network=describe_plan(plan, diameter_px),
            counts={
                "objects": tally.n_objects,
                "truncated": tally.n_truncated,
                "tiles": len(plan.tiles),
                "tiles_with_objects": tally.n_tiles_with_objects,
            },
            seconds=dict(tally.seconds),
            warnings=warnings,
        )
        with translated(folder):
            with atomic_file(claimed.built / RUN_FILE) as file:
                file.write(record)
            claimed.commit()
    megapixels = info.width_px0 * info.height_px0 / 1e6
    seconds = time.perf_counter() - start
    return RunSummary(
        info.name, folder, folder / OVERVIEW_FILE, tally.n_objects, seconds, megapixels, warnings
    )


def _asked(segmenter: Segmenter, reader: Reader, chosen: RunOptions) -> dict[str, Any]:
    """Return all that the objects depend on: parts of an earlier try are used only if it asked the same."""
    others = ("overwrite", "restart", "row_filter")
    options = {key: value for key, value in asdict(chosen).items() if key not in others}
    return {
        "model": model_hash(segmenter.manifest),
        "min_score": segmenter.min_score,
        "slide": fingerprint_pixels(reader) if reader.info.path is None else fingerprint(reader.info.path),
        "size": [reader.info.width_px0, reader.info.height_px0],
        "options": options,
    }


def _check_plan(segmenter: Segmenter, info: SlideInfo, chosen: RunOptions, channel: int | None) -> None:
    """Raise what is wrong with the slide or the options before anything is made or looked at."""
    nominal = segmenter.manifest.input.nominal_diameter_px
    diameter_px = nominal if chosen.diameter_px == "auto" else chosen.diameter_px
    segmenter.plan(info, mpp=chosen.mpp, diameter_px=diameter_px, pixels=chosen.pixels, channel=channel)


def _diameter(segmenter: Segmenter, reader: Reader, chosen: RunOptions, channel: int | None) -> float | None:
    return choose_diameter(
        segmenter,
        reader,
        diameter_px=chosen.diameter_px,
        is_scale_given=chosen.pixels or chosen.mpp is not None,
        channel=channel,
    )


def _find_rows(
    segmenter: Segmenter,
    reader: Reader,
    plan: SlidePlan,
    window: Window,
    parts: Parts,
    mpp: tuple[float, float] | None,
    tally: _Tally,
    progress: Progress | None,
    folder: Path,
) -> int:
    """Write a part for each row of tiles that has none yet, and return the number of rows.

    No engine call spans two rows: what goes into one depends on the slide, not on where a run was stopped.
    """
    done = n_rows = 0
    for row, (_, group) in enumerate(groupby(plan.tiles, key=lambda tile: tile.core.y0)):
        tiles, n_rows = list(group), row + 1
        if not parts.has(row):
            tables = []
            for tile, instances in _timed(segmenter.stream(reader, plan, tiles=tiles, window=window), tally):
                with tally.stage("measure"):
                    tables.append(_measure_tile(tile, instances, reader, plan, mpp))
                if progress is not None:
                    progress(done + len(tables), len(plan.tiles))
            with tally.stage("parts"), translated(folder):
                parts.write(row, pa.concat_tables(tables))
        elif progress is not None:
            progress(done + len(tiles), len(plan.tiles))
        done += len(tiles)
    return n_rows


def _timed(stream: Iterator[tuple[Tile, Instances]], tally: _Tally) -> Iterator[tuple[Tile, Instances]]:
    while True:
        with tally.stage("detect"):
            found = next(stream, None)
        if found is None:
            return
        yield found


def _measure_tile(
    tile: Tile, instances: Instances, reader: Reader, plan: SlidePlan, mpp: tuple[float, float] | None
) -> pa.Table:
    """Measure the objects of one tile, for its part file."""
    height, width = instances.shape
    near = lies_near_seam(
        tile,
        instances.boxes,
        factor=(width / plan.width, height / plan.height),
        extent=(plan.width, plan.height),
    )
    return with_tile(measure_on_slide(instances, reader, plan.level, mpp), tile.index, near)


def _counted(rows: Iterator[tuple[pa.Table, NDArray[np.int64]]], tally: _Tally) -> Iterator[pa.Table]:
    """Yield the final objects row by row, and count them."""
    for table, tiles in rows:
        tally.count(table, tiles)
        yield table


def _write_outputs(
    segmenter: Segmenter,
    reader: Reader,
    plan: SlidePlan,
    window: Window,
    claimed: ResultFolder,
    rows: Iterator[pa.Table],
    mpp: tuple[float, float] | None,
    tally: _Tally,
) -> None:
    info, built, model = reader.info, claimed.built, segmenter.manifest.name
    table = built / TABLE_FILE
    with translated(claimed.path):
        with tally.stage("table"):
            write_parquet(table, rows, object_schema(info.channel_names))
        with tally.stage("geojson"):
            write_geojson(built / GEOJSON_FILE, table, slide_name=info.name, class_name=model)
        with tally.stage("labels"):
            shape = (info.height_px0, info.width_px0)
            write_label_pyramid(built / LABELS_FOLDER, table, shape=shape, mpp=mpp, name=info.name)
        with tally.stage("overview"):
            write_overview(
                built / OVERVIEW_FILE,
                table,
                reader,
                window=window,
                channel=plan.channel,
                model_name=model,
                mpp=mpp,
            )


def _warnings(tally: _Tally, mpp: tuple[float, float] | None) -> tuple[str, ...]:
    warnings = []
    if not tally.n_objects:
        warnings.append("no objects found")
    if tally.n_truncated:
        warnings.append(f"{tally.n_truncated} objects reach beyond their tile and may be cut")
    warnings.extend(tally.fit.warnings())
    if mpp is None:
        warnings.append("pixel size unknown: micrometre columns are empty")
    return tuple(warnings)
