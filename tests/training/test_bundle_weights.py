"""A finished model as a start: what its bundle finds, the network finds again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import darcnn.runtime as darcnn
from darcnn.runtime.bundle import MEMBER_CAPS, Bundle, write_bundle
from darcnn.runtime.errors import BundleError, InputError, UsageError
from darcnn.runtime.load import find_bundle
from darcnn.runtime.segmenter import Segmenter
from darcnn.training.checkpoint import load_network
from darcnn.training.config import AdaptStage, Recipe, SourceStage, recipe_from_table, recipe_to_table
from darcnn.training.engine import TorchEngine
from darcnn.training.model.bundle_weights import bundle_named, load_bundle, preset_of
from darcnn.training.model.network import Darcnn
from darcnn.training.model.photographs import load_photographs
from darcnn.training.model.pretrained import licence_of, load_weights, start_of
from darcnn.training.open_model import open_model
from darcnn.training.run import Run
from darcnn.training.stages import run_adapt, run_source

MODEL = "nuclei-fluorescence"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return find_bundle(MODEL)


@pytest.fixture(scope="module")
def loaded(bundle: Bundle) -> Darcnn:
    """The network as a recipe that starts from the model has it."""
    network = Darcnn.from_name("lite", MODEL)
    load_weights(network, MODEL, Path())
    return network.eval()


@pytest.fixture
def write_changed(bundle: Bundle, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the model's bundle with another manifest or other members."""

    def write(members: dict[str, bytes] | None = None, **manifest: object) -> Path:
        path = tmp_path / "changed.darcnn"
        content = {name: bundle.read(name) for name in MEMBER_CAPS if name != "manifest.json"}
        write_bundle(path, replace(bundle.manifest, **manifest), content | (members or {}))
        return path

    return write


def test_the_network_finds_what_its_bundle_finds(loaded: Darcnn, bundle: Bundle, data: Path) -> None:
    pixels = np.asarray(Image.open(data / "target" / "u2os_2abc40c118.png"))
    engine = TorchEngine(loaded, tile_px=bundle.manifest.input.tile_px, channels=1)
    ours = Segmenter(engine, bundle.manifest)(pixels, diameter_px=25.0)
    with darcnn.load(MODEL) as segmenter:
        theirs = segmenter(pixels, diameter_px=25.0)
    assert len(ours) == len(theirs) > 2
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.02)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-3)


def test_convolutions_are_as_large_as_those_of_the_photographs(loaded: Darcnn) -> None:
    start = Darcnn.from_name("lite")
    load_photographs(start)
    for name, tensor in start.trunk.state_dict().items():  # frozen ever since: the same up to half precision
        torch.testing.assert_close(loaded.trunk.state_dict()[name], tensor, rtol=4e-3, atol=4e-3)
    for name, tensor in start.target_encoder.named_parameters():
        trained = loaded.target_encoder.get_parameter(name)
        assert 0.5 < float(trained.norm() / tensor.norm()) < 2.0, name


def test_the_source_branch_starts_as_a_copy_of_the_target_branch(loaded: Darcnn) -> None:
    pairs = [
        (loaded.source_encoder, loaded.target_encoder),
        (loaded.source_heads, loaded.target_heads),
    ]
    for source, target in pairs:
        for name, tensor in source.state_dict().items():
            assert torch.equal(tensor, target.state_dict()[name])
    assert not torch.equal(
        loaded.shared_encoder.pyramid.layer_blocks[0][0].weight,
        loaded.target_encoder.pyramid.layer_blocks[0][0].weight,
    )


def test_weights_in_int8_come_back_as_they_were_rounded() -> None:
    network = Darcnn.from_name("lite")
    load_bundle(network, find_bundle("particles-cryoet"))
    weight = network.target_encoder.stages[0][0][0].conv_pw.weight.detach()
    for channel in weight.flatten(1)[weight.flatten(1).any(1)]:
        step = channel.abs().max() / 127
        torch.testing.assert_close(channel / step, (channel / step).round(), rtol=0, atol=0.01)


def test_stages_keep_what_the_model_knew_until_they_learn(
    recipe: Recipe, loaded: Darcnn, data: Path, tmp_path: Path
) -> None:
    bare = replace(
        recipe,
        weights=MODEL,
        source=None,
        source_stage=SourceStage(),
        adapt_stage=AdaptStage(),
    )
    run = Run(bare, data, tmp_path)
    run_source(run)
    network = run_adapt(run, tmp_path / "source")
    for name, tensor in loaded.state_dict().items():
        if not name.startswith("projection"):
            assert torch.equal(network.state_dict()[name], tensor), name
    again, _ = load_network(tmp_path / "adapt")
    assert torch.equal(
        again.target_heads.box_head.fc6.weight,
        loaded.target_heads.box_head.fc6.weight,
    )
    assert (tmp_path / "source" / "start.txt").read_text() == start_of("lite", MODEL, data)


