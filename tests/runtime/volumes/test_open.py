"""Every file of a volume gives the same numbers along every axis; what is wrong with it is one line."""

from __future__ import annotations

import bz2
import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.volumes import ome_zarr as unpacked_zarr
from darcnn.runtime.volumes.channels import read_channels
from darcnn.runtime.volumes.open import is_volume, open_volume
from darcnn.runtime.volumes.options import parse_voxel_size

mrcfile = pytest.importorskip("mrcfile", reason="volumes need the extra volumes")
nibabel = pytest.importorskip("nibabel", reason="volumes need the extra volumes")

VALUES = np.random.default_rng(0).integers(0, 120, (5, 14, 11)).astype(np.int16)


def write_mrc(path: Path, values: np.ndarray = VALUES, voxel: object = 10.0) -> Path:
    with mrcfile.new(path) as file:
        file.set_data(values)
        file.voxel_size = voxel
    return path


def big_endian(path: Path) -> Path:
    plain = write_mrc(path.with_name("little.mrc"))
    with mrcfile.open(plain) as file:
        header = file.header.byteswap().view(file.header.dtype.newbyteorder())
        header.machst[:] = (0x11, 0x11, 0, 0)
        path.write_bytes(header.tobytes() + VALUES.astype(">i2").tobytes())
    return path


def extended(path: Path) -> Path:
    write_mrc(path)
    with mrcfile.open(path, mode="r+") as file:
        file.set_extended_header(np.zeros(300, "V1"))
    return path


def packed(path: Path) -> Path:
    content = write_mrc(path.with_name("plain.mrc")).read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else bz2.compress(content))
    return path


