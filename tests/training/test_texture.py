"""Texture of new nuclei: only real nuclear pixels, of the right kind, whatever the mask looks like."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.training.data.texture import brightness, sample_texture, take_stock

FAST = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
Disc = Callable[..., np.ndarray]
SIZE = 96
GROUND = np.float32([220, 180, 210])


def sample(image: np.ndarray, mask: np.ndarray, seed: int = 0, n_nuclei: int = 5) -> np.ndarray:
    stock = take_stock(image, mask, ground=GROUND, diameter_px=20.0)
    offsets = np.random.default_rng(1).uniform(-14, 14, (n_nuclei * 40, 2)).astype(np.float32)
    sizes = np.full(n_nuclei, 40)
    return sample_texture(
        stock, offsets, sizes, np.full(n_nuclei, 26, np.float32), np.random.default_rng(seed)
    )


def test_brightness_is_the_mean_of_the_colours() -> None:
    assert np.allclose(brightness(np.array([[[0, 30, 60], [255, 255, 255]]], np.uint8)), [[30, 255]])


@FAST
@given(seeds)
def test_texture_is_made_of_nuclear_pixels_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    mask = np.zeros((SIZE, SIZE), bool)
    for x, y, radius in ((20, 25, 10), (70, 30, 8), (40, 70, 13)):
        mask |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    nuclear = rng.uniform((60, 30, 90), (110, 70, 150), (SIZE, SIZE, 3))
    image = np.where(mask[..., None], nuclear, GROUND).astype(np.float32)
    texture = sample(image, mask, seed)
    assert (texture >= (60, 30, 90)).all()
    assert (texture <= (110, 70, 150)).all()


def test_dirt_of_another_colour_lends_no_texture(disc: Disc) -> None:
    nucleus, dirt = disc(SIZE, 30, 30, 14), disc(SIZE, 70, 65, 14)
    image = np.where(nucleus[..., None], np.float32([80, 30, 150]), GROUND)
    image[dirt] = (175, 150, 165)
    texture = sample(image.astype(np.float32), nucleus | dirt)
    assert np.allclose(texture, (80, 30, 150), atol=1)


def test_typical_colour_and_contrast_are_those_of_the_nuclei(disc: Disc) -> None:
    nucleus = disc(SIZE, 50, 40, 14)
    image = np.where(nucleus[..., None], np.float32([80, 30, 150]), GROUND).astype(np.float32)
    stock = take_stock(image, nucleus, ground=GROUND, diameter_px=20.0)
    assert np.allclose(stock.colour, (80, 30, 150))
    assert np.isclose(stock.contrast, np.mean([80, 30, 150]) - GROUND.mean(), atol=0.01)
    assert np.abs(stock.middles - (40, 50)).max() <= 3
    assert (np.abs(stock.radii_px - 14) <= 3).all()


@FAST
@given(hnp.arrays(bool, st.tuples(st.integers(2, 24), st.integers(2, 24))), seeds)
def test_any_mask_gives_texture(mask: np.ndarray, seed: int) -> None:
    mask[0, 0] = True
    image = np.random.default_rng(seed).uniform(0, 255, (*mask.shape, 3)).astype(np.float32)
    texture = sample(image, mask, seed)
    assert texture.shape == (200, 3)
    assert np.isfinite(texture).all()
    assert texture.min() >= image.min() - 0.01
    assert texture.max() <= image.max() + 0.01
