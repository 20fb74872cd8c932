"""The ONNX files: standard operations, static shapes, half the bytes, nothing about the machine."""

from __future__ import annotations

import getpass
import platform
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from darcnn.export.graph import _to_onnx, freeze_network
from darcnn.export.operations import OPSET, QUANTISED_OPS, STANDARD_OPS, check_graph
from darcnn.runtime.errors import InputError
from darcnn.runtime.load import find_bundle, shipped_models
from darcnn.training.model.backbone import to_three_channels

GRAPHS = ["detect", "mask"]
FORBIDDEN = {
    "If",
    "Loop",
    "NonMaxSuppression",
    "NonZero",
    "RoiAlign",
    "Scan",
    "ScatterElements",
    "ScatterND",
    "Shape",
}


@pytest.fixture(scope="session")
def models(bundle):
    return {name: onnx.load_model_from_string(bundle.read(f"{name}.onnx")) for name in GRAPHS}


@pytest.mark.parametrize("graph", GRAPHS)
def test_only_standard_operations_are_used(models, graph):
    model = models[graph]
    used = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert {domain for domain, _ in used} == {""}
    assert {op for _, op in used} <= STANDARD_OPS
    assert not {op for _, op in used} & FORBIDDEN
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert not model.functions
    assert not [a for node in model.graph.node for a in node.attribute if a.HasField("g")]


def test_the_allowed_operations_hold_nothing_that_needs_a_plugin_or_data_dependent_shapes():
    assert not STANDARD_OPS & FORBIDDEN


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", shipped_models())
def test_the_shipped_models_use_only_what_the_backends_run(name, graph):
    bundle = find_bundle(name)
    allowed = QUANTISED_OPS if bundle.precision == "int8" else STANDARD_OPS
    check_graph(bundle.read(f"{graph}.onnx"), allowed)


@pytest.mark.parametrize("graph", GRAPHS)
def test_tensors_are_those_of_the_manifest(models, bundle, graph):
    stated = bundle.manifest.graphs[graph]
    values = {
        value.name: value.type.tensor_type
        for value in (*models[graph].graph.input, *models[graph].graph.output)
    }
    assert list(values) == list(stated)
    for name, (kind, shape) in stated.items():
        assert onnx.helper.tensor_dtype_to_np_dtype(values[name].elem_type) == np.dtype(kind)
        assert tuple(dim.dim_value for dim in values[name].shape.dim) == shape


@pytest.mark.parametrize("graph", GRAPHS)
def test_nothing_tells_of_the_machine_it_was_made_on(bundle, models, graph):
    content = bundle.read(f"{graph}.onnx")
    words = ["site-packages", "stack_trace", ", line ", "/home/", "/tmp/", ".py:"]
    words += [
        name for name in (platform.node(), getpass.getuser()) if len(name) > 4
    ]  # shorter ones occur by chance
    assert not [word for word in words if word.encode() in content]
    model = models[graph]
    parts = (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output)
    assert not [part for part in parts if part.doc_string or part.metadata_props]
    assert not model.metadata_props
    assert not model.doc_string


def test_weights_are_stored_once_as_float16_and_all_else_is_computed_in_float32(models):
    graph = models["detect"].graph
    kinds = {constant.name: constant.data_type for constant in graph.initializer}
    casts = {node.input[0] for node in graph.node if node.op_type == "Cast" and node.input[0] in kinds}
    halves = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT16}
    assert halves
    assert halves == casts
    large = [c.name for c in graph.initializer if c.data_type == TensorProto.FLOAT and np.prod(c.dims) > 2000]
    assert sorted(large) == [f"anchors_{n}" for n in range(2)]  # at 128 px the others are small
    contents = Counter(numpy_helper.to_array(c).tobytes() for c in graph.initializer if np.prod(c.dims) > 1)
    same_bytes = [n for n in contents.values() if n > 1]
    assert len(same_bytes) <= 5  # small integers of different shapes
    assert all(constant.data_location != TensorProto.EXTERNAL for constant in graph.initializer)


def test_the_file_is_as_small_as_its_weights(bundle, network):
    branch = (network.trunk, network.shared_encoder, network.target_encoder, network.proposer)
    heads = (network.target_heads.box_head, network.target_heads.box_predictor)
    n_weights = sum(p.numel() for part in (*branch, *heads) for p in part.parameters())
    assert n_weights > 6_000_000
    assert len(bundle.read("detect.onnx")) < 2 * n_weights + 1_000_000


def test_folding_keeps_the_features_and_leaves_no_batch_normalisation(make_network):
    for preset in ("lite", "resnet50"):
        network = make_network(preset)
        frozen = freeze_network(network)
        assert not [
            m for part in frozen.target_branch() for m in part.modules() if "BatchNorm" in type(m).__name__
        ]
        image = torch.rand(1, 3, 64, 64) * 255
        with torch.no_grad():
            ours = network.target_encoder(network.trunk(image))
            theirs = frozen.target_encoder(frozen.trunk(image))
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() < 5e-3 * a.abs().max()  # float16 keeps 11 bits


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_become_the_same_three_in_a_graph(channels):
    class Inputs(torch.nn.Module):
        def forward(self, tile):
            return to_three_channels(tile.float().permute(0, 3, 1, 2))

    tile = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 9, channels), dtype=np.uint8))
    content = _to_onnx(Inputs().eval(), (torch.zeros_like(tile),), ("tile",), ("inputs",))
    check_graph(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (inputs,) = session.run(None, {"tile": tile.numpy()})
    np.testing.assert_array_equal(inputs, Inputs()(tile).numpy())


def test_freezing_a_frozen_network_changes_nothing(network):
    once = freeze_network(network)
    twice = freeze_network(once)
    for (name, a), b in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_freezing_leaves_the_network_itself_alone(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    freeze_network(network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_weight_that_float16_does_not_hold_is_refused(make_network, value):
    network = make_network()
    with torch.no_grad():
        network.target_heads.box_head.fc6.weight[3, 5] = value
    with pytest.raises(InputError, match=r"fc6\.weight"):
        freeze_network(network)


GOOD = """<ir_version: 9, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Relu (x) }"""


@pytest.mark.parametrize(
    "change",
    [
        ("Relu", "Sinh"),
        ("float[2]", "float[n]"),
        ('"" : 18', '"" : 16'),
        ("(float[2] y)", "(float[3] y)"),
    ],
)
def test_a_graph_outside_the_rules_is_refused(change):
    check_graph(onnx.parser.parse_model(GOOD).SerializeToString())
    with pytest.raises(RuntimeError, match="exporter"):
        check_graph(onnx.parser.parse_model(GOOD.replace(*change)).SerializeToString())
