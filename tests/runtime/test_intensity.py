"""The intensity rule: robust to what files hold, and each model sees the channels it was made for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.intensity import (
    IntensityRule,
    Window,
    apply_window,
    looks_like_noise,
    measure_window,
    sees_separate_channels,
    select_channels,
)

PERCENTILE = IntensityRule("percentile", 1.0, 99.0)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_percentiles_become_black_and_white(dtype: Any) -> None:
    values = np.arange(201).astype(dtype).reshape(3, 67)
    window = measure_window(IntensityRule("percentile", 10, 90), values)
    assert window == Window(20.0, 180.0)
    mapped = apply_window(values, window).reshape(-1)
    assert (mapped[:21] == 0).all()
    assert (mapped[180:] == 255).all()
    assert mapped[100] == 128
    assert (np.diff(mapped.astype(int)) >= 0).all()


def test_the_whole_range_of_a_type_is_kept() -> None:
    bytes_ = np.arange(256, dtype=np.uint8)
    rule = IntensityRule("full_range")
    assert apply_window(bytes_, measure_window(rule, bytes_)) is bytes_
    words = np.array([0, 32768, 65535], np.uint16)
    assert apply_window(words, measure_window(rule, words)).tolist() == [0, 128, 255]
    assert apply_window(np.array([-1, 0.5, 2], np.float32), Window(0, 1)).tolist() == [0, 128, 255]


def test_values_that_are_no_numbers_neither_count_nor_shine() -> None:
    values = np.arange(1000, dtype=np.float32)
    odd = np.concatenate([values, [np.nan] * 300, [np.inf] * 300, [-np.inf] * 300]).astype(np.float32)
    window = measure_window(PERCENTILE, odd)
    assert window == measure_window(PERCENTILE, values)
    mapped = apply_window(odd, window)
    assert np.array_equal(mapped[:1000], apply_window(values, window))
    assert not mapped[1000:].any()


@pytest.mark.parametrize("level", [0.0, 7.5, -3e4, 1e17, 3e38])
@pytest.mark.parametrize("rule", [PERCENTILE, IntensityRule("percentile", 0, 100)])
def test_an_image_without_contrast_is_black(level: float, rule: IntensityRule) -> None:
    flat = np.full((9, 9), level, np.float32)
    assert not apply_window(flat, measure_window(rule, flat)).any()


def test_an_image_without_a_number_is_black() -> None:
    nothing = np.full((9, 9), np.nan, np.float32)
    assert not apply_window(nothing, measure_window(PERCENTILE, nothing)).any()


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)),
    st.sampled_from([PERCENTILE, IntensityRule("full_range"), IntensityRule("percentile", 0, 100)]),
)
def test_any_floats_become_bytes_in_their_order(values: np.ndarray, rule: IntensityRule) -> None:
    mapped = apply_window(values, measure_window(rule, values))
    assert mapped.dtype == np.uint8
    is_number = np.isfinite(values)
    assert not mapped[~is_number].any()
    assert (np.diff(mapped[is_number][np.argsort(values[is_number])].astype(int)) >= 0).all()


def test_separate_channels_have_limits_of_their_own() -> None:
    rng = np.random.default_rng(0)
    bright, dim = rng.integers(0, 60_000, (50, 60)), rng.integers(100, 400, (50, 60))
    pixels = np.stack([bright, dim], axis=2).astype(np.uint16)
    window = measure_window(PERCENTILE, pixels, by_channel=True)
    mapped = apply_window(pixels, window)
    for channel in range(2):
        alone = pixels[:, :, channel]
        assert np.array_equal(mapped[:, :, channel], apply_window(alone, measure_window(PERCENTILE, alone)))
    assert mapped[:, :, 1].max() == 255
    assert apply_window(pixels, measure_window(PERCENTILE, pixels))[:, :, 1].max() < 3  # lost in the other


def test_bytes_in_their_whole_range_stay_by_channel_as_well() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 2), dtype=np.uint8)
    window = measure_window(IntensityRule("full_range"), pixels, by_channel=True)
    assert window == Window((0.0, 0.0), (255.0, 255.0))
    assert apply_window(pixels, window) is pixels


def picture(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 999, (4, 5, n)).astype(np.uint16)


@pytest.mark.parametrize(("available", "channels"), [(2, 2), (5, 2), (3, 3), (4, 4), (6, 4)])
def test_a_model_of_several_channels_sees_the_first_of_an_image(available: int, channels: int) -> None:
    pixels = picture(available)
    assert sees_separate_channels(available=available, is_rgb=False, channels=channels, channel=None)
    chosen = select_channels(pixels, is_rgb=False, channels=channels)
    assert np.array_equal(chosen, pixels[:, :, :channels])


@pytest.mark.parametrize(
    ("available", "is_rgb", "channels", "channel", "message"),
    [
        (1, False, 2, None, "1 for a model of 2"),
        (3, False, 4, None, "3 for a model of 4"),
        (3, True, 2, None, "red, green and blue for a model of 2"),
        (3, True, 4, None, "red, green and blue for a model of 4"),
        (5, False, 2, 1, "one channel for a model of 2"),
        (2, False, 1, None, "none was chosen"),
        (2, False, 3, None, "none was chosen"),
        (4, False, 3, None, "none was chosen"),  # none of them are red, green and blue
        (2, False, 1, 2, "channel 2"),
    ],
)
def test_channels_that_do_not_serve_are_refused(
    available: int, is_rgb: bool, channels: int, channel: int | None, message: str
) -> None:
    assert not sees_separate_channels(available=available, is_rgb=is_rgb, channels=channels, channel=channel)
    with pytest.raises(ShapeError, match=message):
        select_channels(picture(available), is_rgb=is_rgb, channels=channels, channel=channel)


def test_grey_and_colours_serve_models_of_one_and_three() -> None:
    grey, colours = picture(1), picture(3)
    assert np.array_equal(select_channels(grey, is_rgb=False, channels=3), grey.repeat(3, axis=2))
    assert np.array_equal(select_channels(colours, is_rgb=True, channels=3), colours)
    mean = select_channels(colours, is_rgb=True, channels=1)
    assert np.array_equal(mean[:, :, 0], np.rint(colours.mean(axis=2, dtype=np.float32)))
    second = select_channels(colours, is_rgb=False, channels=3, channel=1)
    assert np.array_equal(second, colours[:, :, 1:2].repeat(3, axis=2))


def test_colours_that_are_infinite_have_no_mean_and_no_warning() -> None:
    colours = np.array([[[np.inf, -np.inf, 1.0], [1.0, 2.0, 3.0]]], np.float32)
    mean = select_channels(colours, is_rgb=True, channels=1)
    assert apply_window(mean, Window(0.0, 4.0)).reshape(-1).tolist() == [0, 128]


@pytest.mark.parametrize("blur", [0, 1, 4])
def test_noise_is_told_from_images_with_objects(root, blur):
    rng = np.random.default_rng(blur)
    noise = rng.poisson(400, (300, 300)).astype(float)
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(-blur, blur + 1))
    assert looks_like_noise(noise.reshape(-1, 1))
    noise[40:90, 60:110] += 20 * noise.std()
    assert not looks_like_noise(noise.reshape(-1, 1))
    for path in sorted((root / "tests" / "data" / "target").glob("*.png")):
        with Image.open(path) as picture:
            assert not looks_like_noise(np.asarray(picture.convert("L")).reshape(-1, 1))


def test_what_is_too_little_or_flat_is_no_noise():
    assert not looks_like_noise(np.zeros((5000, 1)))
    assert not looks_like_noise(np.random.default_rng(0).normal(size=(100, 1)))
    assert not looks_like_noise(np.full((5000, 1), np.nan))
