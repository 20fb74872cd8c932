"""What do the graphs cost, operation by operation, and how far from the machine's limits do they run?

    python benchmarks/roofline.py nuclei-he
    python benchmarks/roofline.py nuclei-he --mask-heads

Counts multiply-adds and bytes of every node from the graph's own shapes, and estimates what a node takes: its
arithmetic at the machine's fastest rate, or its bytes at the fastest copy, whichever is longer (the roofline
model, Williams et al. 2009). Both rates are the best of many tries, by turns with the backends. Views are
free, and so are activations, which every backend does with the convolution before.

It is an estimate and no bound: what stays in a cache or is fused moves fewer bytes than the graph says, and a
convolution may be computed with fewer multiplications than its definition (Winograd), so that a backend may
well be faster. Arithmetic alone is the better yardstick where bytes dominate.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import onnx
import torch

from darcnn.export.graph import export_mask
from darcnn.export.static import ExportOptions
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.errors import DeviceError
from darcnn.runtime.load import find_bundle
from darcnn.training.model.network import Darcnn
from darcnn.training.model.presets import PRESETS

# Views, activations, and Cast: that of stored weights, which is done at load.
_FREE = {"Cast", "Clip", "Flatten", "Relu", "Reshape", "Squeeze", "Unsqueeze"}
_ROUNDS = 7
# width and layers, cells pooled: the paper's, lite's, and smaller ones
_MASK_HEADS = {
    "256 x 4, 28 px (the paper's)": ((256,) * 4, 14),
    "64 x 3, 28 px (lite)": ((64,) * 3, 14),
    "32 x 2, 28 px": ((32,) * 2, 14),
    "64 x 3, 14 px": ((64,) * 3, 7),
    "32 x 2, 14 px": ((32,) * 2, 7),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one node, or all of an operation, has to do."""

    macs: int
    read_written: int  # bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.read_written + other.read_written)

    def estimate_s(self, macs_per_s: float, bytes_per_s: float) -> float:
        """Return the longer of what its arithmetic and its bytes take at full rate."""
        return max(self.macs / macs_per_s, self.read_written / bytes_per_s)


def count_graph(content: bytes) -> list[tuple[str, Cost]]:
    """Return (operation, cost) of every node of the ONNX graph in `content`, which has static shapes."""
    model = onnx.load_model_from_string(content)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {v.name: _shape(v) for v in (*graph.input, *graph.output, *graph.value_info)}
    sizes = {name: math.prod(shape) * width for name, (shape, width) in shapes.items()}
    for constant in graph.initializer:
        width = onnx.helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize
        shapes[constant.name] = tuple(constant.dims), width
        sizes[constant.name] = math.prod(constant.dims) * width
    found = []
    for node in graph.node:
        if node.op_type in _FREE:
            continue
        out = sum(sizes[name] for name in node.output)
        read = {name for name in node.input if name}
        # of a table only the rows that are picked are read
        inputs = out if node.op_type == "Gather" else sum(sizes[name] for name in read)
        found.append((node.op_type, Cost(_macs(node, {n: s for n, (s, _) in shapes.items()}), inputs + out)))
    return found


def _shape(value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], int]:
    tensor = value.type.tensor_type
    width = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return tuple(dim.dim_value for dim in tensor.shape.dim), width


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the multiply-adds of a node, 0 where it has no weights or products."""
    if node.op_type == "Conv":
        _, channels, *kernel = shapes[node.input[1]]  # channels of one group
        return math.prod(shapes[node.output[0]]) * channels * math.prod(kernel)
    if node.op_type == "ConvTranspose":
        _, channels, *kernel = shapes[node.input[1]]
        return math.prod(shapes[node.input[0]]) * channels * math.prod(kernel)
    if node.op_type in ("Gemm", "MatMul"):
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    return 0


def make_products(threads: int) -> list[tuple[int, Callable[[], object]]]:
    """Return multiply-adds and a call of large products by several libraries: none is always the fastest."""
    import onnxruntime  # behind darcnn, which switches its telemetry off

    side = 1024
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        g (float[{side}, {side}] a) => (float[{side}, {side}] b) {{ b = MatMul (a, a) }}"""
    )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    a = torch.randn(side, side)
    image, weights = torch.randn(1, 256, 64, 64), torch.randn(256, 256, 3, 3)
    return [
        (side**3, lambda: torch.mm(a, a)),
        (side**3, lambda: session.run(None, {"a": a.numpy()})),
        (64**2 * weights.numel(), lambda: torch.conv2d(image, weights, padding=1)),
    ]


