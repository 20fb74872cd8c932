"""How fast is each backend on this machine, and do they find the same?

    python benchmarks/engines.py nuclei-he examples/CMU-1-Small-Region.svs --tiles 12

Runs the same tiles, read once, through `detect` and the masks of what was found, the backends by turns
after a burn-in, and prints medians, spread and megapixels a second, and how far the objects of each are
from those of the first. Backends that do not serve are named with the reason. Figures hold for this
machine and load.
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

import darcnn.runtime
from darcnn.runtime.boxes import pairwise_iou
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.errors import DeviceError
from darcnn.runtime.load import find_bundle
from darcnn.runtime.options import BACKENDS
from darcnn.runtime.segmenter import Segmenter

_BURN_IN = 2
_STRONG = 0.5  # objects below it are not compared


@click.command()
@click.argument("model")
@click.argument("slide", type=click.Path(path_type=Path, exists=True))
@click.option("--tiles", "n_tiles", type=click.IntRange(1), default=12, show_default=True)
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(BACKENDS[1:]), help="Repeatable; all."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(model: str, slide: Path, n_tiles: int, backends: tuple[str, ...], out: Path | None) -> None:
    """Time the backends of MODEL on tiles from the middle of SLIDE."""
    bundle = find_bundle(model)
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for backend in backends or BACKENDS[1:]:
            try:
                engines[backend] = open_engine(bundle, backend=backend)
            except DeviceError as err:
                click.echo(f"{backend:14} not measured: {err}")
            else:
                stack.callback(engines[backend].close)
        if not engines:
            raise click.UsageError("no backend serves here; name another with --backend")
        first = next(iter(engines.values()))
        tiles = _read_tiles(slide, Segmenter(first, bundle.manifest), n_tiles)
        seconds: dict[str, list[tuple[float, float]]] = {backend: [] for backend in engines}
        found: dict[str, list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = {b: [] for b in engines}
        for number, tile in enumerate([*islice(cycle(tiles), _BURN_IN), *tiles]):
            for backend, engine in engines.items():
                times, objects = _run(engine, tile, bundle.manifest.limits.min_score)
                if number >= _BURN_IN:
                    seconds[backend].append(times)
                    found[backend].append(objects)
    pixels = bundle.manifest.input.tile_px**2 / 1e6
    record: dict[str, object] = {
        "model": model,
        "tiles": len(tiles),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for backend, engine in engines.items():
        detect, mask = np.array(seconds[backend]).T
        row = {
            "engine": engine.spec.name,
            "detect_s": _spread(detect),
            "mask_s": _spread(mask),
            "megapixels_per_second": pixels / float(np.median(detect + mask)),
            **_apart(found[next(iter(engines))], found[backend]),
        }
        record[backend] = row
        click.echo(f"{backend:14} {row['megapixels_per_second']:.2f} Mpx/s  {row}")
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _read_tiles(slide: Path, segmenter: Segmenter, n_tiles: int) -> list[NDArray[np.uint8]]:
    with darcnn.runtime.open_source(slide) as reader:
        plan = segmenter.plan(reader.info)
        sampler = segmenter.sampler(reader, plan, segmenter.measure(reader, plan))
        first = max(0, (len(plan.tiles) - n_tiles) // 2)
        return [sampler.read(tile) for tile in plan.tiles[first : first + n_tiles]]


def _run(
    engine: Engine, tile: NDArray[np.uint8], min_score: float
) -> tuple[tuple[float, float], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the seconds of `detect` and of the masks, and boxes and scores of what was found."""
    batch = np.repeat(tile[None], engine.spec.batch, axis=0)
    start = time.perf_counter()
    detections = engine.detect(batch)
    middle = time.perf_counter()
    rows = np.flatnonzero(detections.scores[0] >= min_score)
    boxes, scores = detections.boxes[0, rows], detections.scores[0, rows]
    engine.masks(detections, boxes, np.zeros(len(boxes), np.int64))
    end = time.perf_counter()
    return ((middle - start) / engine.spec.batch, end - middle), (boxes, scores)


def _apart(
    ours: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
    theirs: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> dict[str, float]:
    """Return the share of strong objects with a partner (IoU > 0.99), and how far scores are apart."""
    n_strong = n_matched = 0
    worst = 0.0
    for (boxes, scores), (other_boxes, other_scores) in zip(ours, theirs, strict=True):
        strong = np.flatnonzero(scores >= _STRONG)
        n_strong += len(strong)
        if len(strong) and len(other_boxes):
            iou = pairwise_iou(boxes[strong], other_boxes)
            partner, hit = iou.argmax(1), iou.max(1) > 0.99
            n_matched += int(hit.sum())
            apart = np.abs(scores[strong] - other_scores[partner])[hit]
            worst = max(worst, float(apart.max(initial=0.0)))
    return {"objects": n_strong, "matched": n_matched / max(n_strong, 1), "score_apart": worst}


def _spread(seconds: NDArray[np.float64]) -> dict[str, float]:
    return {"min": float(seconds.min()), "median": float(np.median(seconds)), "max": float(seconds.max())}


if __name__ == "__main__":
    from one_line import run

    run(main)
