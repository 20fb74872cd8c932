"""From an open slide to a folder of results: find, measure, number, write."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from darcnn.runtime.diameter import choose_diameter
from darcnn.runtime.errors import UsageError
from darcnn.runtime.fit import ModelFit
from darcnn.runtime.geometry import Region
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import Window
from darcnn.runtime.measure import measure, object_schema
from darcnn.runtime.readers.protocol import Reader, SlideInfo
from darcnn.runtime.record import make_record
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

_BLOCK_PX = 4096  # side of what is read at once to measure brightness, pixels of the level

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
    overwrite: bool = False  # replace a complete result


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


@dataclass(slots=True)
class _Tally:
    """What is counted and timed on the way."""

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


def run_slide(
    segmenter: Segmenter,
    reader: Reader,
    out_dir: Path,
    *,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> RunSummary:
    """Find the objects of one slide and write them to `out_dir`/<slide name>/.

    The folder is complete when run.json is in it. If anything fails nothing of this run stays, and an
    earlier result, about to be overwritten, does. Memory does not grow with the slide: each row of
    tiles goes to a part file, and the outputs are made of those.

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
    chosen, info, tally = options or RunOptions(), reader.info, _Tally()
    start = time.perf_counter()
    channel = _find_channel(info, chosen.channel)
    with tally.stage("diameter"):
        diameter_px = choose_diameter(
            segmenter,
            reader,
            diameter_px=chosen.diameter_px,
            is_scale_given=chosen.pixels or chosen.mpp is not None,
            channel=channel,
        )
    plan = segmenter.plan(
        info, mpp=chosen.mpp, diameter_px=diameter_px, pixels=chosen.pixels, channel=channel
    )
    mpp = info.mpp if chosen.mpp is None else (chosen.mpp, chosen.mpp)
    fit = ModelFit(segmenter.manifest.input.nominal_diameter_px / plan.scale)
    folder = out_dir / make_folder_name(info.name)
    with claim_folder(folder, overwrite=chosen.overwrite) as claimed:
        with tally.stage("intensity"):
            window = segmenter.measure(reader, plan)
        found = _find(segmenter, reader, plan, window, tally)
        measured = _measured(found, reader, plan, mpp, tally, progress)
        _write_parts(_noted(measured, fit), claimed, tally)
        _write_outputs(segmenter, reader, plan, window, claimed, mpp, tally)
        warnings = _warnings(tally, fit, mpp)
        record = make_record(
            segmenter,
            info,
            plan,
            options=asdict(chosen),
            diameter_px=diameter_px,
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


def _find_channel(info: SlideInfo, channel: int | str | None) -> int | None:
    """Return the number of the channel that the user named.

    Raises:
        UsageError: there is no channel of that name, or more than one.
    """
    if not isinstance(channel, str):
        return channel
    if info.channel_names.count(channel) == 1:
        return info.channel_names.index(channel)
    names = ", ".join(f"{index} {name}" for index, name in enumerate(info.channel_names))
    where = info.path or info.name
    raise UsageError(f"no channel {channel} in {where}", where="--channel", fix=f"choose from {names}")


def _find(
    segmenter: Segmenter, reader: Reader, plan: SlidePlan, window: Window, tally: _Tally
) -> Iterator[tuple[Tile, Instances]]:
    stream = segmenter.stream(reader, plan, window=window)
    while True:
        with tally.stage("detect"):
            found = next(stream, None)
        if found is None:
            return
        yield found


def _measured(
    found: Iterable[tuple[Tile, Instances]],
    reader: Reader,
    plan: SlidePlan,
    mpp: tuple[float, float] | None,
    tally: _Tally,
    progress: Progress | None,
) -> Iterator[tuple[Tile, pa.Table]]:
    for done, (tile, instances) in enumerate(found, start=1):
        with tally.stage("measure"):
            table = _measure_tile(instances, reader, plan, mpp)
        tally.n_objects += table.num_rows
        tally.n_truncated += int(instances.truncated.sum())
        tally.n_tiles_with_objects += table.num_rows > 0
        yield tile, table
        if progress is not None:
            progress(done, len(plan.tiles))


def _noted(measured: Iterable[tuple[Tile, pa.Table]], fit: ModelFit) -> Iterator[tuple[Tile, pa.Table]]:
    """Yield what comes, and let `fit` see the objects."""
    for tile, table in measured:
        fit.add(*(table[name].to_numpy().astype(np.float64) for name in ("area_px", "score")))
        yield tile, table


def _measure_tile(
    instances: Instances, reader: Reader, plan: SlidePlan, mpp: tuple[float, float] | None
) -> pa.Table:
    """Measure the objects of one tile; their raw pixels are read a second time, a block at a time."""
    names = reader.info.channel_names
    if not len(instances):
        return object_schema(names).empty_table()
    step = _BLOCK_PX * plan.level.downsample
    cells = np.floor((instances.origins - instances.origins.min(axis=0)) / step).astype(np.int64)  # (N, 2)
    _, block = np.unique(cells, axis=0, return_inverse=True)
    block = block.reshape(-1)
    tables = []
    for number in range(int(block.max()) + 1):
        members = instances.select(block == number)
        region = _cover(members, plan)
        pixels = reader.read(region, level=plan.level.index)
        tables.append(measure(members, pixels, region, plan.level.downsample, names, mpp))
    order = np.argsort(np.argsort(block, kind="stable"), kind="stable")  # back to the order found
    return pa.concat_tables(tables).take(order)


def _cover(instances: Instances, plan: SlidePlan) -> Region:
    """Return the region of the plan's level that holds all masks; at least one pixel."""
    sizes = np.array([mask.shape[::-1] for mask in instances.masks])  # (N, 2) w h
    low = np.floor(instances.origins.min(axis=0) / plan.level.downsample).astype(int)
    high = np.ceil((instances.origins + sizes).max(axis=0) / plan.level.downsample).astype(int)
    last = np.array([plan.level.width_px, plan.level.height_px]) - 1
    low = np.clip(low, 0, last)
    high = np.clip(high, low + 1, last + 1)
    return Region(int(low[0]), int(low[1]), int(high[0]), int(high[1]))


def _write_parts(measured: Iterable[tuple[Tile, pa.Table]], claimed: ResultFolder, tally: _Tally) -> None:
    """Write one part file for each row of tiles that has objects."""
    for row, (_, tables) in enumerate(groupby(measured, key=lambda item: item[0].core.y0)):
        part = pa.concat_tables([table for _, table in tables])
        if part.num_rows:
            with (
                tally.stage("parts"),
                translated(claimed.path),
                atomic_file(claimed.parts / f"row-{row:05d}.parquet") as file,
            ):
                pq.write_table(part, file)


def _numbered(claimed: ResultFolder) -> Iterator[pa.Table]:
    """Yield the parts in the order of the lattice, with ids 1, 2, ..."""
    first = 1
    for path in sorted(claimed.parts.glob("row-*.parquet")):
        part = pq.read_table(path)
        ids = pa.array(np.arange(first, first + part.num_rows), pa.int64())
        yield part.set_column(part.schema.get_field_index("id"), part.schema.field("id"), ids)
        first += part.num_rows


def _write_outputs(
    segmenter: Segmenter,
    reader: Reader,
    plan: SlidePlan,
    window: Window,
    claimed: ResultFolder,
    mpp: tuple[float, float] | None,
    tally: _Tally,
) -> None:
    info, built, model = reader.info, claimed.built, segmenter.manifest.name
    table = built / TABLE_FILE
    with translated(claimed.path):
        with tally.stage("table"):
            write_parquet(table, _numbered(claimed), object_schema(info.channel_names))
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


def _warnings(tally: _Tally, fit: ModelFit, mpp: tuple[float, float] | None) -> tuple[str, ...]:
    warnings = []
    if not tally.n_objects:
        warnings.append("no objects found")
    if tally.n_truncated:
        warnings.append(f"{tally.n_truncated} objects reach beyond their tile and may be cut")
    warnings.extend(fit.warnings())
    if mpp is None:
        warnings.append("pixel size unknown: micrometre columns are empty")
    return tuple(warnings)
