"""int8: the encoders of a bundle's `detect` graph with Q/DQ, by ONNX Runtime's static quantiser."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from darcnn.export.operations import MIN_HALF_ELEMENTS, QUANTISED_OPS, check_graph, store_as_half, strip_notes
from darcnn.export.printing import to_json
from darcnn.runtime.bundle import MEMBER_CAPS, Bundle, read_training, write_bundle
from darcnn.runtime.errors import UsageError

__all__ = ["quantise", "write_quantised"]

# What computes in int8, or passes int8 on: activations must be among it, so that a convolution is measured
# behind its activation, where the range is small.
_INT8_OPS = frozenset({"Add", "Clip", "Conv", "MaxPool", "Relu", "Resize"})


def quantise(bundle: Bundle, tiles: Sequence[NDArray[np.uint8]], *, has_offsets: bool = True) -> Bundle:
    """Return `bundle` with backbones and feature pyramids of `detect` in int8; `mask` stays.

    Weights have a scale a channel; activations one a tensor, from the smallest and largest values on `tiles`.
    Heads, pooling and suppression stay as they are.

    Args:
        bundle: in float32.
        tiles: (S, S, C) uint8, what the model is to see; a dozen.
        has_offsets: activations are unsigned with a zero point, which CPUs are fast with; without, they are
            signed, the only way that TensorRT takes, and ONNX Runtime is slow on a CPU.
    Raises:
        UsageError: the bundle is not in float32, or there is no tile.
    """
    if bundle.precision != "fp32":
        raise UsageError(
            f"is in {bundle.precision} already", where=bundle.path, fix="give the one it was made of"
        )
    if not tiles:
        raise UsageError("no tile to calibrate on", where="--data", fix="give a folder of images")
    model = onnx.load_model_from_string(bundle.read("detect.onnx"))
    _store_as_float(model)
    for number, node in enumerate(model.graph.node):
        node.name = f"{number} {node.op_type}"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        with _without_advice():
            quantize_static(
                source,
                target,
                _Tiles(tiles, bundle.manifest.input.batch),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=sorted(_INT8_OPS),  # nothing else is measured
                nodes_to_quantize=[node.name for node in _encoder_nodes(model.graph)],
                per_channel=True,
                activation_type=QuantType.QUInt8 if has_offsets else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={"ActivationSymmetric": not has_offsets, "QuantizeBias": has_offsets},
            )
        quantised = onnx.load(target)
    strip_notes(quantised)
    del quantised.opset_import[1:]  # domains that no node is of
    store_as_half(quantised, _exact_in_half(quantised))
    content: bytes = quantised.SerializeToString(deterministic=True)
    check_graph(content, QUANTISED_OPS)
    return bundle.with_graphs({"detect.onnx": content}, precision="int8")


def write_quantised(
    path: Path, bundle: Bundle, quantised: Bundle, *, n_tiles: int, has_offsets: bool
) -> None:
    """Write `quantised`, what `quantise` made of `bundle` on so many tiles, as the file `path`, replacing it.

    The figures of the training are of the float32 bundle, and are called so: int8 finds other boxes.

    Raises:
        BundleError: the record of the training is no table in JSON.
        OutputError: the file cannot be written.
    """
    training = read_training(bundle)
    figures = training.pop("figures", None)
    training |= {"float32_figures": figures, "calibration_tiles": n_tiles, "has_offsets": has_offsets}
    members = {name: quantised.read(name) for name in MEMBER_CAPS if name != "manifest.json"}
    members["training.json"] = to_json(training)
    write_bundle(path, replace(quantised.manifest, name=path.stem), members)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep the quantiser's advice to pre-process, which the exporter did, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Tiles(CalibrationDataReader):  # type: ignore[misc]  # untyped
    """The tiles one by one, each as often as a batch has places."""

    def __init__(self, tiles: Sequence[NDArray[np.uint8]], batch: int) -> None:
        self._feeds: Iterator[dict[str, NDArray[np.uint8]]] = iter(
            [{"tile": np.repeat(tile[None], batch, axis=0)} for tile in tiles]
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._feeds, None)


def _store_as_float(model: ModelProto) -> None:
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


def _encoder_nodes(graph: onnx.GraphProto) -> list[NodeProto]:
    """Return the nodes between the tile and the two pyramids that compute in int8.

    E_p is what the atlas comes from, E_c what the RPN's head sees. The head is where one weight serves more
    than two convolutions, for it is the same on every level; two may be those of encoders that are equal.
    """
    uses = Counter(node.input[1] for node in graph.node if node.op_type == "Conv")
    is_head = {node.name: node.op_type == "Conv" and uses[node.input[1]] > 2 for node in graph.node}
    makers = {name: node for node in graph.node for name in node.output}
    todo = ["atlas", *(node.input[0] for node in graph.node if is_head[node.name])]
    chosen: dict[str, NodeProto] = {}
    seen: set[str] = set()
    while todo:
        node = makers.get(todo.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        todo.extend(node.input)
        if node.op_type in _INT8_OPS and not _is_behind_head(node, makers, is_head):
            chosen[node.name] = node
    return list(chosen.values())


def _is_behind_head(node: NodeProto, makers: Mapping[str, NodeProto], is_head: Mapping[str, bool]) -> bool:
    """Tell whether `node` is of the RPN's head, or the activation behind its first convolution."""
    before = makers.get(node.input[0])
    return is_head[node.name] or (before is not None and is_head[before.name])


def _exact_in_half(model: ModelProto) -> set[str]:
    """Return the constants that were float16 in the bundle: large, and none the worse for it."""
    names = set()
    for constant in model.graph.initializer:
        if constant.data_type == TensorProto.FLOAT and np.prod(constant.dims) >= MIN_HALF_ELEMENTS:
            array = numpy_helper.to_array(constant)
            if array.ndim > 1 and np.array_equal(array.astype(np.float16).astype(np.float32), array):
                names.add(constant.name)
    return names
