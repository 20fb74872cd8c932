"""Planes of MRC and NIfTI volumes: which axis is which, which pixel size is believed, what is refused."""

from __future__ import annotations

import gzip
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers import Planes, count_planes, open_source
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.readers.mrc_header import read_mrc_header
from darcnn.runtime.slide_list import list_slides

mrcfile = pytest.importorskip("mrcfile", reason="the extra `volumes` is not installed")
nibabel = pytest.importorskip("nibabel", reason="the extra `volumes` is not installed")

VOLUME = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)  # Z, Y, X
HEADER_BYTES = 1024  # of an MRC file


def mrc(path: Path, values: np.ndarray = VOLUME, **fields: Any) -> Path:
    """Write an MRC file; `fields` of its header are set last."""
    with mrcfile.new(path, values) as file:
        for name, value in fields.items():
            if name == "voxel_size":
                file.voxel_size = value
            else:
                file.header[name] = value
    return path


def nifti(path: Path, values: np.ndarray, *, zooms: Any = (1.0, 1.0, 1.0), unit: str | None = None) -> Path:
    """Write a NIfTI file of values (X, Y, Z, ...)."""
    image = nibabel.Nifti1Image(values, np.diag([*zooms, 1.0]))
    if unit is not None:
        image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def pixels_of(path: Path, **options: Any) -> np.ndarray:
    with open_source(path, **options) as reader:
        return reader.read(Region(0, 0, reader.info.width_px0, reader.info.height_px0), level=0)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(path, **options)
    message = str(caught.value)
    assert caught.value.where == str(path)
    assert "\n" not in message
    return message


# MRC


def test_sides_of_voxels_follow_the_axes_that_columns_rows_and_sections_go_along(tmp_path: Path) -> None:
    cell = np.rec.array([(30.0 * 6, 20.0 * 5, 10.0 * 4)], dtype=[("x", "f4"), ("y", "f4"), ("z", "f4")])[0]
    path = mrc(tmp_path / "a.mrc", cella=cell, mx=6, my=5, mz=4, mapc=3, mapr=2, maps=1)
    header = read_mrc_header(path)
    assert header.mpp == pytest.approx((0.001, 0.002))
    assert header.section_um == pytest.approx(0.003)
    path = mrc(tmp_path / "b.mrc", cella=cell, mx=6, my=5, mz=4, mapc=0, mapr=0, maps=0)
    assert read_mrc_header(path).mpp == pytest.approx((0.003, 0.002))  # columns along x


@pytest.mark.parametrize("suffix", [".mrc", ".rec", ".map", ".st", ".MRC"])
def test_a_plane_of_an_mrc_is_a_section_with_its_first_row_on_top(tmp_path: Path, suffix: str) -> None:
    path = mrc(tmp_path / f"a{suffix}")
    assert count_planes(path) == Planes(n_z=4)
    with open_source(path, z=2) as reader:
        assert (reader.info.name, reader.info.channel_names) == ("a", ("grey",))
    np.testing.assert_array_equal(pixels_of(path, z=2)[:, :, 0], VOLUME[2])


@pytest.mark.parametrize(
    ("dtype", "delivered"),
    [("i1", "f4"), ("i2", "f4"), ("f4", "f4"), ("u2", "u2"), ("f2", "f4")],
    ids=["mode 0", "mode 1", "mode 2", "mode 6", "mode 12"],
)
def test_each_mode_keeps_its_values(tmp_path: Path, dtype: str, delivered: str) -> None:
    values = VOLUME.astype(dtype) - np.array(60).astype(dtype) if dtype != "u2" else VOLUME.astype(dtype)
    pixels = pixels_of(mrc(tmp_path / "a.mrc", values), z=3)
    assert pixels.dtype == np.dtype(delivered)
    np.testing.assert_array_equal(pixels[:, :, 0], values[3].astype(delivered))


def test_the_other_byte_order_is_read(tmp_path: Path) -> None:
    pixels = pixels_of(mrc(tmp_path / "a.mrc", VOLUME.astype(">f4")), z=1)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[:, :, 0], VOLUME[1])


def test_what_lies_between_header_and_values_is_skipped(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "a.mrc", VOLUME) as file:
        file.set_extended_header(np.full(300, 7, np.uint8).view("V1"))
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.mrc", z=0)[:, :, 0], VOLUME[0])


def test_volumes_of_a_stack_count_along_z_one_after_another(tmp_path: Path) -> None:
    stack = np.arange(2 * 3 * 5 * 6, dtype=np.float32).reshape(2, 3, 5, 6)
    path = mrc(tmp_path / "a.mrc", stack)
    assert count_planes(path).n_z == 6
    np.testing.assert_array_equal(pixels_of(path, z=4)[:, :, 0], stack[1, 1])


def test_one_image_needs_no_z(tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels_of(mrc(tmp_path / "a.mrc", VOLUME[0]))[:, :, 0], VOLUME[0])


