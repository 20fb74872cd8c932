"""Filled holes: nothing else changes, a flat picture stays flat, colour and grain go on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.training.data.inpaint import fill_holes

FAST = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
SIZE = 64


def square(begin: int, end: int) -> np.ndarray:
    hole = np.zeros((SIZE, SIZE), bool)
    hole[begin:end, begin:end] = True
    return hole


@st.composite
def pictures_with_holes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A picture of any size and a hole that leaves at least one pixel."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    image = draw(hnp.arrays(np.float32, (height, width, 3), elements=st.floats(0, 255, width=32)))
    hole = draw(hnp.arrays(bool, (height, width)))
    hole[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = False
    return image, hole


@FAST
@given(pictures_with_holes(), seeds)
def test_only_the_hole_changes(picture: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    image, hole = picture
    before = image.copy()
    filled = fill_holes(image, hole, np.random.default_rng(seed), reach_px=5.0)
    assert filled.dtype == np.float32
    assert np.array_equal(filled[~hole], image[~hole])
    assert np.isfinite(filled).all()
    assert np.array_equal(image, before)


@FAST
@given(pictures_with_holes(), seeds)
def test_what_lies_in_the_hole_does_not_matter(picture: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    image, hole = picture
    other = np.where(hole[..., None], np.float32(1e4), image)
    first, second = (
        fill_holes(one, hole, np.random.default_rng(seed), reach_px=5.0) for one in (image, other)
    )
    assert np.allclose(first, second, atol=1e-2)


@FAST
@given(st.floats(0, 255, width=32), pictures_with_holes(), seeds)
def test_a_flat_picture_stays_flat(level: float, picture: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    _, hole = picture
    image = np.where(hole[..., None], np.float32(0), np.float32(level)).repeat(3, axis=2)
    filled = fill_holes(image, hole, np.random.default_rng(seed), reach_px=5.0)
    assert np.allclose(filled, level, atol=1e-2)


def test_a_gradient_goes_on_through_the_hole() -> None:
    image = np.broadcast_to(np.arange(SIZE, dtype=np.float32)[None, :, None] * 3, (SIZE, SIZE, 1)).copy()
    hole = square(22, 42)
    filled = fill_holes(image, hole, np.random.default_rng(0), reach_px=16.0)
    assert np.abs(filled - image)[hole].mean() < 10  # of a range of 60 inside the hole


def test_grain_goes_on_through_the_hole() -> None:
    rng = np.random.default_rng(0)
    image = (128 + rng.normal(0, 10, (SIZE, SIZE, 1))).astype(np.float32)
    hole = square(20, 44)
    filled = fill_holes(image, hole, rng, reach_px=20.0)
    assert filled[hole].std() == pytest.approx(10, abs=2.5)


def test_grain_is_fetched_from_plain_places_only() -> None:
    rng = np.random.default_rng(0)
    image = np.full((SIZE, SIZE, 1), 128, np.float32)
    image[:, SIZE // 2 :] += rng.normal(0, 20, (SIZE, SIZE // 2, 1)).astype(np.float32)
    hole = square(8, 24)
    plain = np.zeros_like(hole)
    plain[:, : SIZE // 2 - 10] = True
    filled = fill_holes(image, hole, rng, reach_px=20.0, plain=plain)
    assert filled[hole].std() < 2


def test_filling_is_a_function_of_its_generator() -> None:
    image = np.random.default_rng(1).uniform(0, 255, (SIZE, SIZE, 3)).astype(np.float32)
    first, again, other = (
        fill_holes(image, square(10, 30), np.random.default_rng(seed), reach_px=9.0) for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
