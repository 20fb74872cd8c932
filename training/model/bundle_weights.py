"""A finished model as a start: the weights inside the graphs of a bundle, back in a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from darcnn.runtime.bundle import Bundle, read_training
from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.load import find_bundle, shipped_models
from darcnn.training.model.network import Darcnn
from darcnn.training.model.norms import normed_convolutions
from darcnn.training.model.presets import Preset, preset_named

if TYPE_CHECKING:  # the extra `export` brings it
    import onnx

__all__ = ["bundle_named", "load_bundle", "preset_of"]

_HALF, _QUANTISED = ".half", "_quantized"  # end the names of weights held as float16, and as integers
_DEQUANTISED = "_DequantizeLinear_Output"  # ends the name of what becomes of the latter
_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}  # of the weights of layers that have a bias
_SHARED, _TARGET = "shared_encoder.", "target_encoder."
_SOURCE = ("source_encoder.", "source_heads.", "projection.")  # what no bundle holds


def bundle_named(weights: str, data: Path) -> Bundle:
    """Return the bundle that a recipe calls `weights`: a shipped name, or a path relative to `data`.

    Raises:
        BundleError: it cannot be used.
    """
    return find_bundle(weights if weights in shipped_models() else data / weights)


def preset_of(bundle: Bundle) -> Preset:
    """Return the preset that the network inside `bundle` was built from.

    Raises:
        BundleError: the record of its training is no table in JSON.
        UsageError: there is no such preset.
    """
    recipe = read_training(bundle).get("recipe")
    weights = recipe.get("weights") if isinstance(recipe, dict) else None
    return preset_named(bundle.manifest.preset, weights if isinstance(weights, str) else "imagenet")


def load_bundle(network: Darcnn, bundle: Bundle) -> None:
    """Give `network` the target branch that `bundle` was exported from; the source branch starts as its copy.

    The graphs hold each convolution with the frozen batch normalisation behind it folded in, rounded to
    float16. It is unfolded by the statistics that `network` has, so that convolutions are as large, and
    learn at the pace, that they did before; those of a fresh network leave them as they are. Weights in int8
    come back as they were rounded.

    Raises:
        UsageError: the bundle is of another preset.
        InputError: its graphs do not hold the weights of the network.
    """
    if preset_of(bundle) != network.preset:
        raise UsageError(
            f"is of preset {bundle.manifest.preset}, or has other layers than the recipe's",
            where=bundle.path,
            fix="give the recipe that preset, or another start",
        )
    stored = _stored_weights(bundle)
    for pair in normed_convolutions(network):
        if not pair.path.startswith(_SOURCE):
            weight = _take(stored, f"{pair.path}.weight", pair.convolution.weight, bundle)
            pair.unfold(weight, _take(stored, f"{pair.path}.bias", pair.scale(), bundle))
    folded = {f"{pair.path}.weight" for pair in normed_convolutions(network)}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name not in folded and not name.startswith(_SOURCE):
                parameter.copy_(_take(stored, name, parameter, bundle))
    network.source_encoder.load_state_dict(network.target_encoder.state_dict())
    network.source_heads.load_state_dict(network.target_heads.state_dict())


def _stored_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Return the numbers in both graphs, under the names that a network has for them."""
    try:
        import onnx
    except ImportError as err:
        raise UsageError(
            "needs onnx to be read as a start", where=bundle.path, fix="run pip install 'darcnn[export]'"
        ) from err
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no stubs

    stored: dict[str, Tensor] = {}
    for graph, prefix in (("detect.onnx", ""), ("mask.onnx", "target_heads.")):
        try:
            model = onnx.load_from_string(bundle.read(graph)).graph
        except DecodeError as err:
            raise InputError(f"{graph} is no ONNX graph", where=bundle.path, fix="copy it again") from err
        constants = {
            constant.name.removesuffix(_HALF): torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())
            for constant in model.initializer
        }
        constants |= dict(_dequantised(constants))
        for node in model.node:
            if node.op_type in _OUTPUT_AXIS and len(node.input) > 1:
                _name_bias(constants, node)
        stored |= {prefix + name.removeprefix("network."): tensor for name, tensor in constants.items()}
    for name in [name for name in stored if name.startswith(_SHARED)]:  # encoders that are equal, the same
        stored.setdefault(_TARGET + name.removeprefix(_SHARED), stored[name])
    return stored


def _name_bias(constants: dict[str, Tensor], node: onnx.NodeProto) -> None:
    """Let a layer's bias be known by its own name: equal ones are stored once, one of zeros not at all."""
    weight = node.input[1].removesuffix(_DEQUANTISED)
    bias = constants.get(node.input[2]) if len(node.input) > 2 else None
    if weight in constants and len(node.input) == 2:
        bias = torch.zeros(constants[weight].shape[_OUTPUT_AXIS[node.op_type]])
    if bias is not None:
        constants.setdefault(f"{weight.removesuffix('weight')}bias", bias)


def _dequantised(constants: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what `DequantizeLinear` of ONNX makes of weights in int8 and biases in int32, by channel."""
    for name, numbers in constants.items():
        if name.endswith(_QUANTISED):
            whole = name.removesuffix(_QUANTISED)
            scale = constants.get(f"{whole}_scale", constants.get(f"{name}_scale"))
            if scale is not None and len(scale) == len(numbers):  # zero points of weights are 0
                yield whole, numbers * scale.reshape(-1, *[1] * (numbers.ndim - 1))


def _take(stored: dict[str, Tensor], name: str, like: Tensor, bundle: Bundle) -> Tensor:
    tensor = stored.get(name)
    if tensor is None or tensor.shape != like.shape or not tensor.is_floating_point():
        raise InputError(
            f"its graphs do not hold {name} as the network has it",
            where=bundle.path,
            fix="give a bundle that `darcnn-export` wrote",
        )
    return tensor.float()
