"""Shapes of objects in volumes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.volumes import measure
from darcnn.runtime.volumes.measure import measure_solids
from darcnn.runtime.volumes.solid import Solid


@given(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 99))
def test_an_object_that_is_looked_at_in_slabs_measures_the_same(
    shape: tuple[int, int, int], seed: int
) -> None:
    mask = np.random.default_rng(seed).random(shape) > 0.4
    mask.flat[0] = True
    whole = measure._moments(mask)
    points = np.argwhere(mask).astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_VOXELS", 1)
        in_slabs = measure._moments(mask)
    for n, centre, spread in (whole, in_slabs):
        assert n == len(points)
        assert centre == pytest.approx(points.mean(axis=0))
        assert spread == pytest.approx(np.atleast_2d(np.cov(points.T, bias=True)), abs=1e-9)


def test_axes_are_those_of_the_box_with_the_same_moments_in_nanometres(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "_ROWS", 2)
    solid = Solid((4, 5, 6), np.ones((2, 4, 6), bool), score=0.9, n_planes=2, truncated=False)
    rows = [row for table in measure_solids([solid] * 5, (30.0, 10.0, 5.0)) for row in table.to_pylist()]
    assert rows == 5 * rows[:1]
    row = rows[0]
    assert (row["z"], row["y"], row["x"]) == (5.0, 7.0, 9.0)
    # a box of side s has the second moment s^2 / 12, an ellipsoid of axis a has a^2 / 20
    lengths = [row[f"{name}_axis_nm"] for name in ("major", "middle", "minor")]
    assert lengths == pytest.approx([side * (20 / 12) ** 0.5 for side in (60.0, 40.0, 30.0)])
    assert row["volume_nm3"] == 48 * 1500.0
    assert row["sphericity"] == pytest.approx((30 * 40 / 60**2) ** (1 / 3))
