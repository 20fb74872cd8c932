"""From a volume to a folder of results: planes to sections, sections to solids, solids to files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.intensity import Window
from darcnn.runtime.manifest import ModelInput
from darcnn.runtime.parts import Parts
from darcnn.runtime.pipeline import Progress, RunSummary
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.readers.image_places import split_image
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.readers.protocol import Location
from darcnn.runtime.record import (
    asked_model,
    check_engine,
    describe_run,
    fingerprint,
    fingerprint_file,
    hash_of,
    measured_px,
    read_record,
    rounded_seconds,
    write_record,
)
from darcnn.runtime.row_filter import RowFilter, parse_filter
from darcnn.runtime.run_options import asked_options
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.atomic import atomic_file, translated
from darcnn.runtime.sinks.parquet import write_parquet
from darcnn.runtime.sinks.result_folder import (
    LABELS_FOLDER,
    OVERVIEW_FILE,
    POINTS_FILE,
    RUN_FILE,
    SCROLL_FILE,
    STAR_FILE,
    TABLE_FILE,
    TRACKS_FILE,
    ResultFolder,
    claim_folder,
    drop_parts,
    make_folder_name,
)
from darcnn.runtime.stage_seconds import StageSeconds
from darcnn.runtime.volumes.extras import add_formats, check_volume_formats, write_formats
from darcnn.runtime.volumes.find import (
    BlockRunner,
    View,
    find_blocks_here,
    find_diameter,
    plan_blocks,
    plan_views,
)
from darcnn.runtime.volumes.joining import join_sections
from darcnn.runtime.volumes.labels import Numbered, write_label_volume
from darcnn.runtime.volumes.numbering import number_solids, table_columns
from darcnn.runtime.volumes.open import count_lacking, open_volume
from darcnn.runtime.volumes.options import AxisOption, VolumeOptions
from darcnn.runtime.volumes.overview import write_overview, write_scroll
from darcnn.runtime.volumes.particles import write_points, write_star
from darcnn.runtime.volumes.record import VolumeCounts, describe_views, describe_volume, size_warnings
from darcnn.runtime.volumes.series_overview import write_series_overview
from darcnn.runtime.volumes.stack import Stack
from darcnn.runtime.volumes.tracks import measure_tracks, tracks_schema
from darcnn.runtime.volumes.volume import AXES, Volume

__all__ = ["run_volume"]

_COLOURS = 3  # channels of a model that sees colours
# What columns end in that need the size of a voxel, and of a pixel in a series; the option that gives it.
_SIZES = (("_nm", "_nm3"), "--voxel-size"), (("_um", "_um2"), "--mpp")


def run_volume(
    segmenter: Segmenter,
    path: Location,
    out_dir: Path,
    *,
    options: VolumeOptions | None = None,
    progress: Progress | None = None,
    find_blocks: BlockRunner = find_blocks_here,
) -> RunSummary:
    """Find the objects of one volume and write them to `out_dir`/<volume name>/.

    The folder is complete when run.json is in it. Each block of planes goes to a part file: memory does not
    grow with the number of planes, and a run that was stopped or killed goes on with the blocks that it lacks
    and ends with the same objects.

    Args:
        segmenter: the model.
        path: the file (`open_volume`).
        out_dir: made if it is not there.
        options: None for the defaults.
        progress: called after each plane, with what is done counted in planes and megavoxels.
        find_blocks: who finds the objects on blocks of planes; by default this process.
    Raises:
        InputError: the volume cannot be read, or its voxel size or channels do not serve.
        UsageError: an option is out of range.
        OutputError: the results cannot be written, or exist.
    """
    chosen, start = options or VolumeOptions(), time.perf_counter()
    name = make_slide_name(path)
    folder = out_dir / make_folder_name(name)
    check_volume_formats(chosen.also)
    asked = _asked(segmenter, path, chosen)
    final = asked | {"filter": chosen.row_filter}
    if not chosen.overwrite and (earlier := read_record(folder / RUN_FILE, final)) is not None:
        drop_parts(folder)
        add_formats(folder, path, earlier["input"], chosen.also)
        return _summarize(name, folder, earlier, start, megavoxels=0.0, was_done=True)
    with claim_folder(folder, overwrite=chosen.overwrite, restart=chosen.restart) as claimed:
        parts, times = Parts(claimed.parts), StageSeconds()
        noted = check_engine(parts.begin(asked), segmenter, folder)
        with translated(folder), times.stage("open"):
            volume = open_volume(
                path,
                claimed.built,
                t=chosen.t,
                channel=chosen.channel,
                voxel_nm=chosen.voxel_nm,
                series=chosen.series,
                projects=chosen.project,
            )
        with volume:
            row_filter = _check_volume(volume, chosen, segmenter.manifest.input)
            with times.stage("intensity"):
                diameter, views = _plan(segmenter, volume, chosen, noted)
            with translated(folder):
                parts.note(asked, {"diameter_px": diameter, "engine": segmenter.engine.spec.name})
            with times.stage("find"):
                _find(segmenter, views, parts, folder, progress, find_blocks)
            described = describe_volume(volume, asked)
            with translated(folder):
                counts = _finish(claimed, views, parts, row_filter, chosen.axis, segmenter, times)
                with times.stage("also"):
                    write_formats(claimed.built, path, described, chosen.also)
            options_told = {"options": {**asked["options"], "filter": chosen.row_filter}}
            record = {
                **describe_run(segmenter, asked | options_told),
                "asked_sha256": hash_of(final),
                "input": described,
                "network": describe_views(views, diameter),
                "counts": counts.describe(),
                "seconds": rounded_seconds(times.seconds),
                "warnings": [
                    *size_warnings(segmenter.manifest.input, volume, chosen, diameter),
                    *counts.warnings(volume),
                ],
            }
            megavoxels = float(np.prod(volume.info.shape)) / 1e6
        with translated(folder):
            write_record(claimed.built / RUN_FILE, record)
            claimed.commit()
    return _summarize(name, folder, record, start, megavoxels=megavoxels)


def _plan(
    segmenter: Segmenter, volume: Volume, chosen: VolumeOptions, noted: Mapping[str, Any] | None
) -> tuple[float | None, list[View]]:
    """Return the objects' diameter in voxels, perhaps as an earlier try `noted` it, and the views."""
    window = None if chosen.window is None else Window(*chosen.window)
    diameter: float | None
    if noted:
        diameter = noted["diameter_px"]
    else:
        diameter = find_diameter(
            segmenter,
            volume,
            chosen.first_axis,
            diameter_px=chosen.diameter_px,
            pixels=chosen.pixels,
            window=window,
        )
    views = plan_views(
        segmenter,
        volume,
        chosen.axis,
        diameter_px=diameter,
        pixels=chosen.pixels,
        n_joined=chosen.n_joined,
        window=window,
    )
    return diameter, views


