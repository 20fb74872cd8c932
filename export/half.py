"""Half precision: a bundle's graphs with float16 layers, everything about boxes and scores in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from darcnn.export.operations import check_graph
from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.graphs import OUTPUTS
from darcnn.runtime.errors import UsageError

__all__ = ["derive_half", "to_half"]

# What computes in float16: layers with learned weights (backbone, feature pyramids, heads), and the products:
# bilinear weights times pooled rows, and the counts of suppression, 0 or not, which float16 keeps apart. In
# float32 TensorRT-RTX compiles no product for GPUs of the Turing generation.
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What lies between layers stays in float16 if all of it comes in float16.
_ARITHMETIC = frozenset({"Add", "Clip", "MaxPool", "Pad", "Relu"})
_VIEWS = frozenset({"Concat", "Flatten", "Gather", "Reshape", "Resize", "Slice", "Transpose"})
# op -> which inputs have the type of the output; the others are sizes and positions. Others: all inputs.
_TYPED_INPUTS = {"Flatten": (0,), "Gather": (0,), "Resize": (0,), "Reshape": (0,), "Slice": (0,)}


def derive_half(bundle: Bundle) -> Bundle:
    """Return `bundle` with graphs of half precision; its path and its hash stay the file's.

    Raises:
        UsageError: the bundle is not in float32.
        RuntimeError: a graph is not one that `darcnn-export bundle` writes.
    """
    if bundle.precision != "fp32":
        raise UsageError(
            f"is in {bundle.precision} already", where=bundle.path, fix="leave --precision out for this model"
        )
    graphs = {f"{graph}.onnx": to_half(bundle.read(f"{graph}.onnx")) for graph in OUTPUTS}
    return bundle.with_graphs(graphs, precision="fp16")


def to_half(content: bytes) -> bytes:
    """Return the graph in `content` with its layers in float16; inputs and outputs keep their types.

    What is half follows from the structure: layers and products, and what passes their results on (bilinear
    weights are rounded, positions are not). Decoding, overlaps, sigmoid, softmax and sorting stay float32,
    with a Cast where they read from a layer.

    Raises:
        RuntimeError: the graph is not one that `darcnn-export bundle` writes.
    """
    model = onnx.load_model_from_string(content)
    draft = _Draft.of(model)
    for node in model.graph.node:
        draft.add(node)
    for output in model.graph.output:
        if output.name in draft.half:
            draft.name_output(output.name)
    del model.graph.node[:], model.graph.initializer[:]
    used = {name for node in draft.nodes for name in node.input}
    model.graph.node.extend(node for node in draft.nodes if _is_used(node, used, model.graph.output))
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(c for name, c in draft.constants.items() if name in used)
    half: bytes = model.SerializeToString(deterministic=True)
    check_graph(half)
    return half


@dataclass(slots=True)
class _Draft:
    """The graph as it is rewritten, node by node in its own order."""

    constants: dict[str, TensorProto]  # name -> initializer
    stored: Mapping[str, str]  # float32 weight -> the float16 initializer that it is cast from
    floats: frozenset[str]  # tensors of float32 in the graph as it was
    half: set[str] = field(default_factory=set)  # those that are float16 now, under the same name
    rows: set[str] = field(default_factory=set)  # those of `half` picked by index, to be pooled or decoded
    nodes: list[NodeProto] = field(default_factory=list)
    cast: set[str] = field(default_factory=set)  # names of the casts made

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Draft:
        graph = model.graph
        constants = {constant.name: constant for constant in graph.initializer}
        stored = {
            node.output[0]: node.input[0]
            for node in graph.node
            if node.op_type == "Cast"
            and node.input[0] in constants
            and constants[node.input[0]].data_type == TensorProto.FLOAT16
        }
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *graph.input, *graph.output)
        floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
        floats |= {name for name, c in constants.items() if c.data_type == TensorProto.FLOAT}
        return cls(constants, stored, frozenset(floats))

    def add(self, node: NodeProto) -> None:
        """Append `node` in the precision that it is to have, with the casts that it needs."""
        typed = [i for i in _typed_inputs(node) if node.input[i] in self.floats]
        inputs = {node.input[i] for i in typed}
        if self._is_half(node.op_type, inputs):
            for i in typed:
                node.input[i] = self._as_half(node.input[i])
            self.half |= set(node.output)
            if node.op_type == "Gather" or (node.op_type in _VIEWS and inputs & self.rows):
                self.rows |= set(node.output)
        else:
            node.input[:] = [self._as_float(name) if name in self.half else name for name in node.input]
        self.nodes.append(node)

    def name_output(self, name: str) -> None:
        """Let the graph's output `name`, which is float16 now, be the float32 cast of it."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [f"{name}.fp16" if one == name else one for one in names]
        self.nodes.append(_cast(f"{name}.fp16", name, TensorProto.FLOAT))

    def _is_half(self, op: str, inputs: set[str]) -> bool:
        if op in _LAYERS:
            return True
        comes_half = inputs & self.half
        is_whole = bool(comes_half) and not inputs - comes_half - self.constants.keys()
        return is_whole and (op in _VIEWS or (op in _ARITHMETIC and not inputs & self.rows))

    def _as_half(self, name: str) -> str:
        if name in self.half:
            return name
        if name in self.stored:
            return self.stored[name]
        half = f"{name}.fp16"
        if name in self.constants:
            array = numpy_helper.to_array(self.constants[name]).astype(np.float16)
            self.constants[half] = numpy_helper.from_array(array, half)
        elif half not in self.cast:
            self.cast.add(half)
            self.nodes.append(_cast(name, half, TensorProto.FLOAT16))
        return half

    def _as_float(self, name: str) -> str:
        whole = f"{name}.fp32"
        if whole not in self.cast:
            self.cast.add(whole)
            self.nodes.append(_cast(name, whole, TensorProto.FLOAT))
        return whole


def _typed_inputs(node: NodeProto) -> Iterable[int]:
    every = (i for i, name in enumerate(node.input) if name)
    return _TYPED_INPUTS.get(node.op_type, tuple(every))


def _is_used(node: NodeProto, used: set[str], outputs: Iterable[onnx.ValueInfoProto]) -> bool:
    return bool((used | {output.name for output in outputs}) & set(node.output))


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}.cast", to=kind)