def nifti(path: Path) -> Path:
    image = nibabel.Nifti1Image(VALUES.T, np.diag([0.001, 0.001, 0.001, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, path)
    return path


def ome_tiff(path: Path) -> Path:
    sizes = {f"PhysicalSize{axis}": 0.001 for axis in "XYZ"}
    tifffile.imwrite(path, VALUES.astype(np.uint16), metadata={"axes": "ZYX", **sizes})
    return path


def ome_zarr(path: Path, axes: str = "zyx", version: str = "0.5") -> Path:
    sizes = {"t": 1, "c": 1, "z": 5, "y": 14, "x": 11}
    described = [
        {"name": axis, "type": "space", **({"unit": "nanometer"} if axis in "zyx" else {})} for axis in axes
    ]
    scale = {"type": "scale", "scale": [1.0] * len(axes)}
    content = {
        "multiscales": [
            {"axes": described, "datasets": [{"path": "0", "coordinateTransformations": [scale]}]}
        ]
    }
    group = zarr.create_group(
        path,
        zarr_format=3 if version == "0.5" else 2,
        attributes={"ome": {"version": version, **content}} if version == "0.5" else content,
    )
    order = [one for one in axes if one in "zyx"]
    values = np.transpose(VALUES, ["zyx".index(one) for one in order])
    shape = tuple(sizes[one] for one in axes)
    array = group.create_array("0", shape=shape, dtype="uint16", chunks=tuple(min(4, n) for n in shape))
    array[:] = values.reshape(shape).astype(np.uint16)
    return path


def ome_zarr_turned(path: Path) -> Path:
    return ome_zarr(path, axes="tcxzy", version="0.4")


MAKERS: dict[str, Callable[[Path], Path]] = {
    "a.mrc": write_mrc,
    "a.rec": write_mrc,
    "big.mrc": big_endian,
    "extended.mrc": extended,
    "a.mrc.gz": packed,
    "a.map.bz2": packed,
    "a.nii": nifti,
    "a.nii.gz": nifti,
    "a.ome.tif": ome_tiff,
    "a.ome.zarr": ome_zarr,
    "b.zarr": ome_zarr_turned,
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    path, scratch = MAKERS[name](tmp_path / name), tmp_path / "scratch"
    scratch.mkdir()
    assert is_volume(path)
    with open_volume(path, scratch) as volume:
        assert volume.info.shape == VALUES.shape
        assert volume.info.voxel_nm == pytest.approx((1.0, 1.0, 1.0))
        for number, axis in enumerate(("z", "y", "x")):
            for index in (0, VALUES.shape[number] - 1):
                plane = volume.read(axis, index)  # type: ignore[arg-type]
                assert np.array_equal(plane, np.take(VALUES, index, axis=number))
                assert plane.dtype.isnative
    assert not list(scratch.iterdir())


def test_an_ome_zarr_behind_a_url_gives_the_same_numbers(
    served: tuple[Path, str, Callable[[], None]], tmp_path: Path
) -> None:
    folder, address, stop = served
    ome_zarr(folder / "a b.ome.zarr")
    url = f"{address}/a%20b.ome.zarr"
    assert is_volume(url)
    with open_volume(url, tmp_path) as volume:
        assert volume.info.voxel_nm == pytest.approx((1.0, 1.0, 1.0))
        stop()  # all of it is here by now
        assert np.array_equal(np.stack([volume.read("z", z) for z in range(5)]), VALUES)
    with pytest.raises(InputError, match="check the address and the network"):
        open_volume(url, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_a_url_that_vanishes_midway_is_one_line_and_leaves_nothing(
    served: tuple[Path, str, Callable[[], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address, stop = served
    ome_zarr(folder / "a.ome.zarr")
    monkeypatch.setattr(unpacked_zarr, "_BYTES", 1)  # one row of chunks at a time
    read = unpacked_zarr._read

    def read_then_stop(*args: Any) -> Any:
        values = read(*args)
        stop()
        return values

    monkeypatch.setattr(unpacked_zarr, "_read", read_then_stop)
    with pytest.raises(InputError, match=r"a\.ome\.zarr: cannot be read"):
        open_volume(f"{address}/a.ome.zarr", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_scaled_nifti_has_the_values_that_it_means(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES.T.astype(np.float32) * 0.5 + 3, np.eye(4))
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii")
    with open_volume(tmp_path / "a.nii", tmp_path) as volume:
        assert np.allclose(volume.read("z", 2), VALUES[2] * 0.5 + 3, atol=0.01)
        assert volume.info.dtype == np.float32


def test_a_series_of_planes_is_a_volume_along_t_and_one_moment_is_not(tmp_path: Path) -> None:
    path = tmp_path / "series.ome.tif"
    tifffile.imwrite(path, VALUES.astype(np.uint16), metadata={"axes": "TYX", "PhysicalSizeX": 0.2})
    assert is_volume(path)
    assert not is_volume(path, t=2)
    with open_volume(path, tmp_path) as volume:
        assert volume.info.shape == VALUES.shape
        assert volume.info.voxel_nm is None  # time points have no distance
    with open_volume(path, tmp_path, voxel_nm=(5.0, 400.0, 900.0)) as volume:
        assert volume.info.voxel_nm is None
        assert volume.info.pixel_nm("z") == pytest.approx(600.0)
        assert volume.info.label_grid.steps == (1.0, 0.4, 0.9)
        assert volume.info.label_grid.units == (None, "micrometer", "micrometer")


@pytest.mark.parametrize(
    ("name", "options", "seconds"),
    [
        ("a.ome.tif", {"metadata": {"TimeIncrement": 2.0, "TimeIncrementUnit": "min"}}, 120.0),
        ("b.ome.tif", {"metadata": {"TimeIncrement": 500.0, "TimeIncrementUnit": "ms"}}, 0.5),
        ("c.ome.tif", {"metadata": {"Plane": {"DeltaT": [0.5, 3.5, 7.5, 9.5], "TheT": [0, 1, 2, 3]}}}, 3.0),
        ("d.ome.tif", {"metadata": {"TimeIncrement": 0.0}}, None),
        ("e.ome.tif", {}, None),
        ("f.tif", {"imagej": True, "metadata": {"finterval": 30.0}}, 30.0),
        ("g.tif", {"imagej": True, "metadata": {"finterval": 5.0, "tunit": "min"}}, 300.0),
        ("h.tif", {"imagej": True}, None),
    ],
)
def test_the_interval_of_a_series_comes_from_its_file(
    tmp_path: Path, name: str, options: dict[str, Any], seconds: float | None
) -> None:
    planes = {**options.get("metadata", {}), "axes": "TYX"}
    if "Plane" in planes:
        planes["Plane"] |= {"TheZ": [0] * 4, "TheC": [0] * 4}
    tifffile.imwrite(tmp_path / name, VALUES[:4].astype(np.uint16), **{**options, "metadata": planes})
    with open_volume(tmp_path / name, tmp_path) as volume:
        assert volume.info.is_series
        assert volume.info.frame_interval_s == (seconds if seconds is None else pytest.approx(seconds))


def test_sections_that_are_told_to_be_time_points_keep_the_interval_of_their_file(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "finterval": 30.0}
    tifffile.imwrite(tmp_path / "s.tif", VALUES.astype(np.uint16), imagej=True, metadata=metadata)
    with open_volume(tmp_path / "s.tif", tmp_path, series=True) as volume:
        assert volume.info.frame_interval_s == 30.0
        assert volume.info.label_grid.steps[0] == 30.0


@pytest.mark.parametrize(("unit", "seconds"), [("minute", 90.0), ("second", 1.5), (None, None)])
def test_the_interval_of_a_series_in_ome_zarr(tmp_path: Path, unit: str | None, seconds: float) -> None:
    group = zarr.create_group(tmp_path / "s.zarr", zarr_format=2)
    group.create_array("0", data=VALUES.astype(np.uint16))
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    time = {"name": "t", "type": "time"} | ({} if unit is None else {"unit": unit})
    scale = {"type": "scale", "scale": [1.5, 0.5, 0.5]}
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": [time, *axes], "datasets": datasets}]
    with open_volume(tmp_path / "s.zarr", tmp_path) as volume:
        assert volume.info.frame_interval_s == seconds


def test_a_series_in_ome_zarr_is_a_volume_along_t_too(tmp_path: Path) -> None:
    for name, axes in (("a", "tcyx"), ("b", "czyxt")):
        values = VALUES.astype(np.uint16)  # t y x
        placed = values[:, None] if name == "a" else np.moveaxis(values, 0, -1)[None, None]
        write_stacks(tmp_path / f"{name}.zarr", axes, np.ascontiguousarray(placed))
        with open_volume(tmp_path / f"{name}.zarr", tmp_path) as volume:
            assert volume.info.is_series
            assert volume.info.voxel_nm is None
            np.testing.assert_array_equal(volume.read("z", 2), values[2])
        with open_volume(tmp_path / f"{name}.zarr", tmp_path, t=1) as volume:
            assert volume.info.shape == (1, *values.shape[1:])
            np.testing.assert_array_equal(volume.read("z", 0), values[1])


def write_stacks(path: Path, axes: str, values: np.ndarray) -> Path:
    """Write `values` in the order of `axes` (letters of tzcyx): OME-Zarr, or a TIFF by its ending."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, values, metadata={"axes": axes.upper()}, ome=True)
        return path
    group = zarr.create_group(path, zarr_format=2)
    group.create_array("0", data=values, chunks=(1,) * (values.ndim - 2) + values.shape[-2:])
    kinds = {"t": "time", "c": "channel"}
    told = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
    datasets = [{"path": "0", "coordinateTransformations": []}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": told, "datasets": datasets}]
    return path


@pytest.mark.parametrize("name", ["s.tif", "s.zarr"])
@pytest.mark.parametrize("axes", ["tzyx", "ztyx", "tzcyx", "tczyx"])
def test_stacks_at_several_time_points_become_a_series_of_their_brightest(
    tmp_path: Path, name: str, axes: str
) -> None:
    sizes = {"t": 3, "z": 4, "c": 2, "y": 20, "x": 24}
    values = np.random.default_rng(0).integers(0, 999, [sizes[axis] for axis in axes], np.uint16)
    path = write_stacks(tmp_path / name, axes, values)
    channel = 1 if "c" in axes else None
    ordered = np.moveaxis(values, [axes.index("t"), axes.index("z")], [0, 1])  # t z (c) y x
    brightest = ordered.max(axis=1)
    expected = brightest[:, channel] if channel else brightest
    with open_volume(path, tmp_path, channel=channel, projects=True) as volume:
        assert volume.info.is_series
        assert volume.info.shape == (3, 20, 24)
        for t in range(3):
            np.testing.assert_array_equal(volume.read("z", t), expected[t])
        channels = list(read_channels(volume.info))
    assert len(channels) == 3
    if channel:  # all are measured on their brightest
        np.testing.assert_array_equal(np.array(channels), np.moveaxis(brightest, 1, -1))
    with pytest.raises(InputError, match="holds 3 time points of 4 planes; pass --t N"):
        open_volume(path, tmp_path, channel=channel)
    with pytest.raises(UsageError, match="--project"):
        open_volume(path, tmp_path, channel=channel, t=1, projects=True)


def test_what_holds_no_stacks_at_several_time_points_is_not_projected(tmp_path: Path) -> None:
    for axes in ("zyx", "tyx"):
        path = write_stacks(tmp_path / f"{axes}.tif", axes, np.zeros((3, 20, 24), np.uint16))
        with pytest.raises(UsageError, match="--project"):
            open_volume(path, tmp_path, projects=True)
    with pytest.raises(UsageError, match="--project"):
        open_volume(write_mrc(tmp_path / "v.mrc"), tmp_path, projects=True)


def test_booleans_in_ome_zarr_are_black_and_white_as_in_an_image(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "m.zarr", zarr_format=2)
    group.create_array("0", data=VALUES.mean() < VALUES)
    axes = [{"name": axis, "type": "space"} for axis in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": []}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    with open_volume(tmp_path / "m.zarr", tmp_path) as volume:
        assert set(np.unique(volume.read("z", VALUES.shape[0] // 2))) <= {0, 255}
        assert volume.read("z", VALUES.shape[0] - 1).max() == 255


def test_a_time_point_of_a_packed_volume_leaves_nothing_behind(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "v.mrc", VALUES.astype(np.float32)):
        pass
    (tmp_path / "v.mrc.gz").write_bytes(gzip.compress((tmp_path / "v.mrc").read_bytes()))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(InputError, match="leave --t out"):
        open_volume(tmp_path / "v.mrc.gz", scratch, t=3)
    assert list(scratch.iterdir()) == []


def test_one_channel_of_several_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "two.ome.tif"
    both = np.stack([VALUES, 2 * VALUES], axis=1).astype(np.uint16)  # Z C Y X
    tifffile.imwrite(path, both, metadata={"axes": "ZCYX", "Channel": {"Name": ["DAPI", "GFP"]}})
    with open_volume(path, tmp_path, channel="GFP") as volume:
        assert np.array_equal(volume.read("z", 1), 2 * VALUES[1])
    with pytest.raises(InputError, match="--channel"):
        open_volume(path, tmp_path)
    with pytest.raises(UsageError, match="no channel RFP"):
        open_volume(path, tmp_path, channel="RFP")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["two.ome.tif"]


def test_a_default_voxel_size_is_not_believed_and_one_given_wins(tmp_path: Path) -> None:
    for voxel in (1.0, 0.0):
        with open_volume(write_mrc(tmp_path / f"{voxel}.mrc", voxel=voxel), tmp_path) as volume:
            assert volume.info.voxel_nm is None
    with open_volume(tmp_path / "1.0.mrc", tmp_path, voxel_nm=(3.0, 2.0, 2.0)) as volume:
        assert (volume.info.voxel_nm, volume.info.voxel_source) == ((3.0, 2.0, 2.0), "--voxel-size")
    with open_volume(write_mrc(tmp_path / "thick.mrc", voxel=(5, 5, 20)), tmp_path) as volume:
        assert volume.info.voxel_nm == pytest.approx((2.0, 0.5, 0.5))


def truncated(path: Path) -> None:
    path.write_bytes(write_mrc(path).read_bytes()[:-30])


def of_several_volumes(path: Path) -> None:
    with mrcfile.new(path) as file:
        file.set_data(np.zeros((2, 3, 4, 5), np.float32))


def complex_numbers(path: Path) -> None:
    with mrcfile.new(path) as file:
        file.set_data(np.zeros((2, 4, 5), np.complex64))


def larger_than_the_file(path: Path) -> None:
    content = bytearray(write_mrc(path).read_bytes())
    struct.pack_into("<3i", content, 0, 40000, 40000, 2000)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "truncated"),
        (of_several_volumes, "2 volumes"),
        (complex_numbers, "complex"),
        (larger_than_the_file, "truncated"),
    ],
)
def test_a_volume_that_does_not_serve_is_one_line(
    make: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.mrc"
    make(path)
    with pytest.raises(InputError, match=words) as caught:
        open_volume(path, tmp_path)
    assert str(path) in str(caught.value)


def test_what_is_wrong_inside_a_packed_file_is_said_of_that_file(tmp_path: Path) -> None:
    inner = write_mrc(tmp_path / "v.mrc")
    content = bytearray(inner.read_bytes())
    struct.pack_into("<i", content, 12, 4)  # complex numbers
    path = tmp_path / "v.mrc.gz"
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(InputError, match="complex") as caught:
        open_volume(path, tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["a.mrc.gz", "a.map.bz2", "a.nii.gz"])
def test_a_packed_file_that_ends_early_is_one_line_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    path, scratch = MAKERS[name](tmp_path / name), tmp_path / "scratch"
    scratch.mkdir()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError):
        open_volume(path, scratch)
    assert not list(scratch.iterdir())


def test_bytes_of_imod_are_read_with_the_sign_that_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "bytes.mrc"
    with mrcfile.new(path) as file:
        file.set_data(np.full((3, 4, 5), -56, np.int8))
    with open_volume(path, tmp_path) as volume:
        assert volume.read("z", 0)[0, 0] == -56
    content = bytearray(path.read_bytes())
    struct.pack_into("<2i", content, 152, 1146047817, 0)  # IMOD's stamp, bytes without a sign
    path.write_bytes(content)
    with open_volume(path, tmp_path) as volume:
        assert volume.read("z", 0)[0, 0] == 200


@pytest.mark.parametrize("text", ["", "0", "-1", "1,2", "nan", "1 parsec", "a,b,c"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--voxel-size"):
        parse_voxel_size(text)
