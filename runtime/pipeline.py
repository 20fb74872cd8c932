"""From an open slide to a folder of results: find, measure, number, write."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.diameter import choose_diameter, is_size_measured
from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.fit import ModelFit, warn_of_kind, warn_of_size
from darcnn.runtime.geometry import Region
from darcnn.runtime.ground import Ground, survey_ground, when_surveyed
from darcnn.runtime.intensity import Window
from darcnn.runtime.measure import object_schema
from darcnn.runtime.outputs import add_formats, write_outputs
from darcnn.runtime.parts import TILE, Parts
from darcnn.runtime.planning import SlidePlan, find_channel, to_level0
from darcnn.runtime.readers.base import settle_mpp
from darcnn.runtime.readers.mended import MendedReader
from darcnn.runtime.readers.protocol import Reader, SlideInfo
from darcnn.runtime.record import (
    asked_model,
    check_engine,
    fingerprint,
    fingerprint_pixels,
    hash_of,
    make_record,
    measured_px,
    read_record,
    write_record,
)
from darcnn.runtime.roi import Roi, read_roi
from darcnn.runtime.row_filter import RowFilter, parse_filter
from darcnn.runtime.rows import Row, RowRunner, SlideTask, find_rows_here, plan_rows
from darcnn.runtime.run_options import EXTRA_FORMATS, RunOptions, asked_options, check_formats
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.atomic import translated
from darcnn.runtime.sinks.result_folder import (
    OVERVIEW_FILE,
    RUN_FILE,
    ResultFolder,
    claim_folder,
    drop_parts,
    make_folder_name,
)
from darcnn.runtime.tally import Tally
from darcnn.runtime.tiling import Tile

__all__ = ["Progress", "RunOptions", "RunSummary", "run_slide"]

_MICROMETRES = ("_um", "_um2")  # what columns end in that need the pixel size


class Progress(Protocol):
    """Is told how far a slide is."""

    def __call__(self, done: int, total: int, /, *, n_objects: int, megapixels: float) -> None:
        """So many of the tiles are done, in them so many objects (those on seams twice), in so many Mpx."""
        ...


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What came of one slide."""

    name: str
    folder: Path
    overview: Path
    n_objects: int
    seconds: float
    megapixels: float  # of level 0, in tiles that were looked at
    warnings: tuple[str, ...]
    ground_mm2: float | None = None  # area of the tissue that was looked at; None without a pixel size
    was_done: bool = False  # by an earlier run that asked for the same
    n_unreadable: int = 0  # damaged tiles: nothing was found in them
    measured_px: float | None = None  # typical object as measured, level-0 pixels; None: its size was given

    @property
    def objects_per_mm2(self) -> float | None:
        """Density of the objects on the tissue, None where its area is unknown or 0."""
        return self.n_objects / self.ground_mm2 if self.ground_mm2 else None


@dataclass(frozen=True, slots=True)
class _Wish:
    """The options of a run, checked against its slide."""

    options: RunOptions
    channel: int | None
    roi: Roi | None
    row_filter: RowFilter | None
    asked: dict[str, Any]  # all that the objects depend on
    is_measured: bool  # the size of the objects is

    @property
    def window(self) -> Window | None:
        """The raw values that the user wants for black and white."""
        return None if self.options.window is None else Window(*self.options.window)


def run_slide(
    segmenter: Segmenter,
    reader: Reader,
    out_dir: Path,
    *,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    find_rows: RowRunner = find_rows_here,
) -> RunSummary:
    """Find the objects of one slide and write them to `out_dir`/<slide name>/.

    The folder is complete when run.json is in it. Each row of tiles goes to a part file, and the outputs are
    made of those: memory does not grow with the slide, and a run that was stopped or killed goes on with the
    rows that it lacks and ends with the same objects, labels and outlines. An earlier result, about to be
    overwritten, stays until then.

    Tiles that are damaged are named in run.json and in a warning; the rest is done.

    Args:
        segmenter: the model.
        reader: the open slide; stays open.
        out_dir: made if it is not there.
        options: None for the defaults.
        progress: called after each tile.
        find_rows: who finds the objects of rows of tiles; by default this process.
    Raises:
        InputError: the slide cannot be read, not even one tile of it, or its pixel size or channels do not
            serve.
        UsageError: an option is out of range.
        OutputError: the results cannot be written, or exist.
    """
    start = time.perf_counter()
    wish = _check(segmenter, reader, options or RunOptions())
    folder = out_dir / make_folder_name(reader.info.name)
    final = {**wish.asked, "filter": wish.options.row_filter}
    if not wish.options.overwrite and (earlier := read_record(folder / RUN_FILE, final)) is not None:
        drop_parts(folder)
        add_formats(folder, earlier, wish.options.also)
        return _summarize(reader.info, folder, earlier, start, was_done=True)
    with claim_folder(folder, overwrite=wish.options.overwrite, restart=wish.options.restart) as claimed:
        record = _fill(segmenter, reader, wish, claimed, progress, find_rows)
        with translated(folder):
            write_record(claimed.built / RUN_FILE, {**record, "asked_sha256": hash_of(final)})
            claimed.commit()
    return _summarize(reader.info, folder, record, start)


