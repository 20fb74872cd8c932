"""Half precision: which part of a graph becomes float16, and what that does to its findings."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from darcnn.export.graph import _to_onnx
from darcnn.export.half import derive_half, to_half
from darcnn.export.parity import LIMITS, verify_bundle
from darcnn.export.static import greedy_keep
from darcnn.export.tiles import TileSource, read_tiles
from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine
from darcnn.runtime.engines.tensorrt_build import BuildOptions, build_plans

GRAPHS = ["detect", "mask"]
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
# What makes boxes of deltas and decides between them.
BOX_ARITHMETIC = {"Div", "Mul", "Sub", "Exp", "Min", "Max", "Sqrt", "TopK", "Sigmoid", "Softmax", "Where"}


@pytest.fixture(scope="session")
def half(bundle):
    return derive_half(bundle)


def kinds(content):
    """Return the nodes of the graph in `content`, and the type of each of its tensors."""
    model = onnx.load_model_from_string(content)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return list(graph.node), known | {c.name: c.data_type for c in graph.initializer}


@pytest.mark.parametrize("graph", GRAPHS)
def test_layers_are_float16_and_what_decides_on_boxes_and_scores_is_float32(half, graph):
    nodes, kind = kinds(half.read(f"{graph}.onnx"))
    by_op = {(node.op_type, kind[node.output[0]]) for node in nodes}
    assert {op for op, kind in by_op if kind == FLOAT}.isdisjoint(
        {"Conv", "ConvTranspose", "Gemm", "MaxPool"}
    )
    assert {op for op, kind in by_op if kind == HALF}.isdisjoint(BOX_ARITHMETIC)
    read_as_float = Counter(n.op_type for n in nodes for name in n.input if kind.get(name) == FLOAT)
    assert read_as_float["Sigmoid"] == 1


@pytest.mark.parametrize("graph", GRAPHS)
def test_products_are_float16_for_turing_compiles_no_others(half, graph):
    nodes, kind = kinds(half.read(f"{graph}.onnx"))
    products = Counter(kind[node.output[0]] for node in nodes if node.op_type == "MatMul")
    assert products == {HALF: {"detect": 33, "mask": 1}[graph]}  # 16 rounds of two suppressions; pooling


def test_suppression_that_counts_in_float16_is_that_in_float32():
    class Suppression(torch.nn.Module):
        def forward(self, boxes, valid):
            return greedy_keep(boxes, valid, threshold=0.5)

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 1000, 2, generator=generator) * 20  # hundreds of overlaps each
    boxes = torch.cat([corners, corners + 8 + 9 * torch.rand(2, 1000, 2, generator=generator)], dim=2)
    feeds = {"boxes": boxes.numpy(), "valid": np.ones((2, 1000), np.float32)}
    content = _to_onnx(
        Suppression(), tuple(torch.from_numpy(a) for a in feeds.values()), tuple(feeds), ("keep", "converged")
    )
    half = to_half(content)
    assert {kind for name, kind in kinds(half)[1].items() if name.startswith("matmul")} == {HALF, FLOAT}
    keep, keep_half = (
        onnxruntime.InferenceSession(c, providers=["CPUExecutionProvider"]).run(["keep"], feeds)[0]
        for c in (content, half)
    )
    np.testing.assert_array_equal(keep, keep_half)
    assert 10 < keep.sum() < 600


def test_deltas_are_capped_in_float32_and_activations_in_float16(half):
    nodes, kind = kinds(half.read("detect.onnx"))
    made_by = {name: node.op_type for node in nodes for name in node.output}
    clips = Counter((made_by[n.input[0]], kind[n.output[0]]) for n in nodes if n.op_type == "Clip")
    assert {source for source, kind in clips if kind == HALF} == {"Conv"}
    assert sum(n for (_, kind), n in clips.items() if kind == FLOAT) >= 10  # 2 of each level and of the heads


@pytest.mark.parametrize("graph", GRAPHS)
def test_inputs_and_outputs_keep_their_names_and_types(bundle, half, graph):
    ours, theirs = (onnx.load_model_from_string(one.read(f"{graph}.onnx")).graph for one in (bundle, half))
    assert list(ours.input) == list(theirs.input)
    assert list(ours.output) == list(theirs.output)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_weight_is_stored_once_and_in_float16(bundle, half, graph):
    constants = onnx.load_model_from_string(half.read(f"{graph}.onnx")).graph.initializer
    weights = [c for c in constants if c.name.endswith(("weight.half", "bias.fp16"))]
    assert {c.data_type for c in weights} == {HALF}
    assert len({c.name for c in constants}) == len(constants)
    assert len(half.read(f"{graph}.onnx")) < 1.01 * len(bundle.read(f"{graph}.onnx"))
    assert all(np.isfinite(numpy_helper.to_array(c)).all() for c in weights)


def test_a_half_bundle_is_that_of_the_same_file(bundle, half):
    assert (bundle.precision, half.precision) == ("fp32", "fp16")
    assert (half.path, half.sha256, half.manifest.input) == (
        bundle.path,
        bundle.sha256,
        bundle.manifest.input,
    )
    assert half.read("training.json") == bundle.read("training.json")
    assert bundle.read("detect.onnx") != half.read("detect.onnx")


def test_the_atlas_really_went_through_float16(half, real_tile):
    with closing(OnnxRuntimeEngine(half, device="cpu")) as engine:
        atlas = engine.detect(np.stack([real_tile, real_tile])).atlas
    np.testing.assert_array_equal(atlas, atlas.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_half_precision_finds_what_pytorch_finds_in_float32(half, network, real_tile, pictures, backend):
    if backend == "openvino":
        pytest.importorskip("openvino", reason="pip install 'darcnn[openvino]'")
    tiles = read_tiles([TileSource(path) for path in sorted(pictures.iterdir())], half, limit=2)
    parity = verify_bundle(half, network, {"slide": real_tile, **tiles}, backend=backend)
    assert parity.n_objects >= 100
    assert parity.agrees, parity.complaints
    assert max(tile.features for tile in parity.tiles) > 1e-4  # float32 differs by 1e-6: layers were rounded


def test_no_limit_of_half_precision_is_below_that_of_float32():
    assert LIMITS["fp16"].keys() == LIMITS["fp32"].keys()
    assert all(LIMITS["fp16"][name] >= limit for name, limit in LIMITS["fp32"].items())


SMALL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y, float[1, 2, 4, 4] z)
<float[2, 2, 1, 1] w = {1.0, 0.5, 0.25, 2.0}> {
    a = Conv (x, w)
    y = Relu (a)
    b = Add (y, x)
    z = Sigmoid (b)
}"""


def test_a_small_graph_becomes_what_one_would_write_by_hand():
    content = to_half(onnx.parser.parse_model(SMALL).SerializeToString())
    nodes, kind = kinds(content)
    ops = [(node.op_type, kind[node.output[0]]) for node in nodes]
    assert ops == [
        ("Cast", HALF),
        ("Conv", HALF),
        ("Relu", HALF),
        ("Cast", FLOAT),
        ("Add", FLOAT),  # one side comes from outside
        ("Sigmoid", FLOAT),
        ("Cast", FLOAT),
    ]
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4), np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    y, z = session.run(["y", "z"], {"x": x})
    weights = np.array([[1.0, 0.5], [0.25, 2.0]])
    expected = np.maximum(np.einsum("oi,bihw->bohw", weights, x), 0)
    np.testing.assert_allclose(y, expected, atol=4e-3)
    np.testing.assert_allclose(z, 1 / (1 + np.exp(-expected - x)), atol=2e-3)


def test_half_precision_compiles_without_a_gpu(half):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'darcnn[tensorrt-rtx]'")
    plans, _ = build_plans(half, BuildOptions("tensorrt-rtx", ("sm86", "sm89")))
    assert min(len(plan) for plan in plans.values()) > 100_000
