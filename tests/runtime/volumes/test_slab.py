"""Slabs: less noise, the same objects; what has no value takes no part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.slab import Slab, join_planes, smooth_plane
from darcnn.runtime.volumes.stack import Stack, measure_stack
from darcnn.runtime.volumes.volume import Stored, Volume, VolumeInfo


def make_volume(values: np.ndarray, folder: Path, voxel: tuple[float, float, float] | None = None) -> Volume:
    path = folder / "values.raw"
    path.write_bytes(np.ascontiguousarray(values).tobytes())
    info = VolumeInfo(path, "values", values.shape, values.dtype, voxel)  # type: ignore[arg-type]
    return Volume(info, Stored(path, values.dtype))


def test_the_mean_of_planes_has_less_noise() -> None:
    planes = list(np.random.default_rng(0).normal(0, 10, (9, 100, 100)).astype(np.float32))
    assert join_planes(planes).std() == pytest.approx(10 / 3, rel=0.05)


def test_smoothing_is_that_of_scipy() -> None:
    plane = np.random.default_rng(1).normal(0, 1, (40, 50)).astype(np.float32)
    wanted = ndimage.gaussian_filter(plane, 1.7, mode="reflect", truncate=6 / 1.7)
    assert np.abs(smooth_plane(plane, 1.7) - wanted).max() < 1e-4


def test_pixels_without_value_take_the_mean_of_those_round_them() -> None:
    plane = np.full((9, 9), 4.0, np.float32)
    plane[4, 4] = np.nan
    assert np.allclose(smooth_plane(plane, 1.0), 4.0)
    assert np.isnan(smooth_plane(np.full((9, 9), np.nan, np.float32), 1.0)).all()
    holed = np.array([[6.0, np.nan], [3.0, 4.0], [3.0, np.nan]])
    assert join_planes(list(holed)).tolist() == [4.0, 4.0]
    assert np.isnan(join_planes([np.full((2, 2), np.inf), np.full((2, 2), np.nan)])).all()


def test_planes_of_a_stack_are_slabs_of_the_volume_along_any_axis(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(0, 1, (7, 8, 9)).astype(np.float32)
    volume = make_volume(values, tmp_path)
    for number, axis in enumerate(("z", "y", "x")):
        stack = Stack(volume, axis, n_joined=3)  # type: ignore[arg-type]
        planes = list(stack.read_ahead(0, len(stack)))
        moved = np.moveaxis(values, number, 0)
        assert len(planes) == len(moved)
        for index, plane in enumerate(planes):
            wanted = moved[max(0, index - 1) : index + 2].mean(axis=0)
            assert np.allclose(plane, wanted, atol=1e-6)
            assert np.array_equal(stack.plane(index), plane)


def test_a_slab_is_as_deep_as_the_objects_however_thick_the_planes_are(tmp_path: Path) -> None:
    values = np.zeros((4, 5, 6), np.uint8)
    cubes = make_volume(values, tmp_path, (1.0, 1.0, 1.0))
    thick = make_volume(values, tmp_path, (5.0, 1.0, 1.0))
    rule = Slab(depth=0.5, smoothing=0.2)
    assert [Stack.of(one, "z", rule, 10.0).n_joined for one in (cubes, thick)] == [5, 1]
    assert Stack.of(thick, "z", rule, 10.0).sigma_px == 2.0
    assert Stack.of(thick, "z", None, 10.0) == Stack(thick, "z")


def test_one_window_serves_all_planes_whatever_is_broken_on_some(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    values = random.normal(100, 10, (40, 64, 64)).astype(np.float32)
    rule = IntensityRule("percentile", 1.0, 99.0)
    clean = measure_stack(Stack(make_volume(values, tmp_path), "z"), rule, scale=1.0)
    broken = values.copy()
    broken[3:6] = np.nan  # planes without values
    broken[random.integers(0, 40, 200), random.integers(0, 64, 200), random.integers(0, 64, 200)] = 1e6
    other = measure_stack(Stack(make_volume(broken, tmp_path), "z"), rule, scale=1.0)
    assert other.low == pytest.approx(clean.low, abs=1.0)
    assert other.high == pytest.approx(clean.high, abs=3.0)
    whole = measure_stack(Stack(make_volume(values, tmp_path), "z"), IntensityRule("range", 0, 9), scale=1.0)
    assert (whole.low, whole.high) == (0, 9)