@pytest.mark.parametrize(("flags", "is_signed"), [(0, False), (1, True), (None, True)])
def test_bytes_without_a_sign_are_known_by_the_mark_of_imod(
    tmp_path: Path, flags: int | None, is_signed: bool
) -> None:
    values = np.arange(-60, 60, dtype=np.int8).reshape(4, 5, 6)
    path = mrc(tmp_path / "a.mrc", values)
    if flags is not None:
        content = bytearray(path.read_bytes())
        content[152:160] = struct.pack("<ii", 1146047817, flags)
        path.write_bytes(content)
    pixels = pixels_of(path, z=0)
    expected = values if is_signed else values.view(np.uint8)
    assert pixels.dtype == (np.float32 if is_signed else np.uint8)
    np.testing.assert_array_equal(pixels[:, :, 0], expected[0])


@pytest.mark.parametrize(
    ("voxel_size", "mpp"),
    [
        ((10.0, 10.0, 10.0), (0.001, 0.001)),
        ((4.0, 2.0, 1.0), (0.0004, 0.0002)),
        (0.0, None),
        (1.0, None),  # what programs write that know none
        (-5.0, None),
        (float("nan"), None),
    ],
)
def test_the_cell_gives_the_pixel_size_where_it_is_believable(
    tmp_path: Path, voxel_size: Any, mpp: tuple[float, float] | None
) -> None:
    path = mrc(tmp_path / "a.mrc", voxel_size=voxel_size)
    with open_source(path, z=0) as reader:
        assert reader.info.mpp == (None if mpp is None else pytest.approx(mpp))
        assert reader.info.mpp_source == (None if mpp is None else "MRC cell")
    with open_source(path, z=0, mpp=0.5) as reader:
        assert (reader.info.mpp, reader.info.mpp_source) == ((0.5, 0.5), "--mpp")


def test_a_cell_without_a_grid_gives_no_pixel_size(tmp_path: Path) -> None:
    with open_source(mrc(tmp_path / "a.mrc", voxel_size=5.0, mx=0), z=0) as reader:
        assert reader.info.mpp is None


def test_a_transform_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = mrc(tmp_path / "a.mrc", VOLUME.astype(np.complex64))
    assert "complex numbers (mode 4), a transform rather than an image" in refusal(path, z=0)
    assert "mode 3" in refusal(mrc(tmp_path / "b.mrc", mode=3), z=0)


@pytest.mark.parametrize("field", ["mode", "nx", "ny", "nz", "nsymbt"])
@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1])
def test_a_header_that_cannot_be_is_told(tmp_path: Path, field: str, value: int) -> None:
    refusal(mrc(tmp_path / "a.mrc", **{field: value}), z=0)


@pytest.mark.parametrize("kept", [3, 500, HEADER_BYTES, HEADER_BYTES + 8, -1])
def test_a_truncated_mrc_is_told(tmp_path: Path, kept: int) -> None:
    path = mrc(tmp_path / "a.mrc")
    path.write_bytes(path.read_bytes()[:kept])
    refusal(path, z=0)


def test_a_file_with_a_tail_is_read_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, about mrcfile
    path = mrc(tmp_path / "a.mrc")
    path.write_bytes(path.read_bytes() + bytes(100))
    np.testing.assert_array_equal(pixels_of(path, z=3)[:, :, 0], VOLUME[3])
    assert not recwarn


# NIfTI


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
def test_the_axes_of_a_nifti_are_x_y_z_whatever_its_affine_says(tmp_path: Path, suffix: str) -> None:
    values = VOLUME.T  # X, Y, Z
    path = nifti(tmp_path / "a.nii", values, zooms=(-1.0, -1.0, 1.0))
    if "gz" in suffix.lower():
        (tmp_path / f"b{suffix}").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / f"b{suffix}"
    assert count_planes(path) == Planes(n_z=4)
    with open_source(path, z=2) as reader:
        assert reader.info.name == path.name[0]
        assert (reader.info.width_px0, reader.info.height_px0) == (6, 5)
    np.testing.assert_array_equal(pixels_of(path, z=2)[:, :, 0], VOLUME[2])


def test_the_fourth_axis_is_time(tmp_path: Path) -> None:
    values = np.arange(6 * 5 * 4 * 3, dtype=np.float32).reshape(6, 5, 4, 3)
    path = nifti(tmp_path / "a.nii", values)
    assert count_planes(path) == Planes(n_z=4, n_t=3)
    np.testing.assert_array_equal(pixels_of(path, z=1, t=2)[:, :, 0], values[:, :, 1, 2].T)
    assert "--t" in refusal(path, z=1)
    assert "5 x 4 x 3" in refusal(nifti(tmp_path / "b.nii", np.zeros((6, 5, 4, 3, 2), np.uint8)), z=0)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 1, 1, 1)])
