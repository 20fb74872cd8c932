"""Synthesized tiles: real nuclei gone, new ones in their colours with masks, nothing else changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2hed

from darcnn.runtime.errors import InputError
from darcnn.runtime.intensity import IntensityRule
from darcnn.training.config import Recipe, Target, TargetSet
from darcnn.training.data.synthesis import (
    SynthesisOptions,
    SynthesizedSource,
    find_nuclei,
    remove_nuclei,
    synthesize_tile,
)
from darcnn.training.data.target import TargetImages
from darcnn.training.refine_tiles import RefineTiles

FAST = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**32 - 1)
Disc = Callable[..., np.ndarray]
STAINED = SynthesisOptions(diameter_px=19.0, is_stained=True)
BRIGHT = SynthesisOptions(diameter_px=20.0, is_stained=False)
REACH_PX = 8  # a soft edge and the blur go no farther from a nucleus


@pytest.fixture(scope="module")
def tissue(root: Path) -> list[np.ndarray]:
    """Three crops of stained tissue."""
    paths = sorted((root / "tests" / "data" / "tissue").glob("*.png"))
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


@pytest.fixture(scope="module")
def stained(root: Path) -> TargetImages:
    """The same three as the target of a recipe, at their own scale."""
    target = Target((TargetSet("tissue/*.png"),), 3, IntensityRule("full_range"), 19.0)
    return TargetImages(root / "tests" / "data", target, 0)


def fluorescence(root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the labelled images, grey three times, and their label maps."""
    folder = root / "tests" / "data" / "evaluate"
    found = []
    for path in sorted((folder / "images").glob("*.png")):
        grey = np.asarray(Image.open(path).convert("L")).astype(float)
        grey = np.clip(255 * grey / np.percentile(grey, 99.8), 0, 255).astype(np.uint8)
        labels = np.asarray(Image.open(folder / "labels" / path.name))
        found.append((grey[..., None].repeat(3, axis=2), labels))
    return found


@FAST
@given(seeds, st.integers(0, 2))
def test_masks_are_disjoint_non_empty_and_of_nuclear_size(
    tissue: list[np.ndarray], seed: int, which: int
) -> None:
    tile = synthesize_tile(tissue[which], np.random.default_rng(seed), STAINED)
    assert tile.image.shape == tissue[which].shape
    assert tile.image.dtype == np.uint8
    assert tile.masks.shape == (len(tile.masks), *tissue[which].shape[:2])
    assert len(tile.masks) >= 1
    assert tile.masks.any(axis=(1, 2)).all()
    assert tile.masks.sum(axis=0).max() <= 1
    largest = STAINED.diameter_px * STAINED.ranges.size[1] * math.exp(2 * STAINED.ranges.spread[1])
    assert tile.masks.sum(axis=(1, 2)).min() >= 10
    assert tile.masks.sum(axis=(1, 2)).max() <= 1.5 * math.pi * largest**2 / 4  # the roughness


