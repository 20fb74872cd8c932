"""The network as two ONNX files: normalisation folded, weights stored as float16, reproducible bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnxscript
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from darcnn.export.static import MAX_TOP_K, AtlasPool, DetectGraph, ExportOptions, MaskGraph
from darcnn.runtime.errors import InputError
from darcnn.training.model.network import Darcnn

__all__ = [
    "DETECT_INPUTS",
    "DETECT_OUTPUTS",
    "MASK_INPUTS",
    "MASK_OUTPUTS",
    "MIN_HALF_ELEMENTS",
    "OPSET",
    "QUANTISED_OPS",
    "STANDARD_OPS",
    "check_graph",
    "export_detect",
    "export_mask",
    "freeze_network",
    "store_as_half",
    "strip_notes",
]

OPSET = 18
DETECT_INPUTS, DETECT_OUTPUTS = ("tile",), ("boxes", "scores", "atlas", "converged")
MASK_INPUTS, MASK_OUTPUTS = ("atlas", "boxes", "tile_index"), ("masks",)
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
_FOLD_ELEMENTS = MAX_TOP_K  # constants are computed in advance up to this size: ranks, and no tables of them


def export_detect(network: Darcnn, options: ExportOptions) -> bytes:
    """Return `detect.onnx`: `tile` to `boxes`, `scores`, `atlas`, `converged`.

    Raises:
        UsageError: the sizes do not fit the network.
        InputError: a weight cannot be stored.
    """
    graph = DetectGraph(freeze_network(network), options)
    size = options.tile_px
    tile = torch.zeros((options.batch, size, size, options.channels), dtype=torch.uint8)
    return _to_onnx(graph, (tile,), DETECT_INPUTS, DETECT_OUTPUTS)


def export_mask(network: Darcnn, options: ExportOptions) -> bytes:
    """Return `mask.onnx`: `atlas`, `boxes`, `tile_index` to `masks`.

    Raises:
        UsageError: the sizes do not fit the network.
        InputError: a weight cannot be stored.
    """
    graph = MaskGraph(freeze_network(network), options)
    rows = AtlasPool(network, options.tile_px).rows_per_tile
    atlas = torch.zeros((options.batch, rows, network.preset.pyramid_channels))
    boxes = torch.zeros((options.mask_batch, 4))
    tile_index = torch.zeros(options.mask_batch, dtype=torch.int64)
    return _to_onnx(graph, (atlas, boxes, tile_index), MASK_INPUTS, MASK_OUTPUTS)


def freeze_network(network: Darcnn) -> Darcnn:
    """Return a copy for running: batch normalisation folded into convolutions, weights rounded to float16.

    The copy is in evaluation mode and computes in float32. Freezing it again changes nothing. It is what
    the graphs are made of and what they are compared with.

    Raises:
        InputError: a weight is not finite or too large for float16.
    """
    frozen = copy.deepcopy(network).eval()
    with torch.no_grad():
        _fold_batch_norms(frozen)
        for name, parameter in frozen.named_parameters():
            parameter.requires_grad_(False)
            if not _is_stored_as_half(parameter):
                continue
            rounded = parameter.half().float()
            if not bool(rounded.isfinite().all()):
                raise InputError(
                    "a weight is infinite or above 65504, which float16 does not hold",
                    where=name,
                    fix="train again at a lower learning rate",
                )
            parameter.copy_(rounded)
    return frozen


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


def _fold_batch_norms(module: nn.Module) -> None:
    """Let each convolution do the frozen batch normalisation that follows it."""
    before: nn.Module | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, (FrozenBatchNormAct2d, FrozenBatchNorm2d)) and isinstance(before, nn.Conv2d):
            scale = child.get_buffer("weight") * (child.get_buffer("running_var") + child.eps).rsqrt()  # (C,)
            shift = child.get_buffer("bias") - child.get_buffer("running_mean") * scale
            if before.bias is not None:
                shift = shift + before.bias * scale
            before.weight.mul_(scale[:, None, None, None])
            before.bias = nn.Parameter(shift, requires_grad=False)
            module.add_module(name, child.act if isinstance(child, FrozenBatchNormAct2d) else nn.Identity())
        else:
            _fold_batch_norms(child)
        before = child


def _is_stored_as_half(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and parameter.numel() >= MIN_HALF_ELEMENTS


def _to_onnx(
    graph: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]
) -> bytes:
    graph.eval()
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            example,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter returned nothing")
    model: ModelProto = program.model_proto
    model = onnxscript.optimizer.optimize(
        model, input_size_limit=_FOLD_ELEMENTS, output_size_limit=_FOLD_ELEMENTS
    )
    strip_notes(model)
    _merge_equal_constants(model)
    store_as_half(model, {name for name, p in graph.named_parameters() if _is_stored_as_half(p)})
    content: bytes = model.SerializeToString(deterministic=True)
    check_graph(content)
    return content


def strip_notes(model: ModelProto) -> None:
    """Remove what the exporter noted about itself: stack traces, paths, intermediate shapes."""
    model.producer_name, model.producer_version = "darcnn", ""
    del model.metadata_props[:], model.graph.value_info[:], model.graph.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    graph = model.graph
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]


def _merge_equal_constants(model: ModelProto) -> None:
    """Keep one of several constants with the same type, shape and content."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    kept: list[TensorProto] = []
    for constant in model.graph.initializer:
        array = numpy_helper.to_array(constant)
        key = (constant.data_type, tuple(constant.dims), array.tobytes())
        renamed[constant.name] = first.setdefault(key, constant.name)
        if renamed[constant.name] == constant.name:
            kept.append(numpy_helper.from_array(array, constant.name))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


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
