"""Weights that lie in another file are found wherever a graph may have tensors, however they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.onnx_fields import _WAYS, keeps_weights_elsewhere, read_fields

onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx")

NAMES = {
    **{"model": "ModelProto", "training": "TrainingInfoProto", "function": "FunctionProto"},
    **{"graph": "GraphProto", "node": "NodeProto", "attribute": "AttributeProto"},
    **{"sparse tensor": "SparseTensorProto", "tensor": "TensorProto"},
}


def test_the_ways_are_all_that_lead_to_tensors():
    kinds = {name: kind for kind, name in NAMES.items()}
    for kind, name in NAMES.items():
        fields = getattr(onnx, name).DESCRIPTOR.fields
        parts = {field.number: kinds.get(field.message_type.name) for field in fields if field.message_type}
        assert _WAYS[kind] == {number: part for number, part in parts.items() if part is not None}
    others = {"TypeProto", "ValueInfoProto"}  # hold no tensor, whatever they hold
    for name in others:
        fields = getattr(onnx, name).DESCRIPTOR.fields
        assert not {field.message_type.name for field in fields if field.message_type} & set(kinds)


def tensor():
    weights = onnx.TensorProto(name="w", dims=[2], data_type=onnx.TensorProto.FLOAT)
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="weights.bin")
    return weights


def in_graph(place):
    """Return a model that keeps a tensor elsewhere, at `place` of a graph inside a node of another."""
    inner = onnx.GraphProto()
    if place == "constant":
        inner.node.add(op_type="Constant").attribute.add(name="value").t.CopyFrom(tensor())
    elif place == "list":
        inner.node.add(op_type="Any").attribute.add(name="values").tensors.append(tensor())
    elif place == "sparse":
        inner.sparse_initializer.add().values.CopyFrom(tensor())
    else:
        inner.initializer.append(tensor())
    model = onnx.ModelProto()
    branch = onnx.AttributeProto(name="then_branch", g=inner)
    (model.functions.add() if place == "function" else model.graph).node.add().attribute.append(branch)
    return model.SerializeToString()


@pytest.mark.parametrize("place", ["initializer", "constant", "list", "sparse", "function"])
def test_weights_elsewhere_are_found(place):
    content = in_graph(place)
    assert keeps_weights_elsewhere(content)
    pair, swapped = b"\n\x08location\x12\x0bweights.bin", b"\x12\x0bweights.bin\n\x08location"
    assert content.count(pair) == 1
    assert keeps_weights_elsewhere(content.replace(pair, swapped))  # the same to every parser


def test_the_word_alone_means_nothing():
    model = onnx.ModelProto()
    model.graph.initializer.add(name="location", raw_data=b"location")
    assert not keeps_weights_elsewhere(model.SerializeToString())


@pytest.mark.parametrize(
    "tag",
    [
        b"\xbb\x01",  # the beginning of a group, number 23
        b"\xba\x80\x80\x80\x10",  # number 7 to a parser that takes 32 bits of it, 2^29 + 7 else
    ],
)
def test_what_parsers_may_read_in_another_way_is_no_graph(tag):
    graph = in_graph("initializer")[1:]  # without its tag
    with pytest.raises(ValueError, match="it has a field"):
        keeps_weights_elsewhere(tag + graph)


@given(content=st.binary(max_size=60))
def test_fields_end_or_are_refused(content):
    try:
        sizes = [len(value) for _, value in read_fields(memoryview(content)) if isinstance(value, memoryview)]
    except ValueError:
        return
    assert sum(sizes) < max(len(content), 1)
