"""ND2, LIF, CZI and IMS: each image at a place of its own, planes and channels as the file has them."""

from __future__ import annotations

import lzma
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from darcnn.runtime.errors import DamagedPixelsError, InputError, UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers import count_planes, open_source
from darcnn.runtime.readers.nd2 import _Nd2File as Nd2File
from darcnn.runtime.readers.open import list_images
from darcnn.runtime.record import fingerprint_file
from darcnn.runtime.slide_list import list_slides, place_results
from darcnn.runtime.volumes.open import open_volume
from tests.runtime.lif_files import Image, write_lif

nd2 = pytest.importorskip("nd2", reason="the extra `microscopes` is not installed")
h5py = pytest.importorskip("h5py", reason="the extra `microscopes` is not installed")
hdf5plugin = pytest.importorskip("hdf5plugin", reason="the extra `microscopes` is not installed")
czi = pytest.importorskip("pylibCZIrw.czi", reason="the extra `microscopes` is not installed")
pytest.importorskip("liffile", reason="the extra `microscopes` is not installed")

NIKON = Path(__file__).parents[1] / "data/nikon/cluster.nd2.xz"
SEED = np.random.default_rng(7)
STACKS = SEED.integers(0, 4000, (2, 3, 4, 50, 70), dtype=np.uint16)  # T, C, Z, Y, X
COLOURS = SEED.integers(0, 256, (40, 60, 3), dtype=np.uint8)
TILES = SEED.integers(0, 256, (3, 40, 60), dtype=np.uint8)
SCENES = SEED.integers(0, 4000, (2, 2, 3, 70, 90), dtype=np.uint16)  # scene, C, Z, Y, X


def write_nd2(path: Path) -> Path:
    path.write_bytes(lzma.decompress(NIKON.read_bytes()))
    return path


def write_leica(path: Path) -> Path:
    lengths = {"X": 69 * 0.2e-6, "Y": 49 * 0.2e-6, "Z": -3e-6, "T": 60.0}
    images = [
        Image("dish/Series001", "TCZYX", STACKS, lengths, ("Green", "Red", "Blue")),
        Image("colours", "YXS", COLOURS, {"X": 59e-6, "Y": 39e-6}),
        Image("scan", "MYX", TILES),
    ]
    return write_lif(path, images)


def write_czi(path: Path) -> Path:
    with czi.create_czi(str(path)) as file:
        for scene, corner in enumerate([(0, 0), (1000, 40)]):
            for c, z in np.ndindex(2, 3):
                values = SCENES[scene, c, z]
                file.write(values, plane={"C": int(c), "Z": int(z)}, scene=scene, location=corner)
        names = {0: "DAPI", 1: "GFP"}
        file.write_metadata(path.stem, channel_names=names, scale_x=2e-7, scale_y=2e-7, scale_z=1e-6)
    return path


GZIP: dict[str, Any] = {"compression": "gzip"}


def write_ims(path: Path, *, is_calibrated: bool = True, packing: Mapping[str, Any] = GZIP) -> Path:
    """Write what Imaris writes: padded chunks, a pyramid, text as arrays of characters."""

    def note(group: Any, **facts: object) -> None:
        for name, value in facts.items():
            group.attrs[name] = np.array(list(str(value)), "S1")

    with h5py.File(path, "w") as file:
        extent = {"ExtMin0": -5, "ExtMax0": 9, "ExtMin1": 0, "ExtMax1": 10, "ExtMin2": 0, "ExtMax2": 4}
        if not is_calibrated:
            extent |= {"ExtMin0": 0, "ExtMax0": 70, "ExtMax1": 50}
        note(file.create_group("DataSetInfo/Image"), Unit="um", X=70, Y=50, Z=4, **extent)
        moments = {"TimePoint1": "2026-11-30 10:00:00.000", "TimePoint2": "2026-11-30 10:00:30.500"}
        note(file.create_group("DataSetInfo/TimeInfo"), DatasetTimePoints=2, **moments)
        for c in range(3):
            note(
                file.create_group(f"DataSetInfo/Channel {c}"), Name=("DAPI", "(name not specified)", "GFP")[c]
            )
        for level, t, c in np.ndindex(2, 2, 3):
            values = STACKS[t, c, :, :: level + 1, :: level + 1]
            group = file.create_group(f"DataSet/ResolutionLevel {level}/TimePoint {t}/Channel {c}")
            note(group, **dict(zip(("ImageSizeZ", "ImageSizeY", "ImageSizeX"), values.shape, strict=True)))
            padded = np.pad(values, [(0, -n % 32) for n in values.shape])
            group.create_dataset("Data", data=padded, chunks=(8, 32, 32), **packing)
    return path


