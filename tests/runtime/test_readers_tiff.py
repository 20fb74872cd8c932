"""TIFF in all its kinds: axes, pyramids, colours, pixel sizes, and damage."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers import Planes, count_planes, open_source, tiff_pages
from darcnn.runtime.readers.open import list_images
from darcnn.runtime.readers.tiff import TiffReader
from darcnn.runtime.readers.tiff_metadata import lay_out, ome_facts, tag_pixel_size
from darcnn.runtime.slide_list import list_slides
from darcnn.runtime.volumes.open import open_volume


def noise(*shape: int, dtype: Any = np.uint16) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 250).astype(dtype)


def write(path: Path, values: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, values, **options)
    return path


def whole(reader: TiffReader, level: int = 0) -> np.ndarray:
    extent = reader.info.levels[level]
    return reader.read(Region(0, 0, extent.width_px, extent.height_px), level=level)


def read(path: Path, **options: Any) -> np.ndarray:
    with TiffReader(path, **options) as reader:
        return whole(reader)


# -- axes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["TCZYX", "TZCYX", "ZTCYX", "CTZYX", "CZTYX", "ZCTYX"])
@pytest.mark.parametrize("storage", [{}, {"tile": (16, 16), "compression": "zlib"}])
def test_ome_planes_are_found_in_any_order_of_axes(
    tmp_path: Path, axes: str, storage: dict[str, Any]
) -> None:
    sizes = {"T": 2, "C": 3, "Z": 4, "Y": 20, "X": 30}
    values = noise(*(sizes[axis] for axis in axes))
    path = write(tmp_path / "a.ome.tif", values, metadata={"axes": axes}, **storage)
    plane = np.moveaxis(values, [axes.index("T"), axes.index("Z"), axes.index("C")], [0, 1, 2])[1, 2]
    np.testing.assert_array_equal(read(path, z=2, t=1), np.moveaxis(plane, 0, 2))


@pytest.mark.parametrize("kind", ["contiguous", "pages"])
def test_imagej_hyperstacks_have_channels(tmp_path: Path, kind: str) -> None:
    values = noise(2, 3, 2, 20, 30)  # T Z C Y X
    compression = "zlib" if kind == "pages" else None
    options: dict[str, Any] = {"imagej": True, "metadata": {"axes": "TZCYX"}, "compression": compression}
    path = write(tmp_path / "a.tif", values, **options)
    np.testing.assert_array_equal(read(path, z=2, t=1), np.moveaxis(values[1, 2], 0, 2))


def test_pages_without_a_name_are_planes_along_z(tmp_path: Path) -> None:
    values = noise(5, 20, 30)
    path = write(tmp_path / "a.tif", values, metadata=None)
    np.testing.assert_array_equal(read(path, z=4)[:, :, 0], values[4])


def test_planes_one_after_another_are_those_of_readers_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = noise(3, 4, 30, 40)
    path = write(tmp_path / "a.ome.tif", values, metadata={"axes": "TZYX"}, compression="zlib")
    places = [(z, t) for t in range(3) for z in (3, 0)]
    alone = [read(path, z=z, t=t) for z, t in places]
    opened: list[Path] = []
    file = tifffile.TiffFile
    monkeypatch.setattr(tifffile, "TiffFile", lambda path: opened.append(path) or file(path))
    together = [whole(reader) for reader in TiffReader.read_planes(path, places)]
    assert opened == [path]
    assert np.array_equal(together, alone)
    assert np.array_equal(together[3][:, :, 0], values[1, 0])
    with pytest.raises(InputError, match=r"a\.ome\.tif"):
        next(TiffReader.read_planes(path, [(4, 0)]))


def test_a_volume_inside_one_page_is_a_stack(tmp_path: Path) -> None:
    values = noise(32, 32, 48)
    path = write(tmp_path / "a.tif", values, volumetric=True, tile=(16, 16, 16), compression="zlib")
    np.testing.assert_array_equal(read(path, z=19)[:, :, 0], values[19])


@pytest.mark.parametrize(("axes", "option"), [("ZYX", "--z"), ("TYX", "--t")])
def test_a_stack_without_a_choice_names_the_option_and_its_range(
    tmp_path: Path, axes: str, option: str
) -> None:
    path = write(tmp_path / "a.ome.tif", noise(5, 20, 30), metadata={"axes": axes})
    with pytest.raises(InputError, match=f"holds 5 .*; pass {option} N with N from 0 to 4"):
        TiffReader(path)
    for wrong in (-1, 5):
        with pytest.raises(InputError, match=f"no plane {wrong} .* from 0 to 4"):
            TiffReader(path, **{option[2:]: wrong})


def test_pages_that_are_no_planes_of_the_series_are_no_image() -> None:
    assert lay_out("YX", (8, 9), "YX", (9, 8)) is None
    assert lay_out("X", (9,), "YX", (1, 9)) is None
    assert lay_out("CYX", (0, 8, 9), "YX", (8, 9)) is None


# -- pyramids -----------------------------------------------------------------------------------------


def test_pages_that_halve_are_levels(tmp_path: Path) -> None:
    path, values = tmp_path / "a.tif", noise(101, 75, 3, dtype=np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2, 4):
            level = values[::step, ::step]
            tiff.write(level, photometric="rgb", subfiletype=int(step > 1), metadata=None, tile=(16, 16))
    with TiffReader(path) as reader:
        assert [level.downsample for level in reader.info.levels] == [1, 2, 4]
        for index, step in enumerate((1, 2, 4)):
            np.testing.assert_array_equal(whole(reader, index), values[::step, ::step])


def test_subifds_of_a_stack_are_levels_of_each_plane(tmp_path: Path) -> None:
    path, values = tmp_path / "a.ome.tif", noise(3, 64, 96)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(values, subifds=2, metadata={"axes": "ZYX"}, tile=(16, 16))
        for step in (2, 4):
            tiff.write(values[:, ::step, ::step], subfiletype=1, tile=(16, 16))
    with TiffReader(path, z=2) as reader:
        for index, step in enumerate((1, 2, 4)):
            np.testing.assert_array_equal(whole(reader, index)[:, :, 0], values[2, ::step, ::step])


# -- types and colours --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "delivered"),
    [
        ("u1", "u1"),
        ("u2", "u2"),
        ("f4", "f4"),
        ("u4", "f4"),
        ("i1", "f4"),
        ("i2", "f4"),
        ("f2", "f4"),
        ("f8", "f4"),
    ],
)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_types_become_the_three_of_the_runtime(
    tmp_path: Path, dtype: str, delivered: str, byteorder: str
) -> None:
    values = noise(20, 30).astype(dtype)
    path = write(tmp_path / "a.tif", values, byteorder=byteorder)
    with TiffReader(path) as reader:
        pixels = whole(reader)
        assert pixels.dtype == reader.info.dtype == np.dtype(delivered)
        assert pixels.dtype.isnative
        np.testing.assert_array_equal(pixels[:, :, 0], values)


def test_bits_are_black_and_white(tmp_path: Path) -> None:
    values = noise(20, 30) > 100
    pixels = read(write(tmp_path / "a.tif", values, photometric="minisblack"))
    np.testing.assert_array_equal(pixels[:, :, 0], np.where(values, 255, 0))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("alpha", ["", "unassalpha", "unspecified"])
def test_rgb_is_told_by_the_photometric_tag_and_loses_alpha(tmp_path: Path, planar: str, alpha: str) -> None:
    values = noise(20, 30, 4 if alpha else 3, dtype=np.uint8)
    stored = values if planar == "contig" else np.moveaxis(values, 2, 0)
    extra: dict[str, Any] = {"extrasamples": [alpha]} if alpha else {}
    path = write(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, **extra)
    with TiffReader(path) as reader:
        assert reader.info.is_rgb
        assert reader.info.channel_names == ("red", "green", "blue")
        np.testing.assert_array_equal(whole(reader), values[:, :, :3])


@pytest.mark.filterwarnings("ignore:<tifffile.TiffWriter.write>:DeprecationWarning")
@pytest.mark.parametrize(
    ("n_values", "dtype", "axes", "is_rgb"),
    [
        (3, np.uint8, None, True),
        (4, np.uint8, None, True),
        (3, np.uint16, None, False),
        (4, np.uint16, None, False),
        (4, np.float32, None, False),
        (3, np.uint16, "SYX", True),
        (3, np.uint8, "CYX", False),
    ],
)
def test_an_array_of_planes_is_colours_in_eight_bits_or_if_its_axes_say_so(
    tmp_path: Path, n_values: int, dtype: Any, axes: str | None, is_rgb: bool
) -> None:
    values = noise(n_values, 20, 30, dtype=dtype)
    path = write(tmp_path / "a.tif", values, metadata={"axes": axes} if axes else {})
    n_channels = 3 if is_rgb else n_values
    with TiffReader(path) as reader:
        assert (reader.info.is_rgb, len(reader.info.channel_names)) == (is_rgb, n_channels)
        assert bool(reader.info.doubts) == (not is_rgb and axes is None)
        np.testing.assert_array_equal(whole(reader), np.moveaxis(values[:n_channels], 0, 2))


def test_colours_with_more_than_alpha_are_channels(tmp_path: Path) -> None:
    for n_values, dtype in ((6, np.uint8), (4, np.uint16)):
        values = noise(20, 30, n_values, dtype=dtype)
        extra: dict[str, Any] = {"extrasamples": ["unspecified"] * (n_values - 3)}
        path = write(tmp_path / "a.tif", values, photometric="rgb", planarconfig="contig", **extra)
        with TiffReader(path) as reader:
            assert (reader.info.is_rgb, len(reader.info.channel_names)) == (False, n_values)


def test_three_grey_samples_are_channels_not_colours(tmp_path: Path) -> None:
    values = noise(20, 30, 3, dtype=np.uint8)
    path = write(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    with TiffReader(path) as reader:
        assert not reader.info.is_rgb
        assert reader.info.channel_names == ("channel_0", "channel_1", "channel_2")
        np.testing.assert_array_equal(whole(reader), values)


def test_grey_loses_its_alpha(tmp_path: Path) -> None:
    values = noise(20, 30, 2, dtype=np.uint8)
    options: dict[str, Any] = {"planarconfig": "contig", "extrasamples": ["unassalpha"]}
    path = write(tmp_path / "a.tif", values, photometric="minisblack", **options)
    np.testing.assert_array_equal(read(path), values[:, :, :1])


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    values, table = noise(20, 30, dtype=np.uint8), noise(3, 256) * 257
    path = write(tmp_path / "a.tif", values, photometric="palette", colormap=table)
    with TiffReader(path) as reader:
        assert reader.info.is_rgb
        np.testing.assert_array_equal(whole(reader), (table >> 8).T.astype(np.uint8)[values])


def test_white_is_zero_is_turned_round(tmp_path: Path) -> None:
    values = noise(20, 30, dtype=np.uint8)
    path = write(tmp_path / "a.tif", values, photometric="miniswhite")
    np.testing.assert_array_equal(read(path)[:, :, 0], 255 - values)


def test_jpeg_tiles_come_out_as_rgb(tmp_path: Path) -> None:
    values = np.full((48, 64, 3), (200, 40, 90), np.uint8)
    options: dict[str, Any] = {"tile": (16, 16), "compression": "jpeg", "photometric": "rgb"}
    pixels = read(write(tmp_path / "a.tif", values, **options))
    assert np.abs(pixels.astype(int) - values).max() <= 4


def test_cmyk_and_complex_numbers_are_refused(tmp_path: Path) -> None:
    cmyk = write(tmp_path / "cmyk.tif", noise(20, 30, 4, dtype=np.uint8), photometric="separated")
    with pytest.raises(InputError, match="SEPARATED"):
        TiffReader(cmyk)
    with pytest.raises(InputError, match="complex64"):
        TiffReader(write(tmp_path / "complex.tif", np.zeros((20, 30), np.complex64)))


# -- pixel size and names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "value", "mpp"),
    [("µm", 0.5, 0.5), ("nm", 250.0, 0.25), ("mm", 0.001, 1.0), ("pixel", 1.0, None), ("µm", 0.0, None)],
)
def test_ome_pixel_sizes_have_units(tmp_path: Path, unit: str, value: float, mpp: float | None) -> None:
    size = {f"PhysicalSize{axis}": value for axis in "XYZ"}
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XYZ"}
    path = write(tmp_path / "a.ome.tif", noise(2, 20, 30), metadata={"axes": "ZYX", **size, **units})
    assert count_planes(path).section_um == (None if mpp is None else pytest.approx(mpp))
    with TiffReader(path, z=0) as reader:
        assert reader.info.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))
        assert reader.info.mpp_source == (None if mpp is None else "OME PhysicalSizeX")


def test_ome_channels_have_names(tmp_path: Path) -> None:
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP"]}}
    with TiffReader(write(tmp_path / "a.ome.tif", noise(2, 20, 30), metadata=metadata)) as reader:
        assert reader.info.channel_names == ("DAPI", "GFP")
        assert reader.info.name == "a"


def test_broken_or_empty_ome_xml_says_nothing() -> None:
    assert ome_facts("<OME") == (None, ())
    assert ome_facts("<OME/>") == (None, ())


@pytest.mark.parametrize(("unit", "um"), [("micron", 1), ("um", 1), ("\\u00B5m", 1), ("nm", 1e-3)])
def test_imagej_pixel_sizes_have_units(tmp_path: Path, unit: str, um: float) -> None:
    told = {"unit": unit, "spacing": 3.0, "axes": "ZYX"}
    path = write(tmp_path / "a.tif", noise(2, 20, 30), imagej=True, resolution=(4.0, 2.0), metadata=told)
    assert count_planes(path).section_um == pytest.approx(3 * um)
    with TiffReader(path, z=0) as reader:
        assert reader.info.mpp == pytest.approx((0.25 * um, 0.5 * um))
        assert reader.info.mpp_source == "ImageJ unit"


def test_a_resolution_in_centimetres_of_a_microscope_is_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(20, 30), resolution=(40000, 20000), resolutionunit="centimeter")
    with TiffReader(path) as reader:
        assert (reader.info.mpp, reader.info.mpp_source) == ((0.25, 0.5), "TIFF XResolution")


@pytest.mark.parametrize(
    ("unit", "mpp"),
    [("µm", 0.25), ("μm", 0.25), ("nm", 0.00025), ("Å", 0.000025), ("Angstrom", 0.000025), ("furlong", None)],
)
def test_imagej_units_are_lengths(unit: str, mpp: float | None) -> None:
    size = tag_pixel_size((4.0, 4.0), unit=1, imagej={"unit": unit})
    assert (size and size.mpp) == (None if mpp is None else pytest.approx((mpp, mpp)))


@pytest.mark.parametrize(("unit", "um"), [("millimeter", 1e3), ("micrometer", 1.0)])
def test_resolutions_in_millimetres_and_micrometres_are_believed(
    tmp_path: Path, unit: str, um: float
) -> None:
    path = write(tmp_path / "a.tif", noise(20, 30), resolution=(2.0, 2.0), resolutionunit=unit)
    with TiffReader(path) as reader:
        assert reader.info.mpp == (um / 2, um / 2)


@pytest.mark.parametrize("unit", [1, 2, 3])
@pytest.mark.parametrize("resolution", [0.0, 1.0, 72.0, 96.0, 300.0, 1200.0 / 2.54])
def test_resolutions_of_prints_and_defaults_are_not(unit: int, resolution: float) -> None:
    assert tag_pixel_size((resolution, resolution), unit=unit, imagej=None) is None


def test_a_file_that_says_nothing_has_no_pixel_size(tmp_path: Path) -> None:
    with TiffReader(write(tmp_path / "a.tif", noise(20, 30))) as reader:
        assert (reader.info.mpp, reader.info.mpp_source) == (None, None)


# -- reading only what is needed ----------------------------------------------------------------------


def test_only_the_tiles_under_a_region_are_read(tmp_path: Path) -> None:
    values = noise(64, 64, dtype=np.uint8)
    path = write(tmp_path / "a.tif", values, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        spoilt = [i for i in range(16) if i not in (5, 6)]  # second row, middle columns
        ranges = [(page.dataoffsets[i], page.databytecounts[i]) for i in spoilt]
    content = bytearray(path.read_bytes())
    for start, n in ranges:
        content[start : start + n] = bytes(n)
    path.write_bytes(content)
    with TiffReader(path) as reader:
        np.testing.assert_array_equal(
            reader.read(Region(16, 16, 48, 32), level=0)[:, :, 0], values[16:32, 16:48]
        )
        with pytest.raises(InputError, match=r"a\.tif: cannot be decoded near x 48, y 16"):
            reader.read(Region(16, 16, 49, 32), level=0)


def test_the_cache_of_segments_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_pages, "_CACHE_BYTES", 600)
    monkeypatch.setattr(tiff_pages, "_KEPT", 1)
    values = noise(64, 64, dtype=np.uint8)
    path = write(tmp_path / "a.tif", values, tile=(16, 16), compression="zlib")
    with TiffReader(path) as reader:
        for _ in range(2):
            np.testing.assert_array_equal(whole(reader)[:, :, 0], values)
        assert sum(tile.nbytes for tile in reader._files._cache.values()) <= 600


def test_a_slide_read_from_the_top_down_is_decoded_once_and_what_lies_far_above_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    remember = tiff_pages.PageFiles._remember
    monkeypatch.setattr(
        tiff_pages.PageFiles, "_remember", lambda *args: (remember(*args), kept.append(len(args[0]._cache)))
    )
    values = noise(320, 64, dtype=np.uint8)
    path = write(tmp_path / "a.tif", values, tile=(16, 16), compression="zlib")
    with TiffReader(path) as reader:
        for y in range(0, 320 - 32 + 1, 24):  # rows of tiles of 32 px that overlap by 8
            for x in (0, 24, 32):
                region = Region(x, y, x + 32, y + 32)
                seen = reader.read(region, level=0)[:, :, 0]
                np.testing.assert_array_equal(seen, values[y : y + 32, x : x + 32])
    assert len(kept) == 20 * 4  # each of the segments was decoded once
    assert max(kept) <= 5 * 4  # those under a row of tiles, and as many above


def test_tiles_that_were_left_out_are_empty(tmp_path: Path) -> None:
    tiles = (tile for tile in [np.ones((16, 16), np.uint8), None, None, np.full((16, 16), 3, np.uint8)])
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tiles, shape=(32, 32), dtype=np.uint8, tile=(16, 16), compression="zlib")
    pixels = read(path)[:, :, 0]
    assert [pixels[y, x] for y in (0, 20) for x in (0, 20)] == [1, 0, 0, 3]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tile_at_offset_0_was_left_out(tmp_path: Path, compression: str | None) -> None:
    path = write(tmp_path / "a.tif", noise(32, 32), tile=(16, 16), compression=compression)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        offsets = list(tiff.pages.first.dataoffsets)
        tiff.pages.first.tags["TileOffsets"].overwrite([*offsets[:3], 0])
    expected = noise(32, 32)
    expected[16:, 16:] = 0
    np.testing.assert_array_equal(read(path)[:, :, 0], expected)


# -- damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [{}, {"compression": "zlib", "rowsperstrip": 5}, {"tile": (16, 16)}])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_told_when_opened(tmp_path: Path, storage: dict[str, Any], kept: float) -> None:
    path = write(tmp_path / "a.tif", noise(64, 64), **storage)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match=r"a\.tif: .*copy") as caught:
        TiffReader(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_open_is_told_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(64, 64))
    with TiffReader(path) as reader:
        with path.open("r+b") as stream:
            stream.truncate(1000)
        with pytest.raises(InputError, match="ends before its last pixel"):
            whole(reader)


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    options: dict[str, Any] = {"tile": (16, 16), "compression": "zlib", "photometric": "rgb"}
    path = write(tmp_path / "a.tif", noise(40, 50, 3, dtype=np.uint8), **options)
    sound = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(200):
        flipped = sound.copy()
        flipped[random.integers(4, min(len(sound), 600), 3)] = random.integers(0, 256, 3)
        path.write_bytes(flipped.tobytes())
        try:
            with TiffReader(path, z=0) as reader:
                reader.read(Region(0, 0, 1, 1), level=0)
        except InputError as error:
            assert error.where == str(path)  # noqa: PT017


def test_a_palette_that_is_too_small_for_its_image_is_told(tmp_path: Path) -> None:
    table = np.zeros((3, 256), np.uint16)
    path = write(tmp_path / "a.tif", noise(4, 5, dtype=np.uint8), photometric="palette", colormap=table)
    entry = struct.pack("<HHI", 320, 3, 768)
    content = path.read_bytes()
    assert content.count(entry) == 1
    for count in (766, 30, 0):
        path.write_bytes(content.replace(entry, struct.pack("<HHI", 320, 3, count)))
        with pytest.raises(InputError, match=r"palette|cannot be read"):
            read(path)


def test_offsets_that_are_no_integers_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(20, 30))
    content = path.read_bytes()
    found = re.search(struct.pack("<H", 273) + rb"[\x03\x04]\0" + struct.pack("<I", 1), content)
    assert found is not None
    damaged = bytearray(content)
    struct.pack_into("<H", damaged, found.start() + 2, 11)  # a float
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="cannot be read as a TIFF"):
        read(path)


def test_samples_by_the_ten_thousand_are_told(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tif", noise(3, 4, 5000, dtype=np.uint8), photometric="rgb", planarconfig="contig"
    )
    with pytest.raises(InputError, match="holds 5000 channels"):
        read(path)


def describe(folder: Path, axes: str, values: np.ndarray, tiff_data: str | None = None) -> bytes:
    """Return the OME-XML of `values`, which perhaps tells of other places where the planes lie."""
    whole_file = write(folder / "whole.ome.tif", values, metadata={"axes": axes})
    with tifffile.TiffFile(whole_file) as tiff:
        xml = tiff.ome_metadata
    assert xml is not None
    if tiff_data is None:
        return xml.encode()
    return (xml[: xml.index("<TiffData")] + tiff_data + xml[xml.index("</Pixels>") :]).encode()


def test_a_part_of_a_split_ome_tiff_that_is_missing_is_told(tmp_path: Path) -> None:
    values = noise(2, 20, 30)
    parts = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1">'
        f'<UUID FileName="{name}.ome.tif">urn:uuid:00000000-0000-0000-0000-00000000000{z}</UUID></TiffData>'
        for z, name in enumerate(("first", "second"))
    )
    description = describe(tmp_path, "ZYX", values, parts)
    for z, name in enumerate(("first", "second")):
        options: dict[str, Any] = {"description": description, "metadata": None}
        write(tmp_path / f"{name}.ome.tif", values[z], **options)
    first = tmp_path / "first.ome.tif"
    np.testing.assert_array_equal(read(first, z=1)[:, :, 0], values[1])
    alone = tmp_path / "alone"
    alone.mkdir()
    moved = Path(shutil.copy(first, alone))
    np.testing.assert_array_equal(read(moved, z=0)[:, :, 0], values[0])
    with pytest.raises(InputError, match="or lies in another file"):
        TiffReader(moved, z=1)


def write_stopped(path: Path, axes: str, shape: tuple[int, ...], n_written: int) -> np.ndarray:
    """Write the first pages of an OME-TIFF whose metadata announce all of `shape`; return its values."""
    values = noise(*shape)
    description = describe(path.parent, axes, values)
    pages = values.reshape(-1, *shape[-2:])[:n_written]
    write(path, pages, description=description, metadata=None, photometric="minisblack")
    return values


@pytest.mark.parametrize(
    ("axes", "shape", "n_written", "found"),
    [
        ("TYX", (5, 20, 30), 3, Planes(1, 3, n_lacking=2)),
        ("TYX", (5, 20, 30), 5, Planes(1, 5)),
        ("ZYX", (6, 20, 30), 4, Planes(4, 1, n_lacking=2)),
        ("TZYX", (4, 3, 20, 30), 8, Planes(3, 2, n_lacking=2)),  # the third has two of three planes
        ("TCYX", (4, 2, 20, 30), 5, Planes(1, 2, n_lacking=2)),  # the third lacks a channel
        ("TYX", (5, 20, 30), 1, Planes(1, 5)),  # no stack is left: --t 0 reads it
    ],
)
def test_an_acquisition_that_was_stopped_has_the_planes_that_were_written(
    tmp_path, axes, shape, n_written, found
):
    path = tmp_path / "stopped.ome.tif"
    values = write_stopped(path, axes, shape, n_written)
    assert count_planes(path) == found
    z, t = (n - 1 if n > 1 else None for n in (found.n_z, found.n_t))
    if n_written > 1:  # the last that counts can be read
        at = tuple({"T": t, "Z": z, "C": 0}[name] for name in axes[:-2])
        np.testing.assert_array_equal(read(path, z=z, t=t)[:, :, 0], values[at])


def test_a_stack_with_holes_was_not_stopped(tmp_path):
    values = noise(6, 20, 30)
    there = (0, 1, 2, 4)  # the camera missed one
    parts = "".join(f'<TiffData IFD="{n}" FirstT="{t}" PlaneCount="1"/>' for n, t in enumerate(there))
    path = tmp_path / "holes.ome.tif"
    description = describe(tmp_path, "TYX", values, parts)
    write(path, values[list(there)], description=description, metadata=None, photometric="minisblack")
    assert count_planes(path) == Planes(1, 6)


@pytest.mark.parametrize("name", ["first.ome.tif", "renamed.ome.tif"])
def test_where_another_file_of_the_image_is_not_there_all_planes_count(tmp_path, name):
    values = noise(5, 20, 30)
    parts = "".join(
        f'<TiffData IFD="{t % 2}" FirstT="{t}" PlaneCount="1">'
        f'<UUID FileName="{file}.ome.tif">urn:uuid:{t // 2}</UUID></TiffData>'
        for t, file in enumerate(("first", "first", "second", "second"))
    )
    description = describe(tmp_path, "TYX", values, parts)
    write(tmp_path / name, values[:2], description=description, metadata=None, photometric="minisblack")
    assert count_planes(tmp_path / name).n_lacking == 0


def scenes(path: Path) -> Path:
    """Write two scenes and a label, each of its own size and with its own facts."""
    with tifffile.TiffWriter(path) as file:
        for side, um in ((100, 0.5), (90, 0.25), (20, 2.0)):
            name = f"well {side}" if um < 1 else "label image"
            facts = {
                "axes": "ZYX", "Name": name, "PhysicalSizeX": um, "PhysicalSizeY": um,
                "PhysicalSizeZ": 2 * um, "Channel": {"Name": f"dye {side}"},
            }  # fmt: skip
            file.write(np.full((3, side, 120), side, np.uint8), metadata=facts, photometric="minisblack")
    return path


def test_each_scene_has_a_place_and_its_own_facts_and_thumbnails_have_none(tmp_path):
    path = scenes(tmp_path / "a.ome.tif")
    assert list_images(path) == [path / "0", path / "1"]
    for number, side, um in ((0, 100, 0.5), (1, 90, 0.25)):
        place = path / str(number)
        assert count_planes(place) == Planes(3)
        assert count_planes(place).section_um == 2 * um
        with TiffReader(place, z=1) as reader:
            assert (reader.info.name, reader.info.image_name) == (f"a-{number}", f"well {side}")
            assert (reader.info.mpp, reader.info.channel_names) == ((um, um), (f"dye {side}",))
            assert reader.info.height_px0 == side
            assert (reader.read(reader.info.whole, level=0) == side).all()
        with open_volume(place, tmp_path) as volume:
            assert (volume.info.shape, volume.info.image_name) == ((3, side, 120), f"well {side}")
            assert (volume.read("z", 2) == side).all()
    with pytest.raises(InputError, match=r"holds 2 images; name one: .*a\.ome\.tif/0 to .*a\.ome\.tif/1"):
        open_source(path)


OME = 'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'


def write_files(folder: Path, images: dict[str, list[tuple[str, int, int]]]) -> None:
    """Write OME-TIFFs of series; of each image: the file, page there and value of each time point."""
    described = []
    for number, (name, planes) in enumerate(images.items()):
        places = "".join(
            f'<TiffData IFD="{page}" FirstT="{t}" PlaneCount="1">'
            f'<UUID FileName="{file}">urn:uuid:{file}</UUID></TiffData>'
            for t, (file, page, _) in enumerate(planes)
        )
        described.append(
            f'<Image ID="Image:{number}" Name="{name}"><Pixels ID="Pixels:{number}" DimensionOrder="XYZCT" '
            f'Type="uint16" SizeX="64" SizeY="48" SizeZ="1" SizeC="1" SizeT="{max(1, len(planes))}" '
            f'PhysicalSizeX="0.{number + 1}" PhysicalSizeY="0.{number + 1}">'
            f'<Channel ID="Channel:{number}:0" Name="dye {name}" SamplesPerPixel="1"/>'
            f"{places or '<MetadataOnly/>'}</Pixels></Image>"
        )
    pages = sorted(plane for planes in images.values() for plane in planes)
    for file in {file for file, _, _ in pages if not file.startswith("gone")}:
        with tifffile.TiffWriter(folder / file) as tiff:
            for name, page, value in pages:
                if name == file:
                    xml = (
                        f'<OME {OME} UUID="urn:uuid:{file}">{"".join(described)}</OME>' if page == 0 else None
                    )
                    options: dict[str, Any] = {"metadata": None, "contiguous": False}
                    tiff.write(np.full((48, 64), value, np.uint16), description=xml, **options)


@pytest.mark.parametrize("lacking", ["metadata only", "in a missing file"])
def test_an_image_that_is_not_there_gives_its_facts_to_no_other(tmp_path: Path, lacking: str) -> None:
    nowhere = [] if lacking == "metadata only" else [("gone.ome.tif", 0, 0)]
    images = {"a": [("x.ome.tif", 0, 7)], "b": nowhere, "c": [("x.ome.tif", 1, 9)]}
    write_files(tmp_path, images)
    places = list_images(tmp_path / "x.ome.tif")
    assert len(places) == 2
    for place, name, um, value in zip(places, "ac", (0.1, 0.3), (7, 9), strict=True):
        with TiffReader(place) as reader:
            assert (reader.info.image_name, reader.info.channel_names) == (name, (f"dye {name}",))
            assert reader.info.mpp == (um, um)
            assert (reader.read(reader.info.whole, level=0) == value).all()


def test_an_image_in_two_files_belongs_to_the_one_that_it_begins_in(tmp_path: Path) -> None:
    first, second = "m.ome.tif", "m_1.ome.tif"
    images = {
        "a": [(first, 0, 1), (first, 1, 2)],
        "b": [(first, 2, 3), (second, 0, 4)],
        "c": [(second, 1, 5), (second, 2, 6)],
    }
    write_files(tmp_path, images)
    slides = list_slides([str(tmp_path)])
    assert slides == (tmp_path / first / "0", tmp_path / first / "1", tmp_path / second)
    for slide, (name, planes) in zip(slides, images.items(), strict=True):
        assert count_planes(slide).n_t == 2
        for t, (_, _, value) in enumerate(planes):
            with open_source(slide, t=t) as reader:
                assert reader.info.channel_names == (f"dye {name}",)
                assert (reader.read(reader.info.whole, level=0) == value).all()


def test_a_file_that_only_goes_on_is_no_image_of_its_own(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": [("m.ome.tif", 0, 1), ("m_1.ome.tif", 0, 2)]})
    only = f'<OME {OME}><BinaryOnly MetadataFile="m.ome.tif" UUID="urn:uuid:m.ome.tif"/></OME>'
    with tifffile.TiffWriter(tmp_path / "m_1.ome.tif") as file:  # as the specification allows it
        file.write(np.full((48, 64), 2, np.uint16), description=only, metadata=None)
    assert list_slides([str(tmp_path)]) == (tmp_path / "m.ome.tif",)
    for t in range(2):
        assert (read(tmp_path / "m.ome.tif", t=t) == t + 1).all()


def test_a_snap_beside_a_stack_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(noise(9, 40, 50), metadata={"axes": "ZYX"}, photometric="minisblack")
        file.write(noise(40, 50), metadata={"axes": "YX"}, photometric="minisblack")
    assert list_images(path) == [path / "0", path / "1"]


def test_an_image_of_other_sizes_gives_its_facts_to_no_other(tmp_path: Path) -> None:
    sizes = (("same", 64, 64), ("same", 64, 48))  # the first is not there
    images = "".join(
        f'<Image ID="Image:{n}" Name="{name}"><Pixels ID="Pixels:{n}" DimensionOrder="XYZCT" Type="uint16" '
        f'SizeX="{width}" SizeY="{height}" SizeZ="1" SizeC="1" SizeT="1" PhysicalSizeX="0.{n + 1}" '
        f'PhysicalSizeY="0.{n + 1}"><Channel ID="Channel:{n}:0" SamplesPerPixel="1"/>'
        + ("<MetadataOnly/>" if n == 0 else '<TiffData IFD="0" PlaneCount="1"/>')
        + "</Pixels></Image>"
        for n, (name, width, height) in enumerate(sizes)
    )
    path = write(
        tmp_path / "a.ome.tif", noise(48, 64), description=f"<OME {OME}>{images}</OME>", metadata=None
    )
    with TiffReader(path) as reader:
        assert reader.info.mpp == (0.2, 0.2)


def test_files_of_other_images_are_not_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"p{number}.ome.tif" for number in range(4)]
    write_files(tmp_path, {name: [(name, 0, number)] for number, name in enumerate(names)})
    for name in names[:2] + names[3:]:
        (tmp_path / name).unlink()
    path = tmp_path / names[2]
    assert list_images(path) == [path]
    with TiffReader(path) as reader:
        assert (reader.info.channel_names, reader.info.mpp) == ((f"dye {names[2]}",), (0.3, 0.3))
        assert (reader.read(reader.info.whole, level=0) == 2).all()
    assert count_planes(path) == Planes()
    assert not caplog.records  # tifffile tells what it could not open


@pytest.mark.parametrize("sides", [(64, 32, 16), (16, 32, 64)])
def test_small_images_that_ome_describes_are_images(tmp_path: Path, sides: tuple[int, ...]) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path) as file:
        for side in sides:
            file.write(noise(side, side), metadata={"axes": "YX", "Name": f"Position {side}"})
    assert list_images(path) == [path / str(number) for number in range(3)]


def test_small_images_that_nothing_describes_are_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(noise(64, 60), metadata=None)
        file.write(noise(28, 50), metadata=None, subfiletype=1)
        file.write(noise(16, 20), metadata=None)
    with TiffReader(path) as reader:
        assert reader.info.height_px0 == 64
        assert len(reader.info.doubts) == 1
        assert reader.info.doubts[0].endswith("left out (20 x 16 px)")


@pytest.mark.parametrize(("kind", "dtype"), [(1, np.uint8), (4, bool)])
def test_reduced_images_and_masks_are_no_images(tmp_path: Path, kind: int, dtype: Any) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(np.zeros((800, 800), np.uint8), metadata=None)
        file.write(np.ones((700, 600), dtype), metadata=None, subfiletype=kind)
    assert list_images(path) == [path]
    with TiffReader(path) as reader:
        assert reader.info.height_px0 == 800


@pytest.mark.parametrize("name", ["a.svs", "a.qptiff", "a.scn"])
def test_other_endings_of_tiff_hold_several_images_too(tmp_path: Path, name: str) -> None:
    path = scenes(tmp_path / name)
    assert list_images(path) == [path / "0", path / "1"]
    with open_source(path / "1", z=0) as reader:
        assert reader.info.height_px0 == 90


def test_of_a_file_without_ending_the_first_image_is_read(tmp_path: Path) -> None:
    with open_source(scenes(tmp_path / "a"), z=0) as reader:
        assert reader.info.height_px0 == 100


def test_a_file_in_a_folder_that_is_called_like_an_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "dir.tif").mkdir()
    path = write(tmp_path / "dir.tif" / "3", noise(20, 30), photometric="minisblack")
    with open_source(path) as reader:
        assert (reader.info.name, reader.info.height_px0) == ("3", 20)


def test_a_single_image_is_its_own_place(tmp_path):
    path = tmp_path / "b.tif"
    tifffile.imwrite(path, np.zeros((40, 50), np.uint8))
    assert list_images(path) == [path]
    with TiffReader(path) as reader:
        assert (reader.info.name, reader.info.image_name) == ("b", None)
    with pytest.raises(InputError, match=r"b\.tif: has no image 1; name .*b\.tif$"):
        open_source(path / "1")


def test_channels_last_are_no_stack_of_rows(tmp_path):
    pixels = np.zeros((30, 40, 2), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, metadata={"axes": "YXC"}, photometric="minisblack")
    with pytest.raises(InputError, match="holds no image"):
        open_source(tmp_path / "a.tif")


def test_each_page_of_a_stack_has_its_own_palette(tmp_path):
    pages = []
    for colour in ((200, 10, 10), (10, 10, 200)):
        page = Image.new("P", (12, 8), 1)
        page.putpalette([0, 0, 0, *colour])
        pages.append(page)
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    seen = []
    for z in (0, 1):
        with open_source(tmp_path / "a.tif", z=z) as reader:
            seen.append(reader.read(Region(0, 0, 1, 1), level=0)[0, 0].tolist())
    assert seen == [[200, 10, 10], [10, 10, 200]]


@pytest.mark.parametrize("bits", [4, 12])
def test_white_is_zero_counts_down_from_the_white_of_its_bits(tmp_path, bits):
    kind = np.uint8 if bits <= 8 else np.uint16
    values = np.arange(8, dtype=kind).reshape(2, 4)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite", bitspersample=bits, metadata=None)
    with open_source(tmp_path / "a.tif") as reader:
        seen = reader.read(Region(0, 0, 4, 2), level=0)[:, :, 0]
    white = (1 << bits) - 1
    assert seen.tolist() == ((white - values.astype(int)) * (17 if bits == 4 else 1)).tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_reaches_from_black_to_white(tmp_path, bits):
    values = np.arange(1 << bits, dtype=np.uint8)[None]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", bitspersample=bits, metadata=None)
    assert read(tmp_path / "a.tif")[0, :, 0].tolist() == list(range(0, 256, 255 // values.max()))


def test_channels_of_qptiff_are_called_what_their_pages_say(tmp_path: Path) -> None:
    said = ("<Name>DAPI</Name>", "<Name>Opal 520</Name><Biomarker>CD8</Biomarker>", "")
    path = tmp_path / "a.qptiff"
    with tifffile.TiffWriter(path) as file:
        for names in said:
            one = f"<PerkinElmer-QPI-ImageDescription>{names}</PerkinElmer-QPI-ImageDescription>"
            file.write(noise(32, 32), description=one, software="PerkinElmer-QPI", metadata=None)
    with TiffReader(path) as reader:
        assert reader.info.channel_names == ("DAPI", "CD8", "channel_2")