def test_one_plane_needs_no_z(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.arange(30, dtype=np.uint8).reshape(shape)
    path = nifti(tmp_path / "a.nii", values)
    assert count_planes(path) == Planes()
    np.testing.assert_array_equal(pixels_of(path)[:, :, 0], values.reshape(6, 5).T)


@pytest.mark.parametrize(("kind", "delivered"), [("u1", "u1"), ("u2", "u2"), ("i2", "f4"), ("f8", "f4")])
def test_values_keep_their_type_unless_they_are_scaled(tmp_path: Path, kind: str, delivered: str) -> None:
    path = nifti(tmp_path / "a.nii", VOLUME.T.astype(kind))
    assert pixels_of(path, z=0).dtype == np.dtype(delivered)
    stored = bytearray(path.read_bytes())
    stored[112:120] = struct.pack("<ff", 0.5, -3.0)  # scl_slope, scl_inter
    path.write_bytes(stored)
    scaled = pixels_of(path, z=0)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[:, :, 0], VOLUME[0] * 0.5 - 3.0)


@pytest.mark.parametrize(
    ("unit", "zoom", "mpp"),
    [("mm", 0.5, 500.0), ("micron", 0.5, 0.5), ("meter", 1e-6, 1.0), (None, 0.5, None), ("mm", 3.0, None)],
)
def test_zooms_give_the_pixel_size_where_their_unit_is_known(
    tmp_path: Path, unit: str | None, zoom: float, mpp: float | None
) -> None:
    path = nifti(tmp_path / "a.nii", VOLUME.T, zooms=(zoom, 2 * zoom, 9.0), unit=unit)
    with open_source(path, z=0) as reader:
        assert reader.info.mpp == (None if mpp is None else pytest.approx((mpp, 2 * mpp)))
        assert reader.info.mpp_source == (None if mpp is None else "NIfTI pixdim")


def test_colours_and_complex_numbers_are_refused(tmp_path: Path) -> None:
    colours = np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name, values in (("a.nii", colours), ("b.nii", VOLUME.T.astype(np.complex64))):
        assert "pixels of type" in refusal(nifti(tmp_path / name, values), z=0)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [3, 100, -40])
def test_a_truncated_nifti_is_told(tmp_path: Path, suffix: str, kept: int) -> None:
    noise = np.random.default_rng(0).integers(0, 9999, (40, 30, 20)).astype(np.int16)
    path = nifti(tmp_path / f"a{suffix}", noise)
    path.write_bytes(path.read_bytes()[:kept])
    refusal(path, z=19)


def test_a_nifti_under_the_wrong_ending_is_told(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", VOLUME.T)
    packed = path.rename(tmp_path / "b.nii.gz")  # which is not packed
    refusal(packed, z=0)


# both


@pytest.fixture(params=["a.mrc", "a.nii"])
def volume(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / request.param
    return mrc(path) if path.suffix == ".mrc" else nifti(path, VOLUME.T)


def test_several_planes_ask_for_z(volume: Path) -> None:
    assert "holds 4 planes along z; pass --z N with N from 0 to 3" in refusal(volume)
    assert "no plane 4 along z" in refusal(volume, z=4)
    assert "leave --t out" in refusal(volume, z=0, t=1)
    with pytest.raises(UsageError, match="--mpp"):
        open_source(volume, z=0, mpp=0.0)


def test_values_that_are_no_numbers_come_as_they_are(volume: Path) -> None:
    values = VOLUME.astype(np.float32)
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    path = volume.with_stem("b")
    if path.suffix == ".mrc":
        with pytest.warns(RuntimeWarning, match="NaN"):  # of mrcfile, which measures what it writes
            mrc(path, values)
    else:
        nifti(path, values.T)
    np.testing.assert_array_equal(pixels_of(path, z=0)[:, :, 0], values[0])


@pytest.mark.parametrize("ask", [count_planes, lambda path: open_source(path, z=0)])
def test_a_missing_package_names_the_extra(volume: Path, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    monkeypatch.setitem(sys.modules, "mrcfile", None)
    with pytest.raises(InputError, match=r"run pip install 'darcnn\[volumes\]'"):
        ask(volume)


def test_a_real_tomogram_is_read(shared: Path) -> None:
    volumes = sorted((shared / "data" / "tomograms" / "train" / "volumes").glob("*.mrc"))
    if not volumes:
        pytest.skip("no tomograms in the folder `shared` beside the checkout")
    assert count_planes(volumes[0]) == Planes(n_z=64)
    with open_source(volumes[0], z=31) as reader:
        assert reader.info.mpp == pytest.approx((0.001, 0.001))
        plane = reader.read(Region(0, 0, 288, 288), level=0)
    with mrcfile.open(volumes[0]) as file:
        np.testing.assert_array_equal(plane[:, :, 0], file.data[31])
    assert plane.std() > 1


def test_volumes_in_a_folder_are_found_and_named_without_their_endings(tmp_path: Path) -> None:
    mrc(tmp_path / "a.rec")
    nifti(tmp_path / "b.nii.gz", VOLUME.T)
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"no volume"))
    (tmp_path / "d.mrc.gz").write_bytes(gzip.compress((tmp_path / "a.rec").read_bytes()))
    found = list_slides([str(tmp_path)])
    assert [path.name for path in found] == ["a.rec", "b.nii.gz", "d.mrc.gz"]
    assert [make_slide_name(path) for path in found] == ["a", "b", "d"]
    nifti(tmp_path / "a.nii.gz", VOLUME.T)
    with pytest.raises(UsageError, match="would both be written"):
        list_slides([str(tmp_path)])
