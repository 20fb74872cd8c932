"""Scenes: many objects on one background, each pixel of at most one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.training.data.scenes import make_scene
from darcnn.training.data.source import Cutout, PhotographSource

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
MIN_AREA_PX = 30


@pytest.fixture(scope="module")
def cutouts(photographs: PhotographSource) -> list[Cutout]:
    found = photographs.cutouts()
    assert len(found) > 5
    return found


@FAST
@given(seeds, st.sampled_from([64, 128]))
def test_masks_of_a_scene_are_disjoint(cutouts: list[Cutout], seed: int, tile_px: int) -> None:
    scene = make_scene(cutouts, np.random.default_rng(seed), tile_px, (8.0, 40.0))
    assert scene.image.shape == (tile_px, tile_px, 3)
    assert scene.image.dtype == np.uint8
    assert scene.masks.shape[1:] == (tile_px, tile_px)
    assert scene.masks.sum(axis=0).max(initial=0) <= 1


@FAST
@given(seeds)
def test_no_object_of_a_scene_is_too_small_to_outline(cutouts: list[Cutout], seed: int) -> None:
    scene = make_scene(cutouts, np.random.default_rng(seed), 128, (8.0, 40.0))
    assert (scene.masks.sum(axis=(1, 2)) >= MIN_AREA_PX).all()


@FAST
@given(seeds)
def test_a_scene_is_a_function_of_its_generator(cutouts: list[Cutout], seed: int) -> None:
    first, again = (make_scene(cutouts, np.random.default_rng(seed), 64, (10.0, 30.0)) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)


def test_scenes_are_denser_than_photographs(cutouts: list[Cutout]) -> None:
    scenes = [make_scene(cutouts, np.random.default_rng(seed), 128, (8.0, 24.0)) for seed in range(12)]
    assert np.mean([len(scene.masks) for scene in scenes]) > 7
    assert max(len(scene.masks) for scene in scenes) <= 120


@pytest.mark.parametrize("diameter_px", [14.0, 32.0])
def test_objects_of_a_scene_have_about_the_size_ordered(cutouts: list[Cutout], diameter_px: float) -> None:
    areas = [
        area
        for seed in range(12)
        for area in make_scene(
            cutouts, np.random.default_rng(seed), 128, (diameter_px, diameter_px + 1e-6)
        ).masks.sum(axis=(1, 2))
    ]
    typical = 2 * math.sqrt(float(np.median(areas)) / math.pi)
    assert 0.7 * diameter_px < typical < 1.2 * diameter_px


def test_the_cutouts_themselves_are_not_changed(cutouts: list[Cutout]) -> None:
    before = [(cutout.image.copy(), cutout.mask.copy()) for cutout in cutouts]
    make_scene(cutouts, np.random.default_rng(0), 64, (10.0, 30.0))
    for cutout, (image, mask) in zip(cutouts, before, strict=True):
        assert np.array_equal(cutout.image, image)
        assert np.array_equal(cutout.mask, mask)


def test_objects_far_larger_than_the_tile_are_left_out(cutouts: list[Cutout]) -> None:
    for seed in range(40):
        scene = make_scene(cutouts, np.random.default_rng(seed), 64, (60.0, 300.0))
        assert scene.image.shape == (64, 64, 3)
