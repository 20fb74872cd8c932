"""How fast could a GPU be at best? Arithmetic on the graphs of a bundle and on data sheets; nothing is run.

    python benchmarks/gpu_bounds.py nuclei-fluorescence

Counts the operations of convolutions and matrix products, and the bytes that the nodes write, for one
tile and one full call of masks. A GPU needs at least the time of the operations at its peak in float32, if
all else is fused away; and at most, if it keeps its memory busy and nothing is fused, the time to write each
tensor and read it again. Starting kernels and the work of the host come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import click
import onnx

from darcnn.runtime.load import find_bundle

# float32 TFLOP/s without tensor cores, memory GB/s: NVIDIA's data sheets
GPUS = {
    "T4": (8.1, 320),
    "RTX 3060": (12.7, 360),
    "L4": (30.3, 300),
    "A100 40 GB": (19.5, 1555),
    "RTX 4090": (82.6, 1008),
    "H100 SXM": (67.0, 3350),
}

_VIEWS = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}  # they write nothing


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call of a graph takes."""

    gflop: float
    megabytes: float  # given out by its nodes


@click.command()
@click.argument("model")
def main(model: str) -> None:
    """Print the roofline of MODEL."""
    bundle = find_bundle(model)
    batch = bundle.manifest.input.batch
    costs = {graph: count(bundle.read(f"{graph}.onnx")) for graph in ("detect", "mask")}
    for graph, cost in costs.items():
        click.echo(f"{graph:8} {cost.gflop:6.2f} GFLOP {cost.megabytes:7.0f} MB a call")
    gflop = costs["detect"].gflop / batch + costs["mask"].gflop
    megabytes = costs["detect"].megabytes / batch + costs["mask"].megabytes
    for name, (tflops, bandwidth) in GPUS.items():
        compute, traffic = gflop / tflops, 2 * megabytes / bandwidth
        click.echo(f"{name:12} {compute:6.2f} to {max(compute, traffic):6.2f} ms a tile")


def count(content: bytes) -> Cost:
    """Return the cost of one call of a graph with static shapes."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(content)).graph
    values = (*graph.value_info, *graph.output, *graph.input)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    widths = {
        v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).itemsize for v in values
    }
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    shapes |= constants
    flop, given_out = 0, 0
    for node in graph.node:
        out = shapes.get(node.output[0], [])
        # what is made of stored weights alone is made once, at load
        if node.op_type not in _VIEWS and not constants.keys() >= set(node.input):
            given_out += sum(widths.get(name, 4) * math.prod(shapes.get(name, [])) for name in node.output)
        first, second = (shapes.get(name, []) for name in (*node.input, "", "")[:2])
        if node.op_type == "Conv":
            flop += 2 * math.prod(out) * math.prod(second[1:])
        elif node.op_type == "ConvTranspose":
            flop += 2 * math.prod(first) * math.prod(second[1:])
        elif node.op_type in ("MatMul", "Gemm"):
            flop += 2 * math.prod(out) * first[-1]
    return Cost(flop / 1e9, given_out / 1e6)


if __name__ == "__main__":
    from one_line import run

    run(main)
