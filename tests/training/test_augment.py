"""Mistake 7, the second half: images and masks move together, and contrast is clipped as in the paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.color import hed_from_rgb, rgb_from_hed

from darcnn.training.data.augment import (
    add_noise,
    adjust_contrast,
    augment_target,
    randomise_source,
    turn,
    vary_stains,
    vary_synthesized,
)
from darcnn.training.data.source import LabelledTile

FAST = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
SIZE = 12
ALL_BYTES = np.arange(256, dtype=np.float32)


@st.composite
def tiles(draw: st.DrawFn) -> LabelledTile:
    """A tile whose three channels are the masks of its three objects."""
    masks = draw(hnp.arrays(bool, (3, SIZE, SIZE)))
    image = np.moveaxis(masks, 0, 2).astype(np.uint8) * 255
    return LabelledTile(np.ascontiguousarray(image), masks)


@FAST
@given(tiles(), seeds)
def test_turning_an_image_that_equals_its_masks_keeps_them_equal(tile: LabelledTile, seed: int) -> None:
    turned = turn(tile, np.random.default_rng(seed))
    assert np.array_equal(np.moveaxis(turned.masks, 0, 2), turned.image > 0)
    assert turned.masks.sum() == tile.masks.sum()


def test_turning_reaches_all_eight_positions_of_a_square() -> None:
    image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, axis=2)
    tile = LabelledTile(image, np.zeros((0, 2, 2), bool))
    seen = {turn(tile, np.random.default_rng(seed)).image[..., 0].tobytes() for seed in range(100)}
    assert len(seen) == 8


@FAST
@given(tiles(), seeds)
def test_augmented_target_moves_image_and_masks_together(tile: LabelledTile, seed: int) -> None:
    # flat squares of 4 pixels: a blur with sigma 1 leaves the order of inside and outside
    big = LabelledTile(tile.image.repeat(4, 0).repeat(4, 1), tile.masks.repeat(4, 1).repeat(4, 2))
    changed = augment_target(big, np.random.default_rng(seed))
    assert changed.image.shape == big.image.shape
    assert changed.image.dtype == np.uint8
    expected = turn(big, np.random.default_rng(seed))  # the first thing drawn
    assert np.array_equal(changed.masks, expected.masks)
    for number, mask in enumerate(changed.masks):
        channel = changed.image[..., number].astype(int)
        if mask.any() and not mask.all():
            assert channel[mask].mean() > channel[~mask].mean()


def test_augmentation_draws_strengths_in_both_directions() -> None:
    grey = LabelledTile(np.full((SIZE, SIZE, 3), 150, np.uint8), np.zeros((0, SIZE, SIZE), bool))
    levels = [int(augment_target(grey, np.random.default_rng(seed)).image[0, 0, 0]) for seed in range(60)]
    assert min(levels) >= int(adjust_contrast(np.float32([150]), 1.0)[0])
    assert max(levels) <= int(adjust_contrast(np.float32([150]), -1.0)[0])
    assert min(levels) < 110
    assert max(levels) > 180


def test_contrast_at_full_strength_is_the_papers() -> None:
    expected = np.clip(1.5 * ALL_BYTES - 150, 0, 255).astype(np.uint8)
    assert np.array_equal(adjust_contrast(ALL_BYTES, 1.0), expected)


def test_contrast_of_strength_zero_changes_nothing() -> None:
    assert np.array_equal(adjust_contrast(ALL_BYTES, 0.0), ALL_BYTES.astype(np.uint8))


def test_contrast_in_the_other_direction_is_the_inverse() -> None:
    there = adjust_contrast(ALL_BYTES, -1.0)
    assert there.max() == 255  # (255 + 150) / 1.5 is beyond: clipped
    unclipped = there < 255
    back = adjust_contrast(there.astype(np.float32), 1.0)
    assert np.abs(back.astype(int) - ALL_BYTES)[unclipped].max() <= 2  # of rounding to bytes


@FAST
@given(hnp.arrays(np.float32, (6, 6), elements=st.floats(-500, 500, width=32)), st.floats(-1, 1))
def test_contrast_is_clipped_never_wrapped(image: np.ndarray, strength: float) -> None:
    changed = adjust_contrast(image, strength)
    assert changed.dtype == np.uint8
    order = np.argsort(image, axis=None)
    assert (np.diff(changed.reshape(-1)[order].astype(int)) >= 0).all()  # brighter stays brighter


@FAST
@given(tiles(), seeds, st.sampled_from([0.0, 0.5, 1.0]))
def test_randomised_source_keeps_its_masks(tile: LabelledTile, seed: int, grey_fraction: float) -> None:
    changed = randomise_source(tile, np.random.default_rng(seed), grey_fraction)
    assert changed.image.shape == tile.image.shape
    assert changed.image.dtype == np.uint8
    assert np.array_equal(changed.masks, turn(tile, np.random.default_rng(seed)).masks)


def test_randomised_source_shows_both_polarities_and_grey() -> None:
    mask = np.zeros((1, SIZE, SIZE), bool)
    mask[0, 3:9, 3:9] = True
    image = np.where(mask[0][..., None], np.uint8([200, 180, 160]), np.uint8([60, 50, 30]))
    tile = LabelledTile(image.astype(np.uint8), mask)
    results = [randomise_source(tile, np.random.default_rng(seed), 0.5) for seed in range(60)]
    brighter = [r.image[r.masks[0]].mean() > r.image[~r.masks[0]].mean() for r in results]
    grey = [bool((r.image == r.image[..., :1]).all()) for r in results]
    assert 0.25 < np.mean(brighter) < 0.75
    assert 0.25 < np.mean(grey) < 0.75


@pytest.mark.parametrize(("invert", "brighter"), [(True, False), (False, True)])
def test_polarity_may_be_fixed(invert: bool, brighter: bool) -> None:
    mask = np.zeros((1, SIZE, SIZE), bool)
    mask[0, 3:9, 3:9] = True
    tile = LabelledTile(np.where(mask[0][..., None], np.uint8(200), np.uint8(30)).repeat(3, axis=2), mask)
    for seed in range(20):
        result = randomise_source(tile, np.random.default_rng(seed), 1.0, invert)
        assert (result.image[result.masks[0]].mean() > result.image[~result.masks[0]].mean()) == brighter


@FAST
@given(tiles(), seeds)
def test_a_synthesized_tile_is_varied_with_its_masks_and_only_a_little(tile: LabelledTile, seed: int) -> None:
    changed = vary_synthesized(tile, np.random.default_rng(seed))
    turned = turn(tile, np.random.default_rng(seed))  # the first thing drawn
    assert np.array_equal(changed.masks, turned.masks)
    assert changed.image.dtype == np.uint8
    assert np.abs(changed.image.astype(int) - turned.image.astype(int)).max() <= 22  # 8 and a tenth of 128


def test_a_varied_grey_tile_stays_grey() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8).repeat(3, axis=2)
    changed = vary_synthesized(LabelledTile(grey, np.zeros((0, SIZE, SIZE), bool)), np.random.default_rng(1))
    assert (changed.image == changed.image[..., :1]).all()


@pytest.mark.parametrize(
    "change", [turn, augment_target, vary_synthesized, lambda tile, rng: randomise_source(tile, rng, 0.5)]
)
def test_augmentation_is_a_function_of_its_generator_and_leaves_its_input_alone(change: object) -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    tile = LabelledTile(image, image[None, ..., 0] > 100)
    before = image.copy()
    first, again = (change(tile, np.random.default_rng(4)) for _ in range(2))  # type: ignore[operator]
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert np.array_equal(tile.image, before)


def test_added_noise_has_the_grain_and_the_measure_of_the_tile_and_leaves_its_contrast() -> None:
    random = np.random.default_rng(0)
    ground = np.clip(128 + 20 * random.normal(size=(128, 128, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    ground[40:50, 40:50] = 20  # an object
    masks = np.zeros((1, 128, 128), bool)
    masks[0, 40:50, 40:50] = True
    tile = LabelledTile(ground, masks)
    noisy = [add_noise(tile, np.random.default_rng(k), most=3.0**0.5, grain_px=4.0) for k in range(20)]
    for one in noisy:
        assert np.array_equal(one.masks, masks)
        assert one.image[~masks[0]].std() == pytest.approx(
            20, rel=0.15
        )  # as a window by percentiles leaves it
        assert (one.image[..., 0] == one.image[..., 1]).all()
    depths = [128 - one.image[masks[0]].mean() for one in noisy]
    assert min(depths) < 75 < max(depths) <= 115  # an object stands out less: up to half as much
    assert np.array_equal(add_noise(tile, random, most=0.0, grain_px=4.0).image, tile.image)


def stained(*amounts: float) -> np.ndarray:
    """Return 0..255 of a pixel with so much haematoxylin, eosin and rest on white glass."""
    return 255.0 * np.exp(-np.array(amounts) @ rgb_from_hed)


def test_stains_change_each_by_its_own_factor_and_the_masks_stay() -> None:
    image = np.stack([stained(0, 0, 0), stained(0.8, 0.1, 0), stained(0.1, 0.7, 0)])
    tile = LabelledTile(np.rint(image[None]).astype(np.uint8), np.ones((1, 1, 3), np.uint8))
    seen = []
    for seed in range(200):
        varied = vary_stains(tile, np.random.default_rng(seed), most=0.2)
        assert varied.masks is tile.masks
        density = -np.log(np.maximum(varied.image[0].astype(float), 1.0) / 255.0)
        glass, nucleus, cytoplasm = density @ hed_from_rgb
        seen.append([nucleus[0] - glass[0], cytoplasm[1] - glass[1]])
    haematoxylin, eosin = np.array(seen).T
    for found, amount in ((haematoxylin, 0.8), (eosin, 0.7)):
        assert found.min() < 0.9 * amount  # weaker and stronger, white glass may be clipped
        assert found.max() > 1.1 * amount
    assert abs(np.corrcoef(haematoxylin, eosin)[0, 1]) < 0.4


def test_stains_that_do_not_vary_leave_every_byte() -> None:
    random = np.random.default_rng(0)
    tile = LabelledTile(
        random.integers(1, 256, (64, 64, 3)).astype(np.uint8), np.zeros((0, 64, 64), np.uint8)
    )
    assert np.array_equal(vary_stains(tile, random, most=0.0).image, tile.image)
