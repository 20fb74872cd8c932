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
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from darcnn.export.half import derive_half
from darcnn.export.parity import Parity, TileSource, compare_objects, find_with_engine, read_tiles
from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.load import find_bundle
from darcnn.runtime.readers.open import is_readable
from darcnn.runtime.segmenter import Segmenter
from darcnn.training.evaluate import evaluate_folder

_CALIBRATION_TILES = 16
_TILES, _ROUNDS = 8, 5  # compared and timed
_INT8_OPS = {"Conv", "Clip", "Relu", "Add", "MaxPool", "Resize"}


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
        tiles = read_tiles(_sources(calibrate, diameter), bundle, limit=_CALIBRATION_TILES)
        bundles["int8"] = _quantise(bundle, list(tiles.values()))
    tiles = read_tiles(_sources(folder, diameter), bundle, limit=_TILES)
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
                    one, device="cpu" if backend == "onnxruntime" else "auto", backend=backend
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


def _sources(folder: Path, diameter_px: float) -> list[TileSource]:
    images = folder / "images"
    return [TileSource(path, diameter_px) for path in sorted(images.iterdir()) if is_readable(path)]


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
    worst = {
        name: max(float(getattr(tile, name)) for tile in parity.tiles)
        for name in ("box_px", "score", "mask", "features")
    }
    unmatched = sum(tile.n_unmatched for tile in parity.tiles)
    return {"objects": parity.n_objects / 2, "unmatched": unmatched / max(parity.n_objects, 1), **worst}


class _Tiles(CalibrationDataReader):  # type: ignore[misc]  # untyped
    def __init__(self, tiles: Sequence[NDArray[np.uint8]], batch: int) -> None:
        self._feeds: Iterator[dict[str, NDArray[np.uint8]]] = iter(
            [{"tile": np.repeat(tile[None], batch, axis=0)} for tile in tiles]
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._feeds, None)


def _quantise(bundle: Bundle, tiles: Sequence[NDArray[np.uint8]]) -> Bundle:
    """Return `bundle` with the encoders of `detect` in int8."""
    model = onnx.load_model_from_string(bundle.read("detect.onnx"))
    _store_as_float(model)
    for number, node in enumerate(model.graph.node):
        node.name = f"{number} {node.op_type}"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            _Tiles(tiles, bundle.manifest.input.batch),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=_encoder_nodes(model.graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return bundle.with_graphs({"detect.onnx": target.read_bytes()}, precision="int8")


def _store_as_float(model: onnx.ModelProto) -> None:
    """Store in float32 what is stored in float16 and cast: the quantiser looks for constants."""
    constants = {constant.name: constant for constant in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        stored = constants.get(node.input[0]) if node.op_type == "Cast" else None
        if stored is None or stored.data_type != TensorProto.FLOAT16:
            nodes.append(node)
            continue
        array = numpy_helper.to_array(constants.pop(stored.name)).astype(np.float32)
        constants[node.output[0]] = numpy_helper.from_array(array, node.output[0])
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants.values())


def _encoder_nodes(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the nodes that the features come from: all above the atlas and the RPN's head."""
    makers = {name: node for node in graph.node for name in node.output}
    heads = [node for node in graph.node if any("proposer.head.conv" in name for name in node.input)]
    todo = ["atlas", *(node.input[0] for node in heads)]
    chosen: dict[str, None] = {}
    seen: set[str] = set()
    while todo:
        node = makers.get(todo.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        todo.extend(node.input)
        if node.op_type in _INT8_OPS:
            chosen[node.name] = None
    return list(chosen)


if __name__ == "__main__":
    main()
