"""LSM and STK: what tifffile finds in their tags is what the planes are said to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers import Planes, count_planes, open_source
from darcnn.runtime.slide_list import list_slides
from tests.runtime.microscope_tiffs import write_lsm, write_stk

SERIES = np.arange(2 * 4 * 3 * 20 * 30).reshape(2, 4, 3, 20, 30).astype(np.uint16)  # t z c y x


def test_lsm_has_sizes_times_and_names_and_no_thumbnails(tmp_path: Path) -> None:
    names = ("Ch1-T1", "Ch2-T2", "ChD")
    path = write_lsm(
        tmp_path / "a.lsm", SERIES, "TZCYX", voxel_m=(2e-7, 2e-7, 1e-6), names=names, times_s=(3.0, 33.5)
    )
    assert list_slides([str(tmp_path)]) == (path,)
    assert count_planes(path) == Planes(n_z=4, n_t=2, section_um=1.0, frame_interval_s=30.5)
    for t, z in ((0, 0), (1, 3)):
        with open_source(path, z=z, t=t) as reader:
            assert (reader.info.mpp, reader.info.mpp_source) == ((0.2, 0.2), "LSM voxel size")
            assert reader.info.channel_names == names
            pixels = reader.read(reader.info.whole, level=0)
        np.testing.assert_array_equal(pixels, np.moveaxis(SERIES[t, z], 0, 2))


def test_lsm_that_tells_nothing_is_read_all_the_same(tmp_path: Path) -> None:
    path = write_lsm(tmp_path / "a.lsm", SERIES[0, :, :1], "ZCYX")
    assert count_planes(path) == Planes(n_z=4, n_t=1)
    with open_source(path, z=2) as reader:
        assert reader.info.mpp is None
        np.testing.assert_array_equal(reader.read(reader.info.whole, level=0)[:, :, 0], SERIES[0, 2, 0])


def test_positions_of_lsm_are_not_taken_for_a_stack(tmp_path: Path) -> None:
    path = write_lsm(tmp_path / "a.lsm", SERIES[0], "ZCYX", n_positions=4)
    with pytest.raises(InputError, match="holds 4 positions of the stage; export each"):
        count_planes(path)


@pytest.mark.parametrize(
    ("distances", "times_ms", "planes"),
    [
        ((1.5,) * 4, (5,) * 4, Planes(n_z=4, n_t=1)),
        ((0.0,) * 4, (0, 500, 1000, 1800), Planes(n_z=1, n_t=4, frame_interval_s=0.6)),
        ((0.0,) * 4, (5,) * 4, Planes(n_z=4, n_t=1)),  # it does not say what they are
    ],
)
def test_planes_of_stk_follow_the_first(
    tmp_path: Path, distances: Sequence[float], times_ms: Sequence[int], planes: Planes
) -> None:
    values = SERIES[0, :, 0]
    path = write_stk(tmp_path / "a.stk", values, size=0.25, unit="um", distances=distances, times_ms=times_ms)
    assert count_planes(path) == planes
    chosen = {"t" if planes.n_t > 1 else "z": 2}
    with open_source(path, **chosen) as reader:
        assert (reader.info.mpp, reader.info.mpp_source) == ((0.25, 0.25), "STK calibration")
        np.testing.assert_array_equal(reader.read(reader.info.whole, level=0)[:, :, 0], values[2])


def test_an_stk_in_pixels_has_no_size(tmp_path: Path) -> None:
    path = write_stk(
        tmp_path / "a.stk", SERIES[0, :, 0], size=1.0, unit="pixel", distances=(1.0,) * 4, times_ms=(0,) * 4
    )
    with open_source(path, z=0) as reader:
        assert reader.info.mpp is None