def _summarize(
    name: str,
    folder: Path,
    record: Mapping[str, Any],
    start: float,
    *,
    megavoxels: float,
    was_done: bool = False,
) -> RunSummary:
    return RunSummary(
        name,
        folder,
        folder / OVERVIEW_FILE,
        n_objects=record["counts"]["objects"],
        seconds=time.perf_counter() - start,
        megapixels=megavoxels,
        warnings=tuple(record["warnings"]),
        was_done=was_done,
        measured_px=measured_px(record),
    )


def _asked(segmenter: Segmenter, path: Location, chosen: VolumeOptions) -> dict[str, Any]:
    """Return all that the objects depend on."""
    return {**asked_model(segmenter), "slide": _fingerprint(path), "options": asked_options(chosen)}


def _fingerprint(path: Location) -> dict[str, Any]:
    """Return what tells a volume from others: its file's size and both ends, or its metadata.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(path, Path) and split_image(path)[0].is_file():
        n_lacking = count_lacking(path)  # other files of the same image may come later
        return fingerprint_file(path) | ({"lacking": n_lacking} if n_lacking else {})
    with open_source(path, z=0, t=0) as reader:
        return fingerprint(reader.info)


def _check_volume(volume: Volume, chosen: VolumeOptions, model: ModelInput) -> RowFilter | None:
    """Raise what makes the volume useless for the options or the model; return the filter on its objects."""
    voxel, row_filter = volume.info.voxel_nm, None
    if chosen.row_filter is not None:
        row_filter = parse_filter(chosen.row_filter, table_columns(volume.info))
    if volume.info.is_rgb and model.channels == _COLOURS:
        raise InputError(
            "is a stack of colour pictures; of volumes the model would see the mean of their colours",
            where=volume.info.path,
            fix=f"take one with --{'t' if volume.info.is_series else 'z'}, or save each in a file of its own",
        )
    if row_filter is not None and volume.info.pixel_nm("z") is None:
        endings, option = _SIZES[volume.info.is_series]
        row_filter.require_known(endings, where=volume.info.path, fix=option)
    if chosen.n_joined is not None and volume.info.is_series:
        raise UsageError("means nothing to a series along t", where="--slab", fix="leave it out")
    if chosen.axis not in ("auto", "z") and volume.info.is_series:
        raise UsageError(
            "means nothing to a series along t",
            where="--axis",
            fix="leave it out, or take one time point with --t",
        )
    if chosen.axis not in ("auto", "z") and voxel is not None and not volume.info.is_cubic:
        sides = " x ".join(f"{one:.4g}" for one in voxel)
        raise InputError(
            f"its voxels are no cubes: {sides} nm (z y x)",
            where=volume.info.path,
            fix="pass --axis z, or --voxel-size if the file is wrong",
        )
    return row_filter


def _find(
    segmenter: Segmenter,
    views: Sequence[View],
    parts: Parts,
    folder: Path,
    progress: Progress | None,
    find_blocks: BlockRunner,
) -> None:
    """Write a part for each block of planes that has none yet."""
    done, n_objects, total = 0, 0, sum(len(view.stack) for view in views)

    def advance(n_planes: int, n_sections: int) -> None:
        nonlocal done, n_objects
        done, n_objects = done + n_planes, n_objects + n_sections
        if progress is not None:
            megavoxels = done * float(np.prod(views[0].stack.shape)) / 1e6
            progress(done, total, n_objects=n_objects, megapixels=megavoxels)

    blocks = plan_blocks(views)
    todo = [block for block in blocks if not parts.has(block.number)]
    if len(todo) < len(blocks):
        advance(total - sum(block.stop - block.start for block in todo), 0)
    for found in find_blocks(segmenter, todo, advance):
        with translated(folder):
            parts.write(found.number, found.table, found.full_planes)


def _finish(
    claimed: ResultFolder,
    views: Sequence[View],
    parts: Parts,
    row_filter: RowFilter | None,
    axis: AxisOption,
    segmenter: Segmenter,
    times: StageSeconds,
) -> VolumeCounts:
    """Write all outputs but run.json and return what run.json counts."""
    volume, built = views[0].stack.volume, claimed.built
    info, model = volume.info, segmenter.manifest.name
    with times.stage("link"):
        joined = join_sections(views, parts, built, may_be_of_one=axis == "auto")
        numbered, table = number_solids(joined, volume, row_filter)
    with times.stage("table"), atomic_file(built / TABLE_FILE) as file:
        pq.write_table(table, file, compression="zstd")
    with times.stage("labels"):
        write_label_volume(
            built / LABELS_FOLDER,
            numbered,
            shape=info.shape,
            grid=info.label_grid,
            name=info.name,
            is_series=info.is_series,
        )
    if info.is_series:
        with times.stage("tracks"):
            tracks = measure_tracks(numbered, volume)
            write_parquet(built / TRACKS_FILE, tracks, tracks_schema(info))
        with times.stage("overview"):
            _draw_series(built, views[0], numbered, table, model)
    else:
        with times.stage("particles"):
            write_star(built / STAR_FILE, table, name=info.name, shape=info.shape, voxel_nm=info.voxel_nm)
            write_points(built / POINTS_FILE, table)
        with times.stage("overview"):
            first = views[0].stack
            stacks = [Stack(volume, axis, first.n_joined, first.sigma_px) for axis in AXES]
            write_overview(built / OVERVIEW_FILE, stacks, views[0].window, numbered, model_name=model)
            write_scroll(built / SCROLL_FILE, stacks[0], views[0].window, numbered)
    n_planes, n_full = sum(len(view.stack) for view in views), len(parts.marked(len(plan_blocks(views))))
    n_divisions = pc.count_distinct(table["parent"]).as_py() if info.is_series else None
    n_found, n_objects = len(joined.solids), len(numbered.rows)
    return VolumeCounts(n_found, n_objects, joined.agreement, n_planes, n_full, n_divisions)


def _draw_series(built: Path, view: View, numbered: Numbered, objects: pa.Table, model: str) -> None:
    """Write the pictures of a series along time."""
    stack, window, tracks = view.stack, view.window, built / TRACKS_FILE
    parents = dict(zip(*(objects[name].to_pylist() for name in ("id", "parent")), strict=True))
    write_series_overview(
        built / OVERVIEW_FILE, stack, window, numbered, tracks=tracks, parents=parents, model_name=model
    )
    write_scroll(built / SCROLL_FILE, stack, window, numbered)