def pixels_of(path: Path, **options: Any) -> np.ndarray:
    with open_source(path, **options) as reader:
        return reader.read(reader.info.whole, level=0)


def test_a_plane_of_nikon_is_what_its_library_reads(tmp_path: Path) -> None:
    path = write_nd2(tmp_path / "cluster.nd2")
    expected = nd2.imread(path)  # T, Z, C, Y, X
    assert expected.any()
    planes = count_planes(path)
    assert (planes.n_z, planes.n_t, planes.section_um, planes.frame_interval_s) == (10, 3, 0.5, None)
    for z, t in [(0, 0), (9, 0), (4, 2)]:
        np.testing.assert_array_equal(pixels_of(path, z=z, t=t), expected[t, z].transpose(1, 2, 0))
    with open_source(path, z=1, t=1) as reader:
        assert reader.info.channel_names == ("5-FAM/pH 9.0", "FM 4-64/2% CHAPS")
        assert reader.info.mpp == pytest.approx((0.16781, 0.16781), abs=1e-5)
        part = reader.read(Region(5, 7, 20, 30), level=0)
    np.testing.assert_array_equal(part, expected[1, 1, :, 7:30, 5:20].transpose(1, 2, 0))


def test_every_image_of_leica_has_a_place(tmp_path: Path) -> None:
    path = write_leica(tmp_path / "dish.lif")
    places = list_images(path)
    assert places == [path / str(number) for number in range(5)]
    with open_source(places[0], z=2, t=1) as reader:
        assert (reader.info.name, reader.info.image_name) == ("dish-0", "dish/Series001")
        assert reader.info.channel_names == ("Green", "Red", "Blue")
        assert reader.info.mpp == (0.2, 0.2)
        assert not reader.info.is_rgb
        values = reader.read(reader.info.whole, level=0)
    np.testing.assert_array_equal(values, STACKS[1, :, 2].transpose(1, 2, 0))
    planes = count_planes(places[0])
    assert (planes.n_z, planes.n_t, planes.section_um, planes.frame_interval_s) == (4, 2, 1.0, 60.0)
    with open_source(places[1]) as reader:
        assert reader.info.is_rgb
        assert reader.info.mpp == (1.0, 1.0)
        np.testing.assert_array_equal(reader.read(reader.info.whole, level=0), COLOURS)
    for tile in range(3):
        with open_source(places[2 + tile]) as reader:
            assert (reader.info.image_name, reader.info.mpp) == (f"scan, tile {tile}", None)
        np.testing.assert_array_equal(pixels_of(places[2 + tile])[:, :, 0], TILES[tile])


def test_what_is_no_picture_has_no_place_among_the_images_of_leica(tmp_path: Path) -> None:
    lines = Image("lines over time", "TX", TILES[0])
    spectrum = Image("spectrum", "\N{GREEK SMALL LETTER LAMDA}YX", TILES)
    path = write_lif(tmp_path / "a.lif", [lines, spectrum, Image("picture", "YX", TILES[1])])
    assert list_images(path) == [path]
    np.testing.assert_array_equal(pixels_of(path)[:, :, 0], TILES[1])
    with pytest.raises(InputError, match="holds no image"):
        open_source(write_lif(tmp_path / "b.lif", [lines, spectrum]))


