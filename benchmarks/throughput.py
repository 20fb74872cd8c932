"""How fast does a model run on a slide, and what holds it up?

    python benchmarks/throughput.py slide.svs --model nuclei-he
    python benchmarks/throughput.py --synthetic 8192 --model nuclei-he --out figures.json --plot figures.png

Four figures a slide, all in megapixels of tissue (level 0) a second: decode only (tiles read as a run reads
them, nothing computed), engine only (the two graphs on tiles in memory, nothing else), find (a run up to its
part files) and end to end (all outputs written). `efficiency`: end to end by the slower of decode and engine.
With `--host` there is a fifth, for which the slide is run twice more: all but the engine, whose answers are
kept and given again at once. A GPU, however fast, is no faster than that with one process: see `--workers`.
Decode and engine are timed on a sample of the tiles before and after the run, for the load of a machine
changes. Figures hold for this machine and load.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from replayed_engine import ReplayedEngine

import darcnn.runtime
from darcnn.runtime.ground import Ground, survey_ground
from darcnn.runtime.live.stats import TimedEngine
from darcnn.runtime.pipeline import RunOptions, run_slide
from darcnn.runtime.readers.protocol import Reader
from darcnn.runtime.sampling import read_ahead
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.tiling import Tile

_EXAMPLE = Path(__file__).parents[1] / "examples" / "CMU-1-Small-Region.svs"
_FINDING = ("diameter", "tissue", "intensity", "detect", "measure", "parts")


@dataclass(frozen=True)
class Figures:
    """What was measured on one slide."""

    slide: str
    megapixels: float  # of level 0
    tissue_megapixels: float
    tiles: int
    tiles_skipped: int
    computed_per_tissue: float  # network pixels in engine calls by network pixels of tissue
    objects: int
    decode_mpx_s: float
    engine_mpx_s: float
    find_mpx_s: float
    end_to_end_mpx_s: float
    host_mpx_s: float | None  # with answers of the engine that take no time; None: not asked for
    objects_per_s: float
    efficiency: float
    wall_by_engine: float  # of the same run: its seconds by those in which the engine was busy
    outputs_share: float  # seconds of the outputs by those of finding
    cpu_busy: float  # share of all cores
    peak_memory_gb: float  # beyond the model, loaded and run on the sample
    seconds: dict[str, float]


@click.command()
@click.argument("slides", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--model", default="nuclei-he", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--backend", default="auto", show_default=True)
@click.option(
    "--synthetic",
    "sides",
    type=click.IntRange(1024),
    multiple=True,
    help="Also a slide of this side, px, made of the example.",
)
@click.option(
    "--filled",
    type=click.FloatRange(0.01, 1),
    default=1.0,
    show_default=True,
    help="Share of its side with tissue.",
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=40,
    show_default=True,
    help="Tiles for decode and engine alone.",
)
@click.option("--host", "asks_host", is_flag=True, help="Also time all but the engine.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them here as PNG.")
def main(
    slides: tuple[Path, ...],
    model: str,
    device: str,
    backend: str,
    sides: tuple[int, ...],
    filled: float,
    sample: int,
    asks_host: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Time a model on SLIDES."""
    if not slides and not sides:
        raise click.UsageError("nothing to measure: name a slide, or pass --synthetic")
    folder = Path(tempfile.mkdtemp())
    try:
        made = [folder / f"synthetic-{side}.tif" for side in sides]
        for path, side in zip(made, sides, strict=True):
            # in a process of its own: what it takes is not the memory of a run
            options = [str(_EXAMPLE), str(path), f"--side={side}", f"--filled={filled}"]
            subprocess.run(
                [sys.executable, str(Path(__file__).with_name("synthetic_slide.py")), *options], check=True
            )
        with darcnn.runtime.load(model, device=device, backend=backend) as loaded:
            replayed = ReplayedEngine(loaded.engine)
            engine = TimedEngine(replayed)
            segmenter = Segmenter(engine, loaded.manifest)
            figures = []
            for path in (*slides, *made):
                one = _measure(segmenter, engine, path, sample, folder)
                if asks_host:
                    alone = _time_host(segmenter, engine, replayed, path, folder)
                    one = replace(one, host_mpx_s=one.tissue_megapixels / alone)
                figures.append(one)
            record = {
                "model": model,
                "engine": engine.spec.name,
                "machine": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "load": os.getloadavg(),
                "date": time.strftime("%Y-%m-%d"),
                "slides": [asdict(one) for one in figures],
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for one in figures:
        click.echo("\n".join(f"{key:22}{_shown(value)}" for key, value in asdict(one).items()))
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if plot is not None:
        _draw(figures, plot)


def _measure(segmenter: Segmenter, engine: TimedEngine, path: Path, sample: int, folder: Path) -> Figures:
    with darcnn.runtime.open_source(path) as reader:
        model, plan = segmenter.manifest.input, segmenter.plan(reader.info)
        ground = survey_ground(reader, plan, model, tissue=True, roi=None)
        before = _time_alone(segmenter, engine, reader, ground, sample)
        memory, busy = _peak_bytes(), sum(os.times()[:2])
        engine.reset()
        start = time.perf_counter()
        summary = run_slide(segmenter, reader, folder / "out", options=RunOptions(overwrite=True))
        wall, in_engine = time.perf_counter() - start, sum(engine.seconds.values())
        busy, peak = sum(os.times()[:2]) - busy, _peak_bytes() - memory
        after = _time_alone(segmenter, engine, reader, ground, sample)
        record = json.loads((summary.folder / "run.json").read_text(encoding="utf-8"))
    tissue = ground.area_px0 / 1e6
    decode, alone = (tissue / float(np.mean(pair)) for pair in zip(before, after, strict=True))
    seconds = record["seconds"]
    finding = sum(seconds[stage] for stage in _FINDING)
    computed = len(ground.tiles) * model.tile_px**2 / 1e6
    return Figures(
        slide=path.name,
        megapixels=summary.megapixels,
        tissue_megapixels=tissue,
        tiles=len(ground.tiles),
        tiles_skipped=len(plan.tiles) - len(ground.tiles),
        computed_per_tissue=computed / (tissue * plan.scale**2),
        objects=summary.n_objects,
        decode_mpx_s=decode,
        engine_mpx_s=alone,
        find_mpx_s=tissue / finding,
        end_to_end_mpx_s=tissue / wall,
        host_mpx_s=None,
        objects_per_s=summary.n_objects / wall,
        efficiency=tissue / wall / min(decode, alone),
        wall_by_engine=wall / in_engine,
        outputs_share=(wall - finding) / finding,
        cpu_busy=busy / wall / (os.cpu_count() or 1),
        peak_memory_gb=peak / 1e9,
        seconds=seconds,
    )


def _time_host(
    segmenter: Segmenter, engine: TimedEngine, replayed: ReplayedEngine, path: Path, folder: Path
) -> float:
    """Return the seconds that a whole run takes beside its engine, and beside looking up its answers."""
    replayed.is_recording = True
    try:
        with darcnn.runtime.open_source(path) as reader:
            for _ in ("the answers are kept", "and given again"):
                engine.reset()
                start = time.perf_counter()
                run_slide(segmenter, reader, folder / "host", options=RunOptions(overwrite=True))
                seconds = time.perf_counter() - start - sum(engine.seconds.values())
    finally:
        replayed.is_recording = False
    return seconds


def _time_alone(
    segmenter: Segmenter, engine: TimedEngine, reader: Reader, ground: Ground, sample: int
) -> tuple[float, float]:
    """Return the seconds that decoding, and the engine, would take for all tiles: from a spread of them."""
    tiles = ground.tiles[:: max(1, len(ground.tiles) // sample)]
    plan = segmenter.plan(reader.info)
    shape = (reader.info.height_px0, reader.info.width_px0)
    sampler = segmenter.sampler(reader, plan, segmenter.measure(reader, plan))
    start = time.perf_counter()
    for _ in read_ahead(sampler, tiles, batch=engine.spec.batch):
        pass
    decode = time.perf_counter() - start
    engine.reset()
    for batch in _batches(tiles, engine.spec.batch):
        segmenter.segment_batch(plan, shape, batch, [sampler.read(tile) for tile in batch])
    share = len(tiles) / len(ground.tiles)
    return decode / share, sum(engine.seconds.values()) / share


def _batches(tiles: tuple[Tile, ...], size: int) -> Iterator[tuple[Tile, ...]]:
    for at in range(0, len(tiles), size):
        yield tiles[at : at + size]


def _peak_bytes() -> int:
    """Return the largest memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(figures: list[Figures], path: Path) -> None:
    from matplotlib.figure import Figure

    page = Figure(figsize=(8, 1 + 1.6 * len(figures)), layout="constrained")
    axes = page.subplots(len(figures), squeeze=False)[:, 0]
    for one, axis in zip(figures, axes, strict=True):
        names = [n for n in ("decode", "engine", "host", "find", "end_to_end") if getattr(one, f"{n}_mpx_s")]
        speeds = [getattr(one, f"{name}_mpx_s") for name in names]
        axis.bar_label(axis.barh([name.replace("_", " ") for name in names], speeds), fmt=" %.3g")
        axis.invert_yaxis()
        axis.set(title=f"{one.slide}: efficiency {one.efficiency:.2f}", xscale="log")
        axis.minorticks_off()
        axis.margins(x=0.2)
    axes[-1].set_xlabel("megapixels of tissue a second")
    page.savefig(path)


if __name__ == "__main__":
    from one_line import run

    run(main)
