"""A graph cut into pieces that may compute in bfloat16 and pieces that must not.

Pictures and features are most of the arithmetic; their values are sums of many terms, and bfloat16, which has
eight bits, serves them. Coordinates need more: a tile has 512 pixels a side. Suppression counts, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

__all__ = ["Part", "cut_for_bfloat16"]

_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_PASSED = ("Add", "Concat", "EmbeddingBagPackedSum", "Pad", "Relu")  # by features, on their way to a layer
_RESHAPED = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a graph, an `openvino.Model`, and what its inputs and outputs are called, in their order."""

    model: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_bfloat16: bool = False


def cut_for_bfloat16(model: Any) -> list[Part]:
    """Return the pieces of `model`, to be run one after another; a graph without layers is one piece.

    In bfloat16 may be the layers (convolutions, and products with learned weights), what lies between two
    convolutions, and the way of features to a layer: pooling, not where it pools.

    Args:
        model: an `openvino.Model` of fixed sizes, whose pooling is one operation (`fuse_pooling`);
            its constants are folded.
    """
    from openvino import passes

    folding = passes.Manager()
    folding.register_pass(passes.ConstantFolding())  # sizes, which would tie pieces together
    folding.run_passes(model)
    nodes = model.get_ordered_ops()
    varying = _varying(nodes)
    places = _places(nodes, _handle_features(nodes, varying))
    pieces = (_piece(model.clone(), places, varying, here) for here in range(1 + max(places.values())))
    return [piece for piece in pieces if piece.outputs]


def _name(node: Any) -> str:
    return str(node.get_friendly_name())


def _sources(node: Any) -> list[str]:
    return [_name(value.get_source_output().get_node()) for value in node.inputs()]


def _varying(nodes: Sequence[Any]) -> set[str]:
    """Return the nodes that depend on an input; all others are constants, which each piece has for itself."""
    varying: set[str] = set()
    for node in nodes:
        if node.get_type_name() == "Parameter" or not varying.isdisjoint(_sources(node)):
            varying.add(_name(node))
    return varying


def _handle_features(nodes: Sequence[Any], varying: AbstractSet[str]) -> set[str]:
    """Return the nodes that may compute in bfloat16."""
    convolutions, layers, passing = set(), set(), set()
    for node in nodes:
        name, kind = _name(node), node.get_type_name()
        sources = [source for source in _sources(node) if source in varying]
        if kind in _CONVOLUTIONS:
            convolutions.add(name)
        if kind in _CONVOLUTIONS or (kind == "MatMul" and len(sources) == 1):  # with learned weights
            layers.add(name)
        if kind in (*_PASSED, *_RESHAPED) or (kind == "Multiply" and layers.issuperset(sources)):
            passing.add(name)
    follow, lead = set(convolutions), set(convolutions)
    for node in nodes:
        if not follow.isdisjoint(_sources(node)):
            follow.add(_name(node))
    for node in reversed(nodes):
        if _name(node) in lead:
            lead.update(_sources(node))
    found = layers | (follow & lead)
    for node in reversed(nodes):
        if _name(node) in found:
            is_pooling = node.get_type_name() == "EmbeddingBagPackedSum"  # of its first input
            found.update(passing.intersection(_sources(node)[:1] if is_pooling else _sources(node)))
    return found & varying


def _places(nodes: Sequence[Any], features: AbstractSet[str]) -> dict[str, int]:
    """Return the number of each node's piece: odd ones handle features, and each needs only earlier ones."""
    places: dict[str, int] = {}
    for node in nodes:
        last = max((places[source] for source in _sources(node)), default=0)
        places[_name(node)] = last + (last % 2 != (_name(node) in features))
    return places


def _piece(model: Any, places: Mapping[str, int], varying: AbstractSet[str], here: int) -> Part:
    """Return the nodes of `model`, which is changed, whose piece is `here`."""
    from openvino import Model, op

    def is_here(node: Any) -> bool:
        return places[_name(node)] == here

    parameters = {
        parameter.output(0).get_any_name(): parameter
        for parameter in model.get_parameters()
        if any(is_here(use.get_node()) for use in parameter.output(0).get_target_inputs())
    }
    results = {
        result.input(0).get_source_output().get_any_name(): result
        for result in model.get_results()
        if is_here(result)
    }
    for node, output in _outputs(model, varying):
        across = [use for use in output.get_target_inputs() if is_here(use.get_node()) is not is_here(node)]
        key = f"{_name(node)}:{output.get_index()}"
        if across and is_here(node):
            results[key] = op.Result(output)
        elif across:
            parameters[key] = op.Parameter(output.get_element_type(), output.get_partial_shape())
            for use in across:
                use.replace_source_output(parameters[key].output(0))
    piece = Model(list(results.values()), list(parameters.values()), "")
    return Part(piece, tuple(parameters), tuple(results), in_bfloat16=here % 2 == 1)


def _outputs(model: Any, varying: AbstractSet[str]) -> Iterator[tuple[Any, Any]]:
    """Yield each node but inputs that varies, with each of its outputs."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Parameter" and _name(node) in varying:
            yield from ((node, output) for output in node.outputs())
