"""Crowded tiles: copies of single objects lie against others, and every pixel knows whose it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from darcnn.training.data.crowding import crowd
from darcnn.training.data.source import LabelledTile

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
SIDE = 160
DISCS = ((40, 40, 12), (40, 110, 14), (115, 50, 10), (118, 120, 13))  # y x radius, px


def blurred_discs(ground: float, level: float, discs=DISCS) -> LabelledTile:
    """Return discs of one brightness on a plain ground, out of focus, as a microscope shows them."""
    y, x = np.mgrid[:SIDE, :SIDE]
    masks = np.array([np.hypot(y - cy, x - cx) < radius for cy, cx, radius in discs])
    sharp = np.where(masks.any(axis=0), level, ground)
    image = ndimage.gaussian_filter(sharp.astype(float), 1.5)
    return LabelledTile(np.rint(image).astype(np.uint8)[..., None].repeat(3, axis=2), masks)


BRIGHT, DARK = blurred_discs(10, 90), blurred_discs(230, 120)


@FAST
@given(seed=seeds)
@pytest.mark.parametrize("tile", [BRIGHT, DARK], ids=["bright", "dark"])
def test_no_pixel_has_two_owners_and_no_object_of_the_tile_is_lost(tile: LabelledTile, seed: int) -> None:
    crowded = crowd(tile, np.random.default_rng(seed))
    assert crowded.masks.sum(axis=0).max() == 1
    assert len(crowded.masks) >= len(tile.masks)
    for before, after in zip(tile.masks, crowded.masks, strict=False):
        assert not (after & ~before).any()
        assert after.sum() >= 0.4 * before.sum()


@FAST
@given(seed=seeds)
def test_light_adds_up_and_stains_absorb(seed: int) -> None:
    bright = crowd(BRIGHT, np.random.default_rng(seed)).image.astype(int)
    if bright.max() < 255:  # nothing had to be brought back below white
        assert (bright - BRIGHT.image).min() >= -2  # bytes are rounded
    dark = crowd(DARK, np.random.default_rng(seed)).image.astype(int)
    assert (dark - DARK.image).max() <= 2


@FAST
@given(seed=seeds)
def test_masks_lie_where_the_light_changed(seed: int) -> None:
    crowded = crowd(BRIGHT, np.random.default_rng(seed))
    copies = crowded.masks[len(BRIGHT.masks) :].any(axis=0)
    gained = crowded.image[..., 0].astype(int) - BRIGHT.image[..., 0]
    if crowded.image.max() < 255 and copies.any():
        assert gained[copies].mean() > 25  # a copy is at least a third as strong as its object
        far = ndimage.distance_transform_edt(~copies) > 16
        far &= ~BRIGHT.masks.any(axis=0)
        assert np.abs(gained[far]).max(initial=0) <= 2


def test_most_copies_touch_another_object() -> None:
    touching = total = 0
    for seed in range(40):
        crowded = crowd(BRIGHT, np.random.default_rng(seed))
        for number in range(len(BRIGHT.masks), len(crowded.masks)):
            near = ndimage.binary_dilation(crowded.masks[number], iterations=6)
            others = np.delete(crowded.masks, number, axis=0).any(axis=0)
            touching += (near & others).any()
            total += 1
    assert total > 100
    assert touching > 0.8 * total


def test_what_touches_another_or_the_edge_is_not_copied() -> None:
    pair = blurred_discs(10, 90, ((80, 70, 12), (80, 93, 12), (5, 80, 12)))
    assert crowd(pair, np.random.default_rng(0)) is pair


def test_a_tile_without_objects_stays_as_it_is() -> None:
    empty = LabelledTile(BRIGHT.image, np.zeros((0, SIDE, SIDE), bool))
    assert crowd(empty, np.random.default_rng(0)) is empty


def test_nothing_is_laid_on_doubtful_places() -> None:
    doubtful = np.zeros((1, SIDE, SIDE), bool)
    doubtful[0, 60:100] = True
    for seed in range(10):
        tile = LabelledTile(BRIGHT.image, BRIGHT.masks, doubtful)
        crowded = crowd(tile, np.random.default_rng(seed))
        assert len(crowded.masks) > len(tile.masks)
        assert not (crowded.masks[len(tile.masks) :] & doubtful).any()
        assert crowded.doubtful is doubtful


def test_the_same_generator_gives_the_same_tile() -> None:
    one, two = (crowd(BRIGHT, np.random.default_rng(3)) for _ in range(2))
    assert (one.image == two.image).all()
    assert (one.masks == two.masks).all()


def test_a_line_of_pixels_is_no_end_of_a_run() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:34, 30] = 200
    image[40:52, 10:22] = 180
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 20:34, 30], masks[1, 40:52, 10:22] = True, True
    for seed in range(60):
        crowd(LabelledTile(image, masks), np.random.default_rng(seed))
