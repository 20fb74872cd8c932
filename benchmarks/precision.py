"""What does a smaller precision cost, and what does it bring?

    python benchmarks/precision.py nuclei-he --folder DATA/histology/val --diameter 19 \\
        --calibrate DATA/histology/train --precision fp16 --precision int8

Scores the same model on labelled images in float32, with layers in float16 (the graphs that engines of half
precision are made of) and with the convolutions of the encoders in int8 (Q/DQ by ONNX Runtime's static
quantiser, calibrated on unlabelled images), in ONNX Runtime and OpenVINO. Times `detect` by turns on the
same tiles. ONNX Runtime computes float16 on a CPU in float32, with results rounded: its speed says nothing.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from darcnn.export.half import derive_half
from darcnn.export.parity import Parity, compare_objects, find_with_engine
from darcnn.export.quantise import quantise
from darcnn.export.tiles import images_in, read_tiles
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.load import find_bundle
from darcnn.runtime.segmenter import Segmenter
from darcnn.training.evaluate import evaluate_folder

_CALIBRATION_TILES = 16
_TILES, _ROUNDS = 8, 5  # compared and timed


@click.command()
@click.argument("model")
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True), required=True, help="images/, labels/."
)
@click.option("--diameter", type=float, required=True, help="Typical object, pixels of the images.")
@click.option(
    "--calibrate", type=click.Path(path_type=Path, exists=True), help="Unlabelled images, for int8."
)
@click.option("--precision", "precisions", multiple=True, type=click.Choice(["fp16", "int8"]))
@click.option("--backend", "backends", multiple=True, default=["onnxruntime"], help="Repeatable.")
@click.option("--aji/--no-aji", default=True, help="Score the labelled images.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(
    model: str,
    folder: Path,
    diameter: float,
    calibrate: Path | None,
    precisions: Sequence[str],
    backends: Sequence[str],
    aji: bool,
    out: Path | None,
) -> None:
    """Compare the precisions of MODEL on FOLDER."""
    bundle = find_bundle(model)
    bundles = {"fp32": bundle}
    if "fp16" in precisions:
        bundles["fp16"] = derive_half(bundle)
    if "int8" in precisions:
        if calibrate is None:
            raise click.UsageError("int8 needs --calibrate")
        tiles = read_tiles(images_in(calibrate / "images", diameter), bundle, limit=_CALIBRATION_TILES)
        bundles["int8"] = quantise(bundle, list(tiles.values()))
    tiles = read_tiles(images_in(folder / "images", diameter), bundle, limit=_TILES)
    record: dict[str, object] = {
        "model": model,
        "folder": f"{folder.parent.name}/{folder.name}",
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for precision, one in bundles.items():
            for backend in backends:
                engine = open_engine(
                    one,
                    device="cpu" if backend == "onnxruntime" else "auto",
                    backend=backend,
                    precision=one.precision,
                )
                engines[f"{precision} {backend}"] = engine
                stack.callback(engine.close)
        seconds = _time(engines, list(tiles.values()))
        first = next(iter(engines.values()))
        reference = dict(find_with_engine(first, tiles, bundle.manifest.limits.nms_threshold))
        for name, engine in engines.items():
            found = find_with_engine(engine, tiles, bundle.manifest.limits.nms_threshold)
            pairs = [compare_objects(tile, reference[tile], one) for tile, one in found]
            row = _apart(Parity(tuple(pairs))) | {"detect_ms": 1e3 * float(np.median(seconds[name]))}
            if aji:
                segmenter = Segmenter(engine, bundle.manifest)
                scores = evaluate_folder(folder, lambda r, s=segmenter: s(r, diameter_px=diameter)).mean
                row |= {"aji": scores.aji, "object_f1": scores.object_f1}
            record[name] = row
            click.echo(f"{name:18}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _time(engines: dict[str, Engine], tiles: list[NDArray[np.uint8]]) -> dict[str, list[float]]:
    """Return the seconds of `detect` on one tile, engines by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(-1, _ROUNDS):  # the first is a burn-in
        for tile in tiles[:4]:
            for name, engine in engines.items():
                batch = np.repeat(tile[None], engine.spec.batch, axis=0)
                start = time.perf_counter()
                engine.detect(batch)
                if number >= 0:
                    seconds[name].append((time.perf_counter() - start) / engine.spec.batch)
    return seconds


def _apart(parity: Parity) -> dict[str, float]:
    worst = {name: parity.worst(name) for name in ("box_px", "score", "mask", "features")}
    known = {name: value for name, value in worst.items() if value is not None}
    return {"objects": parity.n_objects / 2, "unmatched": parity.unmatched, **known}


if __name__ == "__main__":
    from one_line import run

    run(main)
