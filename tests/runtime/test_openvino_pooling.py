"""Weighted sums of gathered rows as one operation of OpenVINO: the same figures, nothing else touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.engines.openvino_pooling import fuse_pooling
from darcnn.runtime.load import find_bundle

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'darcnn[openvino]'")
opset = pytest.importorskip("openvino.opset8")
BAG = "EmbeddingBagPackedSum"


def pooling(cells, rows, channels, *, axis=0, transposed=False, height=50, weighted=1):
    """Return a graph that adds `rows` rows of a table, each with its weight, for each of `cells`."""
    table = opset.parameter([height, channels], np.float32, name="table")
    index = opset.parameter([cells * rows], np.int64, name="index")
    weight = opset.parameter([cells, weighted, rows], np.float32, name="weight")
    taken = opset.gather(table, index, opset.constant(np.int64(axis)))
    shape = [cells, channels, rows] if transposed else [cells, rows, channels]
    gathered = opset.reshape(taken, np.array(shape), special_zero=False)
    product = opset.matmul(weight, gathered, transpose_a=False, transpose_b=transposed)
    return openvino.Model([opset.relu(product)], [table, index, weight])


def types(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


def run(model, *feeds):
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled(list(feeds))[0])


@given(st.integers(1, 7), st.integers(1, 20), st.integers(1, 70), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_sum_of_rows_is_the_product_it_replaces(cells, rows, channels, seed):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((50, channels), np.float32)
    index = rng.integers(0, 50, cells * rows)
    weight = rng.standard_normal((cells, 1, rows), np.float32)
    model = pooling(cells, rows, channels)
    assert fuse_pooling(model) == 1
    assert BAG in types(model)
    assert not {"MatMul", "Gather"} & set(types(model))
    sums = np.einsum("nik,nkc->nic", weight, table[index].reshape(cells, rows, channels))
    np.testing.assert_allclose(run(model, table, index, weight), np.maximum(sums, 0), atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"axis": 1, "height": 6},  # columns are gathered, not rows
        {"transposed": True},
        {"weighted": 2},  # two sums of the same rows
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_product_stays_as_it_is(other):
    model = pooling(2, 3, 6, **other)
    before = types(model)
    assert fuse_pooling(model) == 0
    assert types(model) == before


@pytest.mark.parametrize("name", ["nuclei-fluorescence", "nuclei-he", "particles-cryoet"])
@pytest.mark.parametrize("graph", ["detect", "mask"])
def test_both_graphs_of_every_shipped_model_pool_once(name, graph):
    model = openvino.Core().read_model(find_bundle(name).read(f"{graph}.onnx"))
    assert fuse_pooling(model) == 1
    assert types(model).count(BAG) == 1
    assert fuse_pooling(model) == 0