def test_the_start_is_known_by_its_content(write_changed: Callable[..., Path]) -> None:
    path = write_changed()
    first = start_of("lite", path.name, path.parent)
    assert find_bundle(path).sha256 in first
    write_changed({"LICENSE": b"another"})
    assert start_of("lite", path.name, path.parent) != first
    assert find_bundle(path).sha256 == bundle_named(path.name, path.parent).sha256


def test_the_terms_of_a_start_are_told() -> None:
    assert "BBBC038" in (licence_of("lite", MODEL, Path()) or "")
    assert "COCO" in (licence_of("lite", "coco", Path()) or "")
    assert licence_of("lite", "imagenet", Path()) is None


def test_without_onnx_the_extra_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"pip install 'darcnn\[export\]'"):
        load_bundle(Darcnn.from_name("lite"), bundle)


def test_a_bundle_of_another_preset_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="is of preset lite"):
        load_bundle(Darcnn.from_name("resnet50"), bundle)


def test_layers_as_detectron2_has_them_are_another_preset(write_changed: Callable[..., Path]) -> None:
    record = b'{"recipe": {"weights": "model.pkl"}}'
    path = write_changed({"training.json": record}, preset="resnet50")
    assert preset_of(find_bundle(path)).has_stride_in_1x1
    with pytest.raises(UsageError, match="other layers"):
        load_bundle(Darcnn.from_name("resnet50"), find_bundle(path))


@pytest.mark.parametrize("record", [b"[]", b"{", b"\xff"])
def test_a_broken_record_is_an_error(write_changed: Callable[..., Path], record: bytes) -> None:
    with pytest.raises(BundleError, match=r"training\.json"):
        preset_of(find_bundle(write_changed({"training.json": record})))


def test_graphs_without_the_weights_are_refused(write_changed: Callable[..., Path], bundle: Bundle) -> None:
    graph = onnx.load_from_string(bundle.read("mask.onnx"))
    kept = [one for one in graph.graph.initializer if not one.name.startswith("mask_predictor.conv5")]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    path = write_changed({"mask.onnx": graph.SerializeToString()})
    with pytest.raises(InputError, match=r"do not hold target_heads\.mask_predictor\.conv5_mask"):
        load_bundle(Darcnn.from_name("lite"), find_bundle(path))
    path = write_changed({"mask.onnx": b"\xff" * 64})
    with pytest.raises(InputError, match=r"mask\.onnx is no ONNX graph"):
        load_bundle(Darcnn.from_name("lite"), find_bundle(path))


@pytest.mark.parametrize("weights", [MODEL, "mine.darcnn"])
def test_a_recipe_may_start_from_a_model_but_not_train_it_on_photographs(
    recipe: Recipe, weights: str
) -> None:
    table = recipe_to_table(replace(recipe, weights=weights, source_stage=SourceStage()))
    assert recipe_from_table(table, where="x").weights == weights
    table = recipe_to_table(replace(recipe, weights=weights))
    with pytest.raises(UsageError, match="has been through all stages"):
        recipe_from_table(table, where="x")


def test_a_model_that_does_not_exist_is_named(recipe: Recipe, tmp_path: Path) -> None:
    table = recipe_to_table(replace(recipe, weights="nuclei", source_stage=SourceStage()))
    with pytest.raises(UsageError, match="is unknown; use imagenet, coco, nuclei-fluorescence"):
        recipe_from_table(table, where="x")
    with pytest.raises(BundleError, match=r"nowhere\.darcnn: no such file"):
        load_weights(Darcnn.from_name("lite"), "nowhere.darcnn", tmp_path)


def test_a_start_that_nothing_was_taught_is_judged_by_its_target_branch(
    recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    bare = replace(recipe, weights=MODEL, source=None, source_stage=SourceStage(), adapt_stage=AdaptStage())
    run_source(Run(bare, data, tmp_path))
    with open_model(str(tmp_path / "source")) as segmenter:
        engine = segmenter.engine
        assert isinstance(engine, TorchEngine)
        assert engine._heads is engine._network.target_heads
        assert not engine._source_branch
