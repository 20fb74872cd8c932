"""int8: what of a graph is quantised, what that file is, and that it finds much the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from darcnn.export import cli
from darcnn.export.half import derive_half
from darcnn.export.operations import OPSET, QUANTISED_OPS
from darcnn.export.parity import compare_objects, find_with_engine
from darcnn.export.quantise import quantise
from darcnn.export.tiles import images_in, read_tiles
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.engines.engine_cache import read_engine
from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine
from darcnn.runtime.engines.tensorrt_build import BuildOptions, build_engine
from darcnn.runtime.errors import UsageError
from darcnn.runtime.load import find_bundle

pytestmark = pytest.mark.slow

TISSUE = Path(__file__).resolve().parent.parent / "data" / "tissue"  # three pictures
OPTIONS = ("--tiles", 2, "--diameter", 19)


def call(*arguments):
    with pytest.raises(SystemExit) as done:
        cli.main([str(argument) for argument in arguments])
    return done.value.code


@pytest.fixture(scope="module")
def shipped():
    return find_bundle("nuclei-he")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """What `darcnn-export quantise` wrote of a trained model; an untrained one would not survive it."""
    out = tmp_path_factory.mktemp("int8") / "small.darcnn"
    assert call("quantise", "nuclei-he", "--data", TISSUE, *OPTIONS, "--out", out) == 0
    return open_bundle(out)


@pytest.fixture(scope="module")
def tile(shipped):
    """The picture between the two that were calibrated on."""
    (tile,) = read_tiles(images_in(TISSUE, 19.0), shipped, limit=1).values()
    return tile


@pytest.fixture(scope="module")
def nodes(quantised):
    return onnx.load_model_from_string(quantised.read("detect.onnx")).graph.node


def test_the_file_is_a_bundle_in_int8_and_smaller(shipped, quantised):
    assert (quantised.manifest.name, quantised.precision) == ("small", "int8")
    assert quantised.manifest.input == shipped.manifest.input
    assert len(quantised.read("detect.onnx")) < 0.7 * len(shipped.read("detect.onnx"))
    assert quantised.read("mask.onnx") == shipped.read("mask.onnx")
    training = json.loads(quantised.read("training.json"))
    assert training["calibration_tiles"] == 2
    assert "figures" not in training  # they are those of the bundle in float32
    assert training["float32_figures"] == json.loads(shipped.read("training.json"))["figures"]


def test_only_standard_operations_and_q_dq_are_used(quantised):
    model = onnx.load_model_from_string(quantised.read("detect.onnx"))
    assert {node.op_type for node in model.graph.node} <= QUANTISED_OPS
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert "DequantizeLinear" not in {
        n.op_type for n in onnx.load_model_from_string(quantised.read("mask.onnx")).graph.node
    }


def test_encoders_are_int8_and_heads_are_not(quantised, nodes):
    kinds = {
        c.name: c.data_type
        for c in onnx.load_model_from_string(quantised.read("detect.onnx")).graph.initializer
    }
    weight_of = {n.output[0]: n.input[0] for n in nodes if n.op_type in ("DequantizeLinear", "Cast")}
    found = Counter(
        (n.input[1].split(".weight")[0].split(".")[1], kinds[weight_of.get(n.input[1], n.input[1])])
        for n in nodes
        if n.op_type in ("Conv", "Gemm")
    )
    parts = {part: {kind for other, kind in found if other == part} for part, _ in found}
    assert {part for part, kind in parts.items() if kind == {TensorProto.INT8}} == {
        "trunk",
        "shared_encoder",
        "target_encoder",
    }
    assert TensorProto.INT8 not in parts["proposer"] | parts["target_heads"]
    assert sum(n for (_, kind), n in found.items() if kind == TensorProto.INT8) == 103


def test_int8_finds_much_the_same(shipped, quantised, tile):
    found = []
    for one in (shipped, quantised):
        with closing(OnnxRuntimeEngine(one, device="cpu")) as engine:
            found += [objects for _, objects in find_with_engine(engine, {"slide": tile}, 0.5)]
    parity = compare_objects("slide", *found)
    assert parity.n_reference >= 20
    assert parity.n_matched > 0.6 * parity.n_reference
    assert 1e-3 < parity.features < 0.5


def test_without_offsets_tensorrt_rtx_compiles_it(shipped, quantised, tile, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'darcnn[tensorrt-rtx]'")
    signed = quantise(shipped, [tile], has_offsets=False)
    build_engine(signed, BuildOptions("tensorrt-rtx", ("sm86", "sm89")), out=tmp_path / "engine")
    assert read_engine(tmp_path / "engine", signed).facts.precision == "int8"
    with pytest.raises(UsageError, match="does not compile"):
        build_engine(quantised, BuildOptions("tensorrt-rtx", ("sm86",)), out=tmp_path / "other")


def test_the_command_says_how_far_apart_they_are_and_that_images_are_few(tmp_path, capsys):
    out = tmp_path / "few.darcnn"
    assert call("quantise", "nuclei-he", "--data", TISSUE, "--diameter", 19, "--tiles", 4, "--out", out) == 0
    captured = capsys.readouterr()
    assert "calibrating on 3 tiles of the 4 asked for: give more images" in captured.err
    share = int(re.search(r"on these tiles, (\d+)% of its objects", captured.out)[1])
    assert 2 < share < 40


def test_tiles_without_an_object_calibrate_nothing(tmp_path, capsys):
    black = tmp_path / "black"
    black.mkdir()
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(black / "a.png")
    assert call("quantise", "nuclei-he", "--data", black, "--out", tmp_path / "a.darcnn") == 2
    assert "no object on any of the images" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a.darcnn").exists()


def test_what_is_int8_already_is_refused_in_one_line(quantised, checkpoint, tmp_path, pictures, capsys):
    for change in (
        lambda: quantise(quantised, [np.zeros((128, 128, 3), np.uint8)]),
        lambda: derive_half(quantised),
    ):
        with pytest.raises(UsageError, match="in int8 already"):
            change()
    for arguments in (
        ("verify", quantised.path, "--checkpoint", checkpoint),
        ("quantise", quantised.path, "--data", pictures, "--out", quantised.path),
        ("engine", quantised.path, "--precision", "fp16", "--out", tmp_path / "engine"),
    ):
        assert call(*arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_tile_is_an_error(shipped):
    with pytest.raises(UsageError, match="--data"):
        quantise(shipped, [])
