"""The network as an engine of the runtime: training is judged on the path that ships."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.instances import Instances
from darcnn.runtime.manifest import manifest_from_json, manifest_to_json
from darcnn.runtime.readers import open_source
from darcnn.runtime.tiling import halo_for
from darcnn.training.config import Recipe
from darcnn.training.engine import TorchEngine, make_manifest, make_segmenter
from darcnn.training.model.backbone import to_three_channels
from darcnn.training.model.network import Darcnn

TILE_PX = 128


@pytest.fixture(scope="module")
def crop(data: Path) -> np.ndarray:
    """A real image, (128, 128) uint8."""
    with Image.open(data / "evaluate" / "images" / "u2os_212b858a66.png") as picture:
        return np.array(picture)


@given(st.floats(1.0, 500.0), st.sampled_from([16, 32, 64]))
def test_halo_is_the_least_that_holds_one_and_a_half_diameters_and_keeps_tiles_on_the_grid(
    diameter_px: float, stride_px: int
) -> None:
    halo_px = halo_for(diameter_px, stride_px)
    assert 2 * halo_px % stride_px == 0
    assert halo_px >= 1.5 * diameter_px
    assert halo_px - stride_px // 2 < 1.5 * diameter_px


def check_instances(found: Instances, shape: tuple[int, int]) -> None:
    assert found.shape == shape
    assert found.labels().shape == shape
    height, width = shape
    for box, (x, y), mask, ring in zip(found.boxes, found.origins, found.masks, found.outlines, strict=True):
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height
        assert mask.any()
        assert 0 <= x <= x + mask.shape[1] <= width
        assert 0 <= y <= y + mask.shape[0] <= height
        assert np.array_equal(ring[0], ring[-1])
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


def test_a_real_image_gives_instances(network: Darcnn, recipe: Recipe, crop: np.ndarray) -> None:
    with make_segmenter(network, recipe.target, min_score=0.0, tile_px=TILE_PX) as segmenter:
        found = segmenter(crop)
    assert isinstance(found, Instances)
    assert len(found) > 0  # heads that know nothing yet call half of everything an object
    check_instances(found, crop.shape)


def test_min_score_leaves_out_what_is_worse(network: Darcnn, recipe: Recipe, crop: np.ndarray) -> None:
    def find(min_score: float) -> Instances:
        with make_segmenter(network, recipe.target, min_score=min_score, tile_px=TILE_PX) as segmenter:
            return segmenter(crop)

    low, high = (float(one) for one in np.quantile(find(0.0).scores, (0.6, 0.8)))
    many, better = find(low), find(high)
    assert not many.is_saturated  # else the tile was looked at in quarters
    assert 0 < len(better) < len(many)
    assert len(better) == (many.scores >= high).sum()
    assert (better.scores >= high).all()


def test_a_file_gives_the_same_as_its_array(
    network: Darcnn, recipe: Recipe, crop: np.ndarray, data: Path
) -> None:
    path = data / "evaluate" / "images" / "u2os_212b858a66.png"
    with (
        make_segmenter(network, recipe.target, min_score=0.0, tile_px=TILE_PX) as segmenter,
        open_source(path) as reader,
    ):
        plan = segmenter.plan(reader.info, pixels=True)
        from_file, from_array = segmenter.segment(reader, plan), segmenter(crop)
    assert np.array_equal(from_file.labels(), from_array.labels())


def test_segmenting_twice_gives_the_same(network: Darcnn, recipe: Recipe, crop: np.ndarray) -> None:
    network.train()  # a network that comes from training
    with make_segmenter(network, recipe.target, min_score=0.0, tile_px=TILE_PX) as segmenter:
        assert np.array_equal(segmenter(crop).labels(), segmenter(crop).labels())
    assert not network.training


def test_engine_keeps_its_word(network: Darcnn, crop: np.ndarray) -> None:
    engine = TorchEngine(network, tile_px=TILE_PX, channels=1)
    assert isinstance(engine, Engine)
    tiles = np.stack([crop, crop[::-1]])[..., None]
    found = engine.detect(tiles)
    assert found.boxes.shape == (2, engine.spec.detections, 4)
    assert found.scores.shape == (2, engine.spec.detections)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.converged.all()
    assert (np.diff(found.scores, axis=1) <= 0).all()  # best first, empty slots last
    assert not found.boxes[found.scores == 0].any()
    alone = engine.detect(tiles[1:])
    np.testing.assert_allclose(alone.scores[0], found.scores[1], atol=1e-4)
    engine.close()
    engine.close()


def test_masks_belong_to_the_boxes_and_tiles_they_are_asked_for(network: Darcnn, crop: np.ndarray) -> None:
    engine = TorchEngine(network, tile_px=TILE_PX, channels=1)
    found = engine.detect(np.stack([crop, crop[::-1]])[..., None])
    boxes, tile_index = found.boxes[[0, 1, 0], [0, 0, 1]], np.array([0, 1, 0])
    together = engine.masks(found, boxes, tile_index)
    assert together.shape == (3, engine.spec.mask_px, engine.spec.mask_px)
    assert ((together >= 0) & (together <= 1)).all()
    for row in range(3):
        alone = engine.masks(found, boxes[row : row + 1], tile_index[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)
    assert engine.masks(found, boxes[:0], tile_index[:0]).shape == (0, 28, 28)


def test_one_channel_is_seen_like_grey_in_three(network: Darcnn, crop: np.ndarray) -> None:
    grey = TorchEngine(network, tile_px=TILE_PX, channels=1).detect(crop[None, ..., None])
    colour = TorchEngine(network, tile_px=TILE_PX, channels=3).detect(crop[None, ..., None].repeat(3, axis=3))
    np.testing.assert_allclose(grey.scores, colour.scores, atol=1e-3)
    for level, other in zip(grey.atlas, colour.atlas, strict=True):
        torch.testing.assert_close(level, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("channels", [2, 4])
def test_separate_channels_are_seen_as_their_mixtures(
    network: Darcnn, crop: np.ndarray, channels: int
) -> None:
    tile = np.stack([np.rot90(crop, k) for k in range(channels)], axis=2)[None] // 4 * 4  # exact mixtures
    inputs = to_three_channels(torch.from_numpy(tile.copy()).permute(0, 3, 1, 2).float())
    mixed = inputs.byte().permute(0, 2, 3, 1).numpy()
    found = TorchEngine(network, tile_px=TILE_PX, channels=channels).detect(tile)
    expected = TorchEngine(network, tile_px=TILE_PX, channels=3).detect(mixed)
    assert found.scores.max() > 0
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.boxes, expected.boxes)


@pytest.mark.parametrize("channels", [2, 4])
def test_an_array_of_separate_channels_is_segmented(
    network: Darcnn, recipe: Recipe, crop: np.ndarray, channels: int
) -> None:
    target = replace(recipe.target, channels=channels)
    image = np.stack([np.rot90(crop, k) for k in range(channels)], axis=2)
    with make_segmenter(network, target, min_score=0.0, tile_px=TILE_PX) as segmenter:
        check_instances(segmenter(image), crop.shape)


def test_a_network_of_the_source_stage_runs_the_branch_that_was_trained(
    network: Darcnn, crop: np.ndarray
) -> None:
    tiles = crop[None, ..., None]
    spoiled = copy.deepcopy(network)
    with torch.no_grad():
        for part in (spoiled.target_encoder, spoiled.target_heads):
            for parameter in part.parameters():
                parameter.zero_()
    expected = TorchEngine(network, tile_px=TILE_PX, channels=1, source_branch=True).detect(tiles)
    found = TorchEngine(spoiled, tile_px=TILE_PX, channels=1, source_branch=True).detect(tiles)
    assert np.array_equal(found.boxes, expected.boxes)
    other = TorchEngine(spoiled, tile_px=TILE_PX, channels=1).detect(tiles)
    assert not np.array_equal(other.scores, expected.scores)


def test_manifest_says_what_the_network_and_the_recipe_are(network: Darcnn, recipe: Recipe) -> None:
    manifest = make_manifest(network.eval(), recipe.target, name="tiny", tile_px=256, min_score=0.3)
    assert manifest.input.nominal_diameter_px == recipe.target.nominal_diameter_px
    assert manifest.input.intensity == recipe.target.intensity
    assert manifest.input.halo_px == halo_for(20.0, 32) == 32
    assert manifest.input.stride_px == 32
    assert manifest.limits.min_score == 0.3
    assert len(manifest.anchors.sizes_px) == len(manifest.anchors.strides_px)
    assert manifest_from_json(manifest_to_json(manifest)) == manifest
