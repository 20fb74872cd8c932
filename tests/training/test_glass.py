"""Bare glass in tissue: holes lie between objects, are as bright as glass, and leave objects as they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from darcnn.training.data.glass import lay_glass
from darcnn.training.data.source import LabelledTile

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
SIDE, PINK = 160, (200, 140, 180)


def tissue(n_objects: int = 3) -> LabelledTile:
    """Return dark discs in plain pink tissue."""
    y, x = np.mgrid[:SIDE, :SIDE]
    middles = [(40, 40), (40, 110), (115, 50)][:n_objects]
    masks = np.array([np.hypot(y - cy, x - cx) < 12 for cy, cx in middles]).reshape(n_objects, SIDE, SIDE)
    image = np.full((SIDE, SIDE, 3), PINK, np.uint8)
    image[masks.any(axis=0)] = (80, 50, 140)
    return LabelledTile(image, masks)


TISSUE = tissue()


@FAST
@given(seed=seeds)
def test_objects_stay_as_they_are_doubtful_ones_too(seed: int) -> None:
    doubtful = ndimage.shift(TISSUE.masks, (0, 70, 60), order=0)[:1]
    tile = replace(TISSUE, doubtful=doubtful)
    laid = lay_glass(tile, np.random.default_rng(seed), diameter_px=24)
    kept = TISSUE.masks.any(axis=0) | doubtful.any(axis=0)
    assert np.array_equal(laid.image[kept], tile.image[kept])
    assert laid.masks is tile.masks
    assert laid.doubtful is doubtful


@FAST
@given(seed=seeds)
def test_holes_are_brighter_than_tissue_wherever_they_lie(seed: int) -> None:
    laid = lay_glass(TISSUE, np.random.default_rng(seed), diameter_px=24)
    gained = laid.image.astype(int).mean(axis=2) - TISSUE.image.astype(int).mean(axis=2)
    assert gained.min() > -2.0  # grain at the edge of a hole
    assert laid.image.dtype == np.uint8


@FAST
@given(seed=seeds)
def test_glass_is_no_darker_than_the_brightest_of_the_tile(seed: int) -> None:
    white = replace(TISSUE, image=np.full_like(TISSUE.image, 253))
    laid = lay_glass(white, np.random.default_rng(seed), diameter_px=24)
    assert laid.image.mean() > 245


def test_holes_come_as_small_as_debris_and_as_large_as_lumens() -> None:
    bare = tissue(n_objects=0)
    shares = [
        (lay_glass(bare, np.random.default_rng(seed), diameter_px=24).image != bare.image).any(axis=2).mean()
        for seed in range(60)
    ]
    assert min(shares) < 0.01
    assert max(shares) > 0.3
    assert np.mean(np.array(shares) > 0) > 0.9  # few lie wholly outside


def test_holes_may_be_far_larger_than_the_tile() -> None:
    for seed in range(20):
        lay_glass(TISSUE, np.random.default_rng(seed), diameter_px=2.0 * SIDE)


def test_the_same_seed_lays_the_same_holes() -> None:
    one, other = (lay_glass(TISSUE, np.random.default_rng(5), diameter_px=24).image for _ in range(2))
    assert np.array_equal(one, other)