def test_every_scene_of_zeiss_has_a_place_wherever_it_lies_on_the_stage(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.czi")
    assert list_images(path) == [path / "0", path / "1"]
    for scene in range(2):
        place = path / str(scene)
        planes = count_planes(place)
        assert (planes.n_z, planes.n_t, planes.section_um) == (3, 1, 1.0)
        with open_source(place, z=2) as reader:
            assert (reader.info.channel_names, reader.info.mpp) == (("DAPI", "GFP"), (0.2, 0.2))
            np.testing.assert_array_equal(
                reader.read(reader.info.whole, level=0), SCENES[scene, :, 2].transpose(1, 2, 0)
            )
            part = reader.read(Region(10, 20, 40, 60), level=0)
        np.testing.assert_array_equal(part, SCENES[scene, :, 2, 20:60, 10:40].transpose(1, 2, 0))


def test_imaris_has_levels_steps_and_moments(tmp_path: Path) -> None:
    path = write_ims(tmp_path / "a.ims")
    planes = count_planes(path)
    assert (planes.n_z, planes.n_t, planes.section_um, planes.frame_interval_s) == (4, 2, 1.0, 30.5)
    with open_source(path, z=3, t=1) as reader:
        assert (reader.info.mpp, reader.info.name) == ((0.2, 0.2), "a")
        assert reader.info.channel_names == ("DAPI", "channel_1", "GFP")
        assert [one.downsample for one in reader.info.levels] == [1.0, 2.0]
        whole, half = (reader.read(Region(0, 0, 70 // by, 50 // by), level=by - 1) for by in (1, 2))
    np.testing.assert_array_equal(whole, STACKS[1, :, 3].transpose(1, 2, 0))
    np.testing.assert_array_equal(half, STACKS[1, :, 3, ::2, ::2].transpose(1, 2, 0))
    with open_volume(path, tmp_path, t=0, channel="GFP") as volume:
        np.testing.assert_array_equal(volume.read("z", 2), STACKS[0, 2, 2])


def test_imaris_without_a_size_tells_none(tmp_path: Path) -> None:
    path = write_ims(tmp_path / "a.ims", is_calibrated=False)
    assert count_planes(path).section_um is None
    with open_source(path, z=0, t=0) as reader:
        assert reader.info.mpp is None


def test_imaris_that_is_packed_with_lz4_is_unpacked(tmp_path: Path) -> None:
    path = write_ims(tmp_path / "a.ims", packing=hdf5plugin.LZ4())
    np.testing.assert_array_equal(pixels_of(path, z=1, t=0), STACKS[0, :, 1].transpose(1, 2, 0))


def test_a_chunk_of_imaris_that_is_damaged_is_no_failing_disk(tmp_path: Path) -> None:
    path = write_ims(tmp_path / "a.ims")
    with h5py.File(path) as file:
        chunk = file["DataSet/ResolutionLevel 0/TimePoint 1/Channel 1/Data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 200] = bytes(200)
    path.write_bytes(content)
    with open_source(path, z=1, t=1) as reader:
        with pytest.raises(DamagedPixelsError, match="cannot be read near x 0, y 0"):
            reader.read(reader.info.whole, level=0)
        part = reader.read(Region(40, 40, 60, 50), level=0)  # other chunks are whole
    np.testing.assert_array_equal(part, STACKS[1, :, 1, 40:50, 40:60].transpose(1, 2, 0))


def test_an_image_larger_than_its_values_is_damaged(tmp_path: Path) -> None:
    path = write_ims(tmp_path / "a.ims")
    with h5py.File(path, "r+") as file:
        for c in range(3):
            group = file[f"DataSet/ResolutionLevel 0/TimePoint 0/Channel {c}"]
            group.attrs["ImageSizeX"] = np.array(list("300"), "S1")
    with (
        open_source(path, z=1, t=0) as reader,
        pytest.raises(DamagedPixelsError, match="holds fewer pixels than it announces"),
    ):
        reader.read(reader.info.whole, level=0)


def test_levels_of_zeiss_are_halved_and_lie_over_one_another(tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(2100), np.arange(4200)).astype(np.uint16)
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        file.write(ramp)
        file.write_metadata("a")
    with open_source(tmp_path / "a.czi") as reader:
        levels = [(one.width_px, one.height_px, one.downsample) for one in reader.info.levels]
        assert levels == [(4200, 2100, 1.0), (2100, 1050, 2.0), (1050, 525, 4.0)]
        assert reader.info.mpp is None
        part = reader.read(Region(100, 200, 400, 300), level=2)[:, :, 0].astype(int)
    assert part.shape == (100, 300)
    assert np.abs(part - ramp[800:1200:4, 400:1600:4]).max() <= 2 * 3  # within a pixel of level 2


def test_colours_of_zeiss_are_red_green_and_blue_on_white(tmp_path: Path) -> None:
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        file.write(COLOURS[:, :, ::-1].copy(), location=(0, 0))  # the library takes blue first
        file.write(COLOURS[:, :, ::-1].copy(), location=(100, 0))
        file.write_metadata("a", scale_x=2e-7, scale_y=2e-7)
    with open_source(tmp_path / "a.czi") as reader:
        assert reader.info.is_rgb
        values = reader.read(reader.info.whole, level=0)
    np.testing.assert_array_equal(values[:, :60], COLOURS)
    np.testing.assert_array_equal(values[:, 100:], COLOURS)
    assert (values[:, 60:100] == 255).all()


@pytest.mark.parametrize(
    ("write", "place"), [(write_nd2, ""), (write_leica, "0"), (write_czi, "1"), (write_ims, "")]
)
def test_threads_read_the_same_as_one(tmp_path: Path, write: Callable[[Path], Path], place: str) -> None:
    suffix = {write_nd2: "nd2", write_leica: "lif", write_czi: "czi", write_ims: "ims"}[write]
    path = write(tmp_path / f"a.{suffix}") / place
    planes = count_planes(path)
    with open_source(path, z=1, t=0 if planes.n_t > 1 else None) as reader:
        whole = reader.read(reader.info.whole, level=0)
        corners = [(x, y) for x in range(0, 24, 3) for y in range(0, 18, 3)] * 4
        regions = [Region(x, y, x + 9, y + 11) for x, y in corners]
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda region: reader.read(region, level=0), regions))
    for region, part in zip(regions, parts, strict=True):
        np.testing.assert_array_equal(part, whole[region.y0 : region.y1, region.x0 : region.x1])
    with pytest.raises(InputError, match="is closed"):
        reader.read(regions[0], level=0)


def test_a_stack_is_a_volume_and_a_series_one_along_time(tmp_path: Path) -> None:
    leica, zeiss = write_leica(tmp_path / "a.lif"), write_czi(tmp_path / "b.czi")
    with open_volume(zeiss / "1", tmp_path, channel="GFP") as volume:
        assert (volume.info.shape, volume.info.voxel_nm) == ((3, 70, 90), (1000.0, 200.0, 200.0))
        np.testing.assert_array_equal(volume.read("z", 2), SCENES[1, 1, 2])
    with open_volume(leica / "0", tmp_path, t=1, channel=2) as volume:
        assert (volume.info.name, volume.info.image_name) == ("a-0", "dish/Series001")
        np.testing.assert_array_equal(volume.read("z", 3), STACKS[1, 2, 3])
    with open_volume(leica / "0", tmp_path, channel=2, projects=True) as volume:
        assert (volume.info.is_series, volume.info.frame_interval_s) == (True, 60.0)
        np.testing.assert_array_equal(volume.read("z", 1), STACKS[1, 2].max(axis=0))


def test_results_of_images_of_one_file_lie_side_by_side(tmp_path: Path) -> None:
    for folder in ("day1", "day2"):
        (tmp_path / folder).mkdir()
        write_czi(tmp_path / folder / "a.czi")
    write_nd2(tmp_path / "day1" / "b.nd2")
    slides = list_slides([str(tmp_path / "day1")])
    assert slides == (tmp_path / "day1/a.czi/0", tmp_path / "day1/a.czi/1", tmp_path / "day1/b.nd2")
    assert place_results(slides) == (Path(), Path(), Path())
    both = list_slides([str(tmp_path / "day1/a.czi/1"), str(tmp_path / "day2/a.czi/1")])
    assert place_results(both) == (Path("day1/a.czi"), Path("day2/a.czi"))
    first, second = (fingerprint_file(tmp_path / "day1/a.czi" / number) for number in "01")
    assert first != second
    assert {**first, "image": 1} == second


def test_messages_name_the_places(tmp_path: Path) -> None:
    path = write_czi(tmp_path / "a.czi")
    with pytest.raises(InputError, match=r"a\.czi: holds 2 images; name one: .*a\.czi/0 to .*a\.czi/1"):
        open_source(path)
    with pytest.raises(InputError, match=r"a\.czi: has no image 2; name one: .*a\.czi/0 to"):
        open_source(path / "2")
    with pytest.raises(InputError, match=r"a\.czi/1: holds 3 planes along z; pass --z N"):
        open_source(path / "1")
    with pytest.raises(UsageError, match="--mpp"):
        open_source(path / "1", z=0, mpp=-1.0)
    assert list_slides([str(tmp_path / "*.czi/1")]) == (path / "1",)
    (tmp_path / "b[1].czi").write_bytes(path.read_bytes())
    assert list_slides([str(tmp_path / "b[1].czi/1")]) == (tmp_path / "b[1].czi/1",)
    with pytest.raises(InputError, match=r"c\.nd2: no such file"):
        open_source(tmp_path / "c.nd2" / "1")


@pytest.mark.parametrize("suffix", [".nd2", ".lif", ".czi", ".ims"])
@pytest.mark.parametrize("content", [b"\0", b"II*\0 something else " * 40])
def test_another_file_under_the_name_is_refused_in_a_line(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert list_images(path) == [path]
    for attempt in (open_source, count_planes):
        with pytest.raises(InputError) as caught:
            attempt(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path}: cannot be read as {suffix[1:].upper()}")


def test_channels_of_leica_are_named_in_the_order_of_their_values(tmp_path: Path) -> None:
    path = write_lif(
        tmp_path / "a.lif", [Image("a", "CYX", TILES, tints=("Blue", "Green", "Red"), is_reversed=True)]
    )
    with open_source(path) as reader:
        assert reader.info.channel_names == ("Blue", "Green", "Red")
        values = reader.read(reader.info.whole, level=0)
    np.testing.assert_array_equal(values, TILES.transpose(1, 2, 0))


def test_an_image_of_leica_that_is_not_read_leaves_the_others(tmp_path: Path) -> None:
    across = Image("scanned along z", "YZX", STACKS[0, 0])
    path = write_lif(tmp_path / "a.lif", [across, Image("picture", "YX", TILES[0])])
    assert list_images(path) == [path / "0", path / "1"]
    np.testing.assert_array_equal(pixels_of(path / "1")[:, :, 0], TILES[0])
    with pytest.raises(InputError, match=r"a\.lif: was scanned across y in scanned along z; export that"):
        open_source(path / "0")


def change_nd2(path: Path, pattern: bytes, value: bytes) -> Path:
    """Put `value` behind the one name `pattern` (UTF-16 with its end) of the metadata."""
    content = path.read_bytes()
    name = pattern.decode().encode("utf-16-le") + b"\0\0"
    places = [at + len(name) for at in find_all(content, name)]
    assert places
    for at in places:
        content = content[:at] + value + content[at + len(value) :]
    path.write_bytes(content)
    return path


def find_all(content: bytes, part: bytes) -> list[int]:
    found, at = [], content.find(part)
    while at >= 0:
        found.append(at)
        at = content.find(part, at + 1)
    return found


def test_an_acquisition_of_nikon_that_was_stopped_has_whole_time_points(tmp_path: Path) -> None:
    path = write_nd2(tmp_path / "a.nd2")
    expected = nd2.imread(path)
    change_nd2(path, b"uiSequenceCount", (24).to_bytes(4, "little"))  # of 30 frames
    planes = count_planes(path)
    assert (planes.n_z, planes.n_t, planes.n_lacking) == (10, 2, 1)
    np.testing.assert_array_equal(pixels_of(path, z=9, t=1), expected[1, 9].transpose(1, 2, 0))
    change_nd2(path, b"uiSequenceCount", (40).to_bytes(4, "little"))
    with pytest.raises(InputError, match="holds 40 frames, of which its loops explain 30"):
        count_planes(path)


def test_colours_of_nikon_are_red_green_and_blue() -> None:
    """No file with colours could be had: nd2's object is stood in for, blue first as Bio-Formats found."""
    facts = SimpleNamespace(channelCount=1, componentCount=3)
    stand_in = Nd2File.__new__(Nd2File)
    stand_in._file = SimpleNamespace(  # type: ignore[assignment]
        attributes=facts,
        components_per_channel=3,
        sizes={"Y": 40, "X": 60, "S": 3},
        read_frame=lambda frame: COLOURS[:, :, ::-1],
    )
    np.testing.assert_array_equal(stand_in._load(0), COLOURS)


def test_colours_beside_other_channels_of_zeiss_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.czi"
    with czi.create_czi(str(path)) as file:
        file.write(COLOURS, plane={"C": 0})
        file.write(TILES[0], plane={"C": 1})
        file.write_metadata("a")
    with pytest.raises(InputError, match=r"a\.czi: has colours beside other channels; split its channels"):
        open_source(path)


def test_what_gives_way_under_a_file_is_no_damage(tmp_path: Path) -> None:
    path = write_leica(tmp_path / "a.lif")
    with open_source(path / "2") as reader:
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(InputError, match="cannot be read any more") as caught:
            reader.read(reader.info.whole, level=0)
    assert not isinstance(caught.value, DamagedPixelsError)


def test_a_microscope_of_nikon_that_was_not_calibrated_tells_no_size(tmp_path: Path) -> None:
    path = change_nd2(write_nd2(tmp_path / "a.nd2"), b"bCalibrated", b"\0")
    with open_source(path, z=0, t=0) as reader:
        assert (reader.info.mpp, reader.info.mpp_source) == (None, None)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    for path in (
        write_leica(tmp_path / "a.lif"),
        write_czi(tmp_path / "b.czi"),
        write_nd2(tmp_path / "c.nd2"),
    ):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(InputError, match=f"cannot be read as {path.suffix[1:].upper()}"):
            count_planes(path)


@pytest.mark.parametrize(
    ("package", "suffix"),
    [
        ("nd2", ".nd2"),
        ("liffile", ".lif"),
        ("pylibCZIrw", ".czi"),
        ("h5py", ".ims"),
        ("hdf5plugin", ".ims"),
    ],
)
def test_without_its_package_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)
    expected = f"{path}: needs the package {package}; run pip install 'darcnn[microscopes]'"
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert str(caught.value) == expected