def _check(segmenter: Segmenter, reader: Reader, chosen: RunOptions) -> _Wish:
    """Raise what is wrong with the options or the slide before anything is made or looked at."""
    info = reader.info
    check_formats(chosen.also, EXTRA_FORMATS)
    settle_mpp(None, None, override=chosen.mpp)
    channel = find_channel(info, chosen.channel)
    roi = None if chosen.roi is None else read_roi(chosen.roi, origin_px0=info.origin_px0)
    if roi is not None and not roi.touches(info.whole):
        raise UsageError(
            f"lies beside {info.name}, which has {info.width_px0} x {info.height_px0} pixels",
            where="--roi",
            fix="give pixels of the slide in full",
        )
    row_filter = None
    if chosen.row_filter is not None:
        row_filter = parse_filter(chosen.row_filter, object_schema(info.channel_names).names)
        if info.mpp is None and chosen.mpp is None:
            row_filter.require_known(_MICROMETRES, where=info.name, fix="--mpp")
    is_measured = is_size_measured(
        segmenter.manifest.input,
        chosen.diameter_px,
        pixels=chosen.pixels,
        has_pixel_size=info.mpp is not None or chosen.mpp is not None,
    )
    given = None if chosen.diameter_px == "auto" else chosen.diameter_px
    diameter_px = segmenter.manifest.input.nominal_diameter_px if is_measured else given
    segmenter.plan(info, mpp=chosen.mpp, diameter_px=diameter_px, pixels=chosen.pixels, channel=channel)
    asked = {
        **asked_model(segmenter),
        "slide": fingerprint_pixels(reader) if info.path is None else fingerprint(info),
        "size": [info.width_px0, info.height_px0],
        "options": asked_options(chosen, channel=channel) | {"roi": None if roi is None else roi.record},
    }
    return _Wish(chosen, channel, roi, row_filter, asked, is_measured)


def _fill(
    segmenter: Segmenter,
    reader: Reader,
    wish: _Wish,
    claimed: ResultFolder,
    progress: Progress | None,
    find_rows: RowRunner,
) -> dict[str, Any]:
    """Find the objects, write all outputs but run.json into the claimed folder, and return its content."""
    options, info, model = wish.options, reader.info, segmenter.manifest.input
    parts = Parts(claimed.parts)
    noted = check_engine(parts.begin(wish.asked), segmenter, claimed.path)
    before = time.perf_counter()
    diameter_px = noted["diameter_px"] if noted else _diameter(segmenter, MendedReader(reader), wish)
    plan = segmenter.plan(
        info, mpp=options.mpp, diameter_px=diameter_px, pixels=options.pixels, channel=wish.channel
    )
    looked = time.perf_counter()
    ground = survey_ground(reader, plan, model, tissue=options.tissue, roi=wish.roi)
    rule = None if ground.tissue is None else ground.tissue.rule
    of_size = warn_of_size(model, diameter_px, has_pixel_size=plan.mpp is not None)
    tally = Tally(
        ModelFit(model.nominal_diameter_px / plan.scale, diameter_px if wish.is_measured else None),
        n_tiles=len(ground.tiles),
        n_tiles_skipped=len(plan.tiles) - len(ground.tiles),
        doubts=tuple(filter(None, (warn_of_kind(model, rule), of_size if wish.is_measured else None))),
    )
    tally.add_seconds({"diameter": looked - before, "tissue": time.perf_counter() - looked})
    mended = MendedReader(reader)  # not that of the diameter: a run that goes on does not look for it again
    with tally.stage("intensity"):
        window = segmenter.measure(mended, plan) if wish.window is None else wish.window
    task = SlideTask(plan, window, info.mpp if options.mpp is None else (options.mpp, options.mpp))
    with translated(claimed.path):
        parts.note(wish.asked, {"diameter_px": diameter_px, "engine": segmenter.engine.spec.name})
    rows = plan_rows(plan, ground)
    counter = _Counter(info.width_px0 * info.height_px0 / (plan.width * plan.height), ground.tiles, progress)
    todo = counter.skip_done(rows, parts)
    for found in find_rows(segmenter, reader, task, todo, counter.advance):
        tally.add_seconds(found.seconds)
        with tally.stage("parts"), translated(claimed.path):
            parts.write(found.number, found.table, found.unreadable)
    with translated(claimed.path):
        tally.unreadable = _find_unreadable(parts.marked(len(rows)), ground, plan, info)
        write_outputs(
            claimed.built,
            _final_tables(parts, len(rows), ground, wish.row_filter, tally),
            mended,
            task,
            model=segmenter.manifest,
            also=options.also,
            tally=tally,
            plane=(options.z or 0, options.t or 0),
        )
    tally.has_holes = ground.has_holes or bool(mended.holes)  # now that the overview is made
    return make_record(
        segmenter,
        info,
        task,
        asked=wish.asked | {"options": wish.asked["options"] | {"filter": options.row_filter}},
        diameter_px=diameter_px,
        ground=ground.describe(task.mpp),
        tally=tally,
    )