@FAST
@given(seeds, st.integers(0, 2))
def test_a_tile_is_a_function_of_its_generator(tissue: list[np.ndarray], seed: int, which: int) -> None:
    before = tissue[which].copy()
    first, again = (synthesize_tile(tissue[which], np.random.default_rng(seed), STAINED) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert np.array_equal(tissue[which], before)


def test_other_seeds_give_other_tiles(tissue: list[np.ndarray]) -> None:
    tiles = [synthesize_tile(tissue[0], np.random.default_rng(seed), STAINED) for seed in range(6)]
    assert len({tile.image.tobytes() for tile in tiles}) == 6
    assert len({tile.masks.tobytes() for tile in tiles}) == 6


@FAST
@given(seeds, st.integers(0, 2))
def test_only_removed_and_new_nuclei_and_their_edges_change(
    tissue: list[np.ndarray], seed: int, which: int
) -> None:
    image = tissue[which]
    tile = synthesize_tile(image, np.random.default_rng(seed), STAINED)
    touched = find_nuclei(image, STAINED) | tile.masks.any(axis=0)
    far = ndimage.distance_transform_edt(~touched) > REACH_PX
    assert np.array_equal(tile.image[far], image[far])


def test_no_dark_nucleus_is_left_in_the_background(tissue: list[np.ndarray]) -> None:
    for image in tissue:
        mask = find_nuclei(image, STAINED)
        assert 0.02 < mask.mean() < 0.7
        filled = remove_nuclei(image.astype(np.float32), mask, np.random.default_rng(0), STAINED)
        assert filled is not None
        clean = np.clip(filled, 0, 255).astype(np.uint8)
        before, after = (rgb2hed(one)[..., 0] for one in (image, clean))
        ring = ndimage.binary_dilation(mask, iterations=12) & ~ndimage.binary_dilation(mask, iterations=5)
        contrast = before[mask].mean() - before[ring].mean()
        assert contrast > 0
        assert abs(after[mask].mean() - after[ring].mean()) < 0.25 * contrast
        assert after[mask].max() < np.quantile(before[mask], 0.9)


def test_new_nuclei_have_the_colours_of_the_real_ones(tissue: list[np.ndarray]) -> None:
    for image in tissue:
        real = image[find_nuclei(image, STAINED)].mean(axis=0)
        for seed in range(5):
            tile = synthesize_tile(image, np.random.default_rng(seed), STAINED)
            inside = tile.masks.any(axis=0)
            new = tile.image[inside].mean(axis=0)
            rest = tile.image[~ndimage.binary_dilation(inside, iterations=3)].mean(axis=0)
            assert np.linalg.norm(new - real) < np.linalg.norm(new - rest)


def test_every_new_nucleus_stands_out(tissue: list[np.ndarray]) -> None:
    for image in tissue:
        for seed in range(5):
            tile = synthesize_tile(image, np.random.default_rng(seed), STAINED)
            grey = tile.image.mean(axis=2)
            free = ~tile.masks.any(axis=0)
            for mask in tile.masks:
                around = ndimage.binary_dilation(mask, iterations=6) & free
                if around.sum() > 20:
                    assert grey[mask].mean() < grey[around].mean() - 5


def test_nuclei_of_one_channel_are_bright(root: Path) -> None:
    for image, labels in fluorescence(root):
        found = find_nuclei(image, BRIGHT)
        assert found[labels > 0].mean() > 0.8
        assert found[labels == 0].mean() < 0.1
        tile = synthesize_tile(image, np.random.default_rng(0), BRIGHT)
        inside = tile.masks.any(axis=0)
        assert tile.image[inside].mean() > tile.image[~inside].mean() + 20
        assert (tile.image == tile.image[..., :1]).all()


def test_nuclei_are_unequal_and_add_up_where_they_overlap(root: Path) -> None:
    def spread(image: np.ndarray, unevenness: float) -> float:
        options = replace(BRIGHT, unevenness=unevenness, adding=(0.0, 0.0))
        found = []
        for seed in range(12):
            tile = synthesize_tile(image, np.random.default_rng(seed), options)
            grey = tile.image.mean(axis=2)
            ground = np.median(grey[~tile.masks.any(axis=0)])
            found.append(np.std(np.log([max(1.0, np.median(grey[mask]) - ground) for mask in tile.masks])))
        return float(np.mean(found))

    def gains(image: np.ndarray) -> np.ndarray:
        tiles = [
            synthesize_tile(
                image, np.random.default_rng(seed), replace(BRIGHT, adding=(adding, adding))
            ).image
            for adding in (1.0, 0.0)
            for seed in range(8)
        ]
        return np.subtract(tiles[:8], tiles[8:], dtype=np.int64)

    for image, _ in fluorescence(root):
        image = image // 4  # room above: nothing is clipped
        assert spread(image, 1.0) > 1.2 * spread(image, 0.0)
        assert gains(image).min() >= -1
        assert gains(image).max() > 10


@FAST
@given(seeds)
def test_light_that_adds_up_is_hardly_clipped(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 20, (96, 96, 3), dtype=np.uint8)
    image[20:45, 20:45] += np.uint8(225)
    tile = synthesize_tile(image, rng, BRIGHT)
    assert (tile.image == 255).all(axis=2).mean() <= 0.02


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("options", [STAINED, BRIGHT])
def test_a_tile_without_nuclei_comes_back_as_it_is(level: int, options: SynthesisOptions) -> None:
    noise = np.random.default_rng(0).integers(-3, 4, (128, 128, 3))
    for image in (np.full((128, 128, 3), level), level + noise):
        plain = np.clip(image, 0, 255).astype(np.uint8)
        tile = synthesize_tile(plain, np.random.default_rng(0), options)
        assert np.array_equal(tile.image, plain)
        assert tile.masks.shape == (0, 128, 128)


@FAST
@given(seeds, st.integers(16, 90), st.integers(16, 90), st.sampled_from([6.0, 19.0, 40.0]), st.booleans())
def test_any_picture_gives_a_tile(
    seed: int, height: int, width: int, diameter_px: float, is_stained: bool
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[: height // 2] //= 4
    tile = synthesize_tile(image, rng, SynthesisOptions(diameter_px, is_stained))
    assert tile.image.shape == image.shape
    assert tile.masks.shape == (len(tile.masks), height, width)


def test_pale_insides_belong_to_their_nucleus_and_gaps_between_nuclei_do_not(disc: Disc) -> None:
    pink, purple = np.uint8([230, 180, 210]), np.uint8([90, 50, 150])
    ring = disc(128, 40, 64, 14) & ~disc(128, 40, 64, 4)
    wall = disc(128, 90, 64, 34) & ~disc(128, 90, 64, 22)
    image = np.where((ring | wall)[..., None], purple, pink)
    found = find_nuclei(image, replace(STAINED, diameter_px=28.0))
    assert found[64, 40]
    assert not found[64, 90]


def test_dark_objects_are_those_of_the_negative(root: Path) -> None:
    image, _ = fluorescence(root)[0]
    bright = synthesize_tile(image, np.random.default_rng(3), BRIGHT)
    dark = synthesize_tile(255 - image, np.random.default_rng(3), replace(BRIGHT, is_dark=True))
    assert len(bright.masks)
    assert np.array_equal(dark.masks, bright.masks)
    assert np.array_equal(dark.image, 255 - bright.image)


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_round_synthesizes_objects_of_the_polarity_of_its_labels(
    tmp_path: Path, recipe: Recipe, is_dark: bool
) -> None:
    labels = np.zeros((160, 160), np.int32)
    rows, columns = np.indices(labels.shape)
    for number, (y, x) in enumerate(((30, 30), (30, 110), (110, 40), (120, 120)), start=1):
        labels[(rows - y) ** 2 + (columns - x) ** 2 < 100] = number
    noise = np.random.default_rng(0).normal(0, 4, labels.shape)
    inside, outside = (80, 190) if is_dark else (190, 80)
    Image.fromarray((np.where(labels, inside, outside) + noise).astype(np.uint8)).save(tmp_path / "a.png")
    target = replace(
        recipe.target,
        sets=(TargetSet("a.png", diameter_px=20.0),),
        channels=1,
        intensity=IntensityRule("full_range"),
        nominal_diameter_px=20.0,
    )
    stage = replace(recipe.refine_stage, synthetic_every=1, source_every=0, batch=2)
    plan = replace(recipe, target=target, refine_stage=stage, tile_px=128)
    targets = TargetImages(tmp_path, target, 0)
    batch = RefineTiles(plan, tmp_path, targets).of_round("refine", {"a": labels})(0)
    for picture, found in zip(batch.images.numpy(), batch.targets, strict=True):
        covered = found["masks"].numpy().any(axis=0)
        assert 0 < covered.mean() < 0.9
        grey = picture.mean(axis=0)
        assert (np.median(grey[covered]) < np.median(grey[~covered])) == is_dark


@pytest.mark.parametrize(
    ("channels", "is_dark", "stained_too", "dark"),
    [
        (3, None, True, False),
        (3, True, True, False),
        (3, False, False, False),  # fluorescence saved in colour
        (1, None, False, False),
        (1, True, False, True),
    ],
)
def test_colours_are_tissue_unless_objects_are_bright(
    stained: TargetImages, channels: int, is_dark: bool | None, stained_too: bool, dark: bool
) -> None:
    targets = copy(stained)
    targets.target = replace(targets.target, channels=channels)
    options = SynthesizedSource(targets, is_dark=is_dark).options
    assert (options.is_stained, options.is_dark) == (stained_too, dark)


def test_the_source_draws_crops_of_the_target_until_one_has_nuclei(stained: TargetImages) -> None:
    source = SynthesizedSource(stained)
    assert source.options == SynthesisOptions(19.0, is_stained=True)
    for seed in range(6):
        first, again = (source.tile(np.random.default_rng(seed), 96) for _ in range(2))
        assert first.image.shape == (96, 96, 3)
        assert len(first.masks) >= 1
        assert np.array_equal(first.image, again.image)


def test_a_target_without_nuclei_is_an_error_not_a_hang(tmp_path: Path, recipe: Recipe) -> None:
    plain = Image.new("L", (64, 64), 100)
    plain.putpixel((5, 5), 180)  # contrast, but no nucleus
    plain.save(tmp_path / "plain.png")
    target = replace(recipe.target, sets=(TargetSet("plain.png"),))
    source = SynthesizedSource(TargetImages(tmp_path, target, 0))
    with pytest.raises(InputError, match="synthetic_fraction") as caught:
        source.tile(np.random.default_rng(0), 64)
    assert "\n" not in str(caught.value)
