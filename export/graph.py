"""The network as two ONNX files: normalisation folded, weights stored as float16, reproducible bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnxscript
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor, nn

from darcnn.export.operations import MIN_HALF_ELEMENTS, OPSET, check_graph, store_as_half, strip_notes
from darcnn.export.static import MAX_TOP_K, AtlasPool, DetectGraph, ExportOptions, MaskGraph
from darcnn.runtime.errors import InputError
from darcnn.training.model.network import Darcnn
from darcnn.training.model.norms import normed_convolutions

__all__ = [
    "DETECT_INPUTS",
    "DETECT_OUTPUTS",
    "MASK_INPUTS",
    "MASK_OUTPUTS",
    "export_detect",
    "export_mask",
    "freeze_network",
]

DETECT_INPUTS, DETECT_OUTPUTS = ("tile",), ("boxes", "scores", "atlas", "converged")
MASK_INPUTS, MASK_OUTPUTS = ("atlas", "boxes", "tile_index"), ("masks",)
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
        for pair in normed_convolutions(frozen):
            pair.fold()
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
