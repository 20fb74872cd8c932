"""Arrays as sources: axes, colours and types are stated, never guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from darcnn.runtime.errors import ShapeError, UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers import ArrayReader


def image(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def test_three_channels_of_uint8_are_rgb_by_convention() -> None:
    assert ArrayReader(image((4, 5, 3))).info.is_rgb
    assert ArrayReader(image((4, 5, 3))).info.channel_names == ("red", "green", "blue")


@pytest.mark.parametrize(
    "values", [image((4, 5)), image((4, 5, 1)), image((4, 5, 4)), image((4, 5, 3), np.uint16)]
)
def test_nothing_else_is_rgb_unless_said(values: np.ndarray) -> None:
    info = ArrayReader(values).info
    assert not info.is_rgb
    assert len(info.channel_names) == (values.shape[2] if values.ndim == 3 else 1)


def test_alpha_is_dropped_only_where_rgb_is_said() -> None:
    values = image((4, 5, 4))
    region = Region(0, 0, 5, 4)
    assert ArrayReader(values).read(region, level=0).shape == (4, 5, 4)
    np.testing.assert_array_equal(ArrayReader(values, is_rgb=True).read(region, level=0), values[:, :, :3])


def test_three_channels_can_be_said_to_be_no_rgb() -> None:
    info = ArrayReader(image((4, 5, 3)), is_rgb=False, channel_names=["DAPI", "GFP", "GFP"]).info
    assert not info.is_rgb
    assert info.channel_names == ("DAPI", "GFP", "GFP_2")


@pytest.mark.parametrize(
    ("dtype", "delivered"),
    [("u1", "u1"), ("u2", "u2"), (">u2", "u2"), ("i2", "f4"), ("u4", "f4"), ("f2", "f4"), ("f8", "f4")],
)
def test_types_become_the_three_of_the_runtime(dtype: str, delivered: str) -> None:
    values = image((4, 5), dtype)
    reader = ArrayReader(values)
    pixels = reader.read(Region(1, 1, 3, 2), level=0)
    assert pixels.dtype == reader.info.dtype == np.dtype(delivered)
    np.testing.assert_array_equal(pixels[:, :, 0], values[1:2, 1:3])


def test_true_is_white() -> None:
    pixels = ArrayReader(np.array([[True, False]])).read(Region(0, 0, 2, 1), level=0)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[[255], [0]]]


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(3),
        np.zeros((1, 2, 3, 4)),
        np.zeros((0, 5)),
        np.zeros((5, 5, 0)),
        np.zeros((2, 2), complex),
        np.array([["a"]]),
        np.array([[None]]),
    ],
)
def test_what_is_no_image_is_a_shape_error(values: np.ndarray) -> None:
    with pytest.raises(ShapeError):
        ArrayReader(values)


def test_rgb_of_two_channels_is_a_shape_error() -> None:
    with pytest.raises(ShapeError, match="RGB"):
        ArrayReader(image((4, 5, 2)), is_rgb=True)


def test_as_many_names_as_channels() -> None:
    with pytest.raises(ShapeError, match="2 names for 3 channels"):
        ArrayReader(image((4, 5, 3)), is_rgb=False, channel_names=["a", "b"])


def test_the_pixel_size_is_the_callers() -> None:
    assert ArrayReader(image((4, 5))).info.mpp is None
    info = ArrayReader(image((4, 5)), mpp=0.5, name="field 3").info
    assert (info.mpp, info.mpp_source, info.name, info.path) == ((0.5, 0.5), "--mpp", "field 3", None)


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf"), 2000.0])
def test_an_absurd_pixel_size_is_a_usage_error(mpp: float) -> None:
    with pytest.raises(UsageError, match="--mpp"):
        ArrayReader(image((4, 5)), mpp=mpp)