def _diameter(segmenter: Segmenter, reader: Reader, wish: _Wish) -> float | None:
    options, model = wish.options, segmenter.manifest.input

    def survey() -> Ground:
        plan = segmenter.plan(reader.info, diameter_px=model.nominal_diameter_px, channel=wish.channel)
        return survey_ground(reader, plan, model, tissue=options.tissue, roi=wish.roi)

    return choose_diameter(
        segmenter,
        reader,
        diameter_px=options.diameter_px,
        mpp=options.mpp,
        pixels=options.pixels,
        channel=wish.channel,
        window=wish.window,
        touches=when_surveyed(survey),
    )


def _find_unreadable(
    damaged: Sequence[int], ground: Ground, plan: SlidePlan, info: SlideInfo
) -> dict[int, Region]:
    """Return the cores of the damaged tiles, level-0 pixels.

    Raises:
        InputError: no tile can be read.
    """
    if damaged and len(damaged) == len(ground.tiles):
        raise InputError(
            f"is damaged: of {len(damaged)} tiles none can be read",
            where=info.path or info.name,
            fix="copy it again and pass --restart",
        )
    return {tile: to_level0(plan.tiles[tile].core, plan, info) for tile in damaged}


def _final_tables(
    parts: Parts, n_rows: int, ground: Ground, row_filter: RowFilter | None, tally: Tally
) -> Iterator[pa.Table]:
    """Yield the objects that are reported, row by row, and count them."""

    def keep(table: pa.Table) -> NDArray[np.bool_]:
        kept = ground.keep(table)
        tally.find(table.select([TILE, "area_px", "score"]).filter(pa.array(kept)))
        return kept if row_filter is None else kept & row_filter.keep(table)

    for row in parts.read(n_rows, keep):
        tally.count(row)
        yield row.table


class _Counter:
    """Adds up how far the rows of a slide are, for whoever shows it."""

    def __init__(self, px0_per_px: float, tiles: Sequence[Tile], progress: Progress | None) -> None:
        self._total = len(tiles)
        pixels = sum(tile.core.width * tile.core.height for tile in tiles)
        self._megapixels = px0_per_px * pixels / max(1, len(tiles)) / 1e6  # of a tile, on average
        self._progress = progress
        self._tiles = self._objects = 0

    def skip_done(self, rows: Sequence[Row], parts: Parts) -> list[Row]:
        """Return the rows that have no part yet, and count the others."""
        todo = [row for row in rows if not parts.has(row.number)]
        n_done = self._total - sum(len(row.tiles) for row in todo)
        if n_done:
            self.advance(n_done, 0)
        return todo

    def advance(self, n_tiles: int, n_objects: int) -> None:
        self._tiles += n_tiles
        self._objects += n_objects
        if self._progress is not None:
            megapixels = self._tiles * self._megapixels
            self._progress(self._tiles, self._total, n_objects=self._objects, megapixels=megapixels)


def _summarize(
    info: SlideInfo, folder: Path, record: Mapping[str, Any], start: float, *, was_done: bool = False
) -> RunSummary:
    counts = record["counts"]
    looked_at = counts["tiles"] / max(1, counts["tiles"] + counts["tiles_skipped"])
    return RunSummary(
        info.name,
        folder,
        folder / OVERVIEW_FILE,
        n_objects=counts["objects"],
        seconds=time.perf_counter() - start,
        megapixels=info.width_px0 * info.height_px0 / 1e6 * looked_at,
        warnings=tuple(record["warnings"]),
        ground_mm2=record["ground"]["area_mm2"],
        was_done=was_done,
        n_unreadable=counts.get("tiles_unreadable", 0),  # results of earlier versions lack it
        measured_px=measured_px(record),
    )
