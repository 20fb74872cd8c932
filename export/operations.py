"""What the graphs of a bundle may hold, whoever wrote them: operations, versions, constants in float16.

Needs `onnx` alone: what is derived from a bundle (half precision, int8) is checked without PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

__all__ = [
    "MIN_HALF_ELEMENTS",
    "OPSET",
    "QUANTISED_OPS",
    "STANDARD_OPS",
    "check_graph",
    "store_as_half",
    "strip_notes",
]

OPSET = 18
# All that the graphs may use: what ONNX Runtime, OpenVINO, TensorRT and TensorRT-RTX run without a plugin.
# fmt: off
STANDARD_OPS = frozenset({
    "Abs", "Add", "And", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "Gemm", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "MatMul",
    "Max", "MaxPool", "Min", "Mul", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape", "Resize",
    "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze",
    "Where",
})
# fmt: on
QUANTISED_OPS = STANDARD_OPS | {"DequantizeLinear", "QuantizeLinear"}  # of a bundle in int8
MIN_HALF_ELEMENTS = 256  # below it a float16 saves nothing


def check_graph(content: bytes, operations: frozenset[str] = STANDARD_OPS) -> None:
    """Refuse a graph that some backend could not run as it is.

    Raises:
        RuntimeError: an operation outside `operations`, a free dimension, or no valid ONNX.
    """
    model = onnx.load_model_from_string(content)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise RuntimeError(f"the exporter made an invalid graph: {err}") from err
    domains = {opset.domain: opset.version for opset in model.opset_import}
    others = {node.op_type for node in model.graph.node if node.domain or node.op_type not in operations}
    if domains != {"": OPSET} or others or model.functions:
        raise RuntimeError(f"the exporter used {sorted(others)} of {domains}")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    known = {value.name: value.type.tensor_type.shape for value in _values(inferred)}
    for name in (name for node in model.graph.node for name in node.output):
        if name not in known or not all(dim.dim_value > 0 for dim in known[name].dim):
            raise RuntimeError(f"the exporter left the shape of {name} open")


def strip_notes(model: ModelProto) -> None:
    """Remove what the exporter noted about itself: stack traces, paths, intermediate shapes."""
    model.producer_name, model.producer_version = "darcnn", ""
    del model.metadata_props[:], model.graph.value_info[:], model.graph.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    graph = model.graph
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]


def store_as_half(model: ModelProto, names: set[str]) -> None:
    """Store the constants called `names` as float16, each with a Cast to float32 behind it."""
    casts = []
    for constant in model.graph.initializer:
        if constant.name not in names:
            continue
        array = numpy_helper.to_array(constant)
        half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            raise RuntimeError(f"{constant.name} was not rounded to float16")
        stored = f"{constant.name}.half"
        casts.append(
            helper.make_node("Cast", [stored], [constant.name], f"{constant.name}.cast", to=TensorProto.FLOAT)
        )
        constant.CopyFrom(numpy_helper.from_array(half, stored))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*graph.input, *graph.output, *graph.value_info)