def measure_peaks(products: Sequence[tuple[int, Callable[[], object]]]) -> tuple[float, float]:
    """Return multiply-adds a second of the fastest product, and bytes a second of a large copy."""
    source, target = np.ones(1 << 25, np.float32), np.empty(1 << 25, np.float32)  # 128 MiB each
    rate = max(macs / _seconds(run) for _ in range(5) for macs, run in products)
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))
    return rate, 2 * source.nbytes / copy


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@click.command()
@click.argument("model")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--mask-heads", is_flag=True, help="Compare sizes of the mask head instead.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(model: str, threads: int, mask_heads: bool, out: Path | None) -> None:
    """Print the costs of MODEL's graphs."""
    torch.set_num_threads(threads)
    record: dict[str, object] = {
        "model": model,
        "machine": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    record |= _compare_mask_heads(threads) if mask_heads else _compare_backends(model, threads)
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _compare_backends(model: str, threads: int) -> dict[str, object]:
    bundle = find_bundle(model)
    sizes, limits = bundle.manifest.input, bundle.manifest.limits
    engines = {}
    for backend in ("onnxruntime", "openvino"):
        try:
            engines[backend] = open_engine(bundle, device="cpu", backend=backend, threads=threads)
        except DeviceError as err:
            click.echo(f"{backend} not measured: {err}")
    tiles = np.random.default_rng(0).integers(
        0, 256, (sizes.batch, sizes.tile_px, sizes.tile_px, sizes.channels), np.uint8
    )
    boxes = np.tile(np.array([8, 8, 40, 40], np.float32), (limits.mask_batch, 1))
    index = np.zeros(limits.mask_batch, np.int64)
    seconds: dict[tuple[str, str], float] = {}
    peaks, products = (0.0, 0.0), make_products(threads)
    for _ in range(_ROUNDS):
        for backend, engine in engines.items():
            peaks = tuple(map(max, peaks, measure_peaks(products)))
            found = engine.detect(tiles)
            for graph, run in (
                ("detect", lambda e=engine: e.detect(tiles)),
                ("mask", lambda e=engine, f=found: e.masks(f, boxes, index)),
            ):
                seconds[graph, backend] = min(seconds.get((graph, backend), math.inf), _seconds(run))
    click.echo(f"fastest here: {peaks[0] / 1e9:.1f} GMAC/s, {peaks[1] / 1e9:.1f} GB/s")
    record: dict[str, object] = {"gmac_per_s": peaks[0] / 1e9, "gb_per_s": peaks[1] / 1e9}
    for graph in ("detect", "mask"):
        by_op: dict[str, list[Cost]] = defaultdict(list)
        for op, cost in count_graph(bundle.read(f"{graph}.onnx")):
            by_op[op].append(cost)
        rows = {
            op: (len(costs), sum(costs, Cost(0, 0)), sum(cost.estimate_s(*peaks) for cost in costs))
            for op, costs in by_op.items()
        }
        estimate = sum(row[2] for row in rows.values())
        click.echo(f"{graph}: {'op':14} {'nodes':>5} {'GMAC':>8} {'MB':>8} {'about ms':>9}")
        for op, (n, cost, least) in sorted(rows.items(), key=lambda item: -item[1][2])[:9]:
            line = f"{n:5d} {cost.macs / 1e9:8.3f} {cost.read_written / 1e6:8.1f} {1e3 * least:9.2f}"
            click.echo(f"        {op:14} {line}")
        macs = sum(row[1].macs for row in rows.values()) / 1e9
        mega = sum(row[1].read_written for row in rows.values()) / 1e6
        click.echo(f"        all {macs:24.3f} {mega:8.1f} {1e3 * estimate:9.2f}")
        arithmetic = 1e9 * macs / peaks[0]
        for backend in engines:
            took = seconds[graph, backend]
            click.echo(
                f"        {backend}: {1e3 * took:.1f} ms, {took / estimate:.1f} times the estimate, "
                f"{took / arithmetic:.1f} times its arithmetic alone"
            )
        times = {backend: 1e3 * seconds[graph, backend] for backend in engines}
        record[graph] = {"gmac": macs, "mb": mega, "estimate_ms": 1e3 * estimate, "ms": times}
    for engine in engines.values():
        engine.close()
    return record


def _compare_mask_heads(threads: int) -> dict[str, object]:
    import onnxruntime  # behind darcnn, which switches its telemetry off

    options = ExportOptions(channels=3)
    sessions, counts = {}, {}
    for name, (layers, cells) in _MASK_HEADS.items():
        preset = replace(PRESETS["lite"], mask_head_layers=layers, mask_cells=cells)
        content = export_mask(Darcnn(preset), options)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        sessions[name] = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        counts[name] = sum(cost.macs for _, cost in count_graph(content))
    atlas = np.random.default_rng(0).standard_normal(sessions[name].get_inputs()[0].shape, np.float32)
    boxes = np.tile(np.array([8, 8, 40, 40], np.float32), (options.mask_batch, 1))
    feeds = {"atlas": atlas, "boxes": boxes, "tile_index": np.zeros(options.mask_batch, np.int64)}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(_ROUNDS):
        for name, session in sessions.items():
            seconds[name].append(_seconds(lambda s=session: s.run(None, feeds)))
    rows: dict[str, object] = {}
    for name in sessions:
        per_mpx = 500 / options.mask_batch * counts[name] / 1e9  # 500 objects
        rows[name] = {"gmac": counts[name] / 1e9, "ms": 1e3 * min(seconds[name]), "gmac_per_mpx": per_mpx}
        line = f"{counts[name] / 1e9:7.3f} GMAC a call of {options.mask_batch}, {per_mpx:6.1f} a Mpx of 500"
        click.echo(f"{name:30} {line}, {1e3 * min(seconds[name]):.1f} ms ({np.median(seconds[name]):.3f} s)")
    return rows


if __name__ == "__main__":
    from one_line import run

    run(main)
