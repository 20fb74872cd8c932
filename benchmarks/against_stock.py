"""How fast are the graphs of preset `resnet50` beside PyTorch and torchvision's own ONNX export?

    python benchmarks/against_stock.py --threads 2

Backends take as many threads as they see cores: for other numbers, pin the process (`taskset -c 0`).

One random tile of 256 px, 400 proposals, 64 detections, untrained weights: `detect` and the masks of all
detections, by turns: PyTorch eagerly on the same target branch; ONNX Runtime and OpenVINO on our
graphs; ONNX Runtime on torchvision's export of `maskrcnn_resnet50_fpn`, which has one backbone where DARCNN
has two, and as many proposals and detections. Figures hold for this machine and load.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

from darcnn.export.graph import freeze_network
from darcnn.export.pack import make_manifest, write_model_bundle
from darcnn.export.parity import find_with_torch
from darcnn.export.static import ExportOptions
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.openvino import computes_bfloat16
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.intensity import IntensityRule
from darcnn.training.model.network import Darcnn

_TILE_PX = 256
_OPTIONS = ExportOptions(channels=3, tile_px=_TILE_PX, halo_px=32, detections=64)
_NMS = 0.95  # what is untrained overlaps: at 0.5 next to nothing would be left


@click.command()
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--rounds", type=int, default=7, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(threads: int, rounds: int, out: Path | None) -> None:
    """Time the four by turns."""
    torch.set_num_threads(threads)
    tile = np.random.default_rng(0).integers(0, 256, (_TILE_PX, _TILE_PX, 3), np.uint8)
    network = _spread_network(tile)
    runs: dict[str, Callable[[], int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = _export(network, Path(folder) / "resnet50.darcnn")
        backends = ("onnxruntime", "openvino", *(["openvino-bf16"] if computes_bfloat16() else []))
        for backend in backends:
            engine = open_engine(bundle, device="auto", backend=backend, threads=threads)
            runs[f"{backend}, our graphs"] = lambda e=engine: _find(e, tile)
    frozen = freeze_network(network)
    runs["PyTorch, eagerly"] = lambda: len(find_with_torch(frozen, tile).boxes)
    image = tile.transpose(2, 0, 1).astype(np.float32) / 255
    session = _stock_session(threads, torch.from_numpy(image))
    feed = {session.get_inputs()[0].name: image}
    runs["onnxruntime, torchvision's export"] = lambda: len(session.run(None, feed)[0])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, int] = {}
    for number in range(-1, rounds):  # the first is a burn-in
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = run()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(runs))
    record: dict[str, object] = {
        "threads": threads,
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, times in seconds.items():
        ratio = float(np.median(times) / np.median(seconds[first]))
        best = min(times) / min(seconds[first])
        record[name] = {"median_s": float(np.median(times)), "min_s": min(times), "found": found[name]}
        click.echo(
            f"{name:34} {np.median(times):.3f} s (from {min(times):.3f}), {found[name]} objects, "
            f"{ratio:.1f} times the first (fastest: {best:.1f})"
        )
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _spread_network(tile: np.ndarray) -> Darcnn:
    """Return an untrained network that finds as much as it may report."""
    torch.manual_seed(0)
    network = Darcnn.from_name("resnet50").eval()
    network.target_heads.nms_thresh = _NMS
    network.target_heads.detections_per_img = _OPTIONS.detections
    _rescale(network, lambda: find_with_torch(network, tile))
    return network


def _rescale(model: torch.nn.Module, run: Callable[[], object]) -> None:
    """Divide the last layers by the spread of what they give: random weights saturate all scores."""
    last = {
        name: layer
        for name, layer in model.named_modules()
        if name.endswith(("cls_logits", "cls_score", "bbox_pred"))
    }
    spread: dict[str, float] = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, i, output, name=name: spread.update({name: float(output.std())})
        )
        for name, layer in last.items()
    ]
    run()
    with torch.no_grad():
        for hook in hooks:
            hook.remove()
        for name, value in spread.items():
            last[name].weight.div_(value)


def _export(network: Darcnn, path: Path) -> Any:
    manifest = make_manifest(
        network,
        _OPTIONS,
        name="resnet50",
        intensity=IntensityRule("full_range"),
        nominal_diameter_px=16.0,
        mpp=None,
        min_score=0.05,
    )
    write_model_bundle(path, network, manifest, {}, "untrained")
    return open_bundle(path)


def _find(engine: Engine, tile: np.ndarray) -> int:
    found = engine.detect(tile[None])
    boxes = found.boxes[0, found.scores[0] > 0]
    engine.masks(found, boxes, np.zeros(len(boxes), np.int64))
    return len(boxes)


def _stock_session(threads: int, image: torch.Tensor) -> Any:
    """Return torchvision's Mask R-CNN of two classes in ONNX Runtime, exported as it documents."""
    import onnxruntime  # behind darcnn, which switches its telemetry off

    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        min_size=_TILE_PX,
        max_size=_TILE_PX,
        rpn_pre_nms_top_n_test=_OPTIONS.proposals_per_level,
        rpn_post_nms_top_n_test=_OPTIONS.proposals,
        box_detections_per_img=_OPTIONS.detections,
        box_nms_thresh=_NMS,
    ).eval()
    with torch.no_grad():
        _rescale(model, lambda: model([image]))
    file = io.BytesIO()
    torch.onnx.export(model, ([image],), file, opset_version=18, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    from one_line import run

    run(main)
