"""Claims that every reader keeps, each against a reference array."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from darcnn.runtime.errors import InputError, ShapeError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers import ArrayReader, Reader, open_source
from darcnn.runtime.readers.recent import RecentReader
from darcnn.runtime.readers.slide import SlideReader

SVS = Path(__file__).parents[2] / "examples" / "CMU-1-Small-Region.svs"
MAX_SIDE = 200  # regions stay small: the claims do not depend on their size


@dataclass(frozen=True)
class Case:
    """How to open a source, and what it must deliver: an array (H, W, C) for each level."""

    open: Callable[[], Reader]
    levels: list[np.ndarray]
    is_rgb: bool = False
    mpp: tuple[float, float] | None = None


def noise(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) * 250).astype(dtype)


def array_case(folder: Path) -> Case:
    values = noise((61, 83, 2), np.int16)
    return Case(lambda: ArrayReader(values), [values.astype(np.float32)])


def picture_case(folder: Path) -> Case:
    values = noise((61, 83, 3), np.uint8)
    Image.fromarray(values).save(folder / "colour.png")
    return Case(lambda: open_source(folder / "colour.png"), [values], is_rgb=True)


def grey_picture_case(folder: Path) -> Case:
    values = noise((61, 83), np.uint16) * 200
    Image.fromarray(values).save(folder / "grey.png")
    return Case(lambda: open_source(folder / "grey.png"), [values[:, :, None]])


def plain_tiff_case(folder: Path) -> Case:
    values = noise((61, 83), np.uint16)
    tifffile.imwrite(folder / "plain.tif", values, byteorder=">")
    return Case(lambda: open_source(folder / "plain.tif"), [values[:, :, None]])


def strip_tiff_case(folder: Path) -> Case:
    values = noise((61, 83, 3), np.uint8)
    tifffile.imwrite(folder / "strips.tif", values, photometric="rgb", compression="zlib", rowsperstrip=7)
    return Case(lambda: open_source(folder / "strips.tif"), [values], is_rgb=True)


def planar_tiff_case(folder: Path) -> Case:
    values = noise((3, 61, 83), np.float32)
    options: dict[str, Any] = {"planarconfig": "separate", "tile": (16, 32), "bigtiff": True}
    tifffile.imwrite(folder / "planar.tif", values, photometric="minisblack", **options)
    return Case(lambda: open_source(folder / "planar.tif"), [np.moveaxis(values, 0, 2)])


def ome_pyramid_case(folder: Path) -> Case:
    path = folder / "pyramid.ome.tif"
    stack = noise((2, 3, 120, 160), np.uint16)  # C, Z, Y, X
    metadata = {"axes": "CZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(stack, subifds=1, tile=(32, 32), compression="lzw", metadata=metadata)
        tiff.write(stack[..., ::2, ::2], subfiletype=1, tile=(32, 32), compression="lzw", metadata=None)
    plane = np.moveaxis(stack[:, 1], 0, 2)
    return Case(lambda: open_source(path, z=1), [plane, plane[::2, ::2]], mpp=(0.5, 0.25))


def slide_case(folder: Path) -> Case:
    with openslide.OpenSlide(SVS) as slide:
        whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[:, :, :3]
    return Case(lambda: open_source(SVS), [whole], is_rgb=True, mpp=(0.499, 0.499))


def slide_pyramid_case(folder: Path) -> Case:
    path = folder / "pyramid.tif"
    values = noise((256, 384, 3), np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        for step, kind in ((1, 0), (2, 1), (4, 1)):
            level = values[::step, ::step]
            tiff.write(level, photometric="rgb", tile=(64, 64), subfiletype=kind, metadata=None)
    return Case(lambda: SlideReader(path), [values[::s, ::s] for s in (1, 2, 4)], is_rgb=True)


def mrc_case(folder: Path) -> Case:
    mrcfile = pytest.importorskip("mrcfile", reason="the extra `volumes` is not installed")
    volume = noise((3, 61, 83), np.int16) - np.int16(100)  # Z, Y, X
    with mrcfile.new(folder / "volume.mrc", volume) as file:
        file.voxel_size = (5000.0, 2500.0, 1.0)  # Angstrom
    return Case(
        lambda: open_source(folder / "volume.mrc", z=1),
        [volume[1, :, :, None].astype(np.float32)],
        mpp=(0.5, 0.25),
    )


def nifti_case(folder: Path) -> Case:
    nibabel = pytest.importorskip("nibabel", reason="the extra `volumes` is not installed")
    volume = noise((83, 61, 3), np.uint16) * 200  # X, Y, Z
    image = nibabel.Nifti1Image(volume, np.diag([0.5, 0.25, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, folder / "volume.nii.gz")
    plane = volume[:, :, 2].T[:, :, None]
    return Case(lambda: open_source(folder / "volume.nii.gz", z=2), [plane], mpp=(500.0, 250.0))


def ome_zarr_case(folder: Path) -> Case:
    stack = noise((2, 3, 120, 160), np.uint16)  # C, Z, Y, X
    levels = [stack, stack[..., ::2, ::2]]
    group = zarr.create_group(folder / "image.ome.zarr", zarr_format=3)
    for index, level in enumerate(levels):
        group.create_array(str(index), data=level, chunks=(1, 1, 32, 32), shards=(1, 1, 64, 64))
    axes = [{"name": "c", "type": "channel"}] + [
        {"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"
    ]
    scale = [{"type": "scale", "scale": [1, 2, 0.25, 0.5]}]
    datasets = [{"path": str(index), "coordinateTransformations": scale} for index in range(2)]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    plane = np.moveaxis(stack[:, 1], 0, 2)
    return Case(
        lambda: open_source(folder / "image.ome.zarr", z=1), [plane, plane[::2, ::2]], mpp=(0.5, 0.25)
    )


CASES = {
    "array": array_case,
    "picture": picture_case,
    "grey picture": grey_picture_case,
    "plain TIFF": plain_tiff_case,
    "TIFF in strips": strip_tiff_case,
    "TIFF in planes": planar_tiff_case,
    "OME pyramid": ome_pyramid_case,
    "slide": slide_case,
    "slide pyramid": slide_pyramid_case,
    "MRC volume": mrc_case,
    "NIfTI volume": nifti_case,
    "OME-Zarr": ome_zarr_case,
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return request.param(tmp_path_factory.mktemp("source"))


@st.composite
def regions(draw: st.DrawFn, height: int, width: int) -> Region:
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x1 = draw(st.integers(x0 + 1, min(width, x0 + MAX_SIDE)))
    y1 = draw(st.integers(y0 + 1, min(height, y0 + MAX_SIDE)))
    return Region(x0, y0, x1, y1)


def cut(pixels: np.ndarray, region: Region) -> np.ndarray:
    return pixels[region.y0 : region.y1, region.x0 : region.x1]


def corners(pixels: np.ndarray) -> list[Region]:
    """Return one region at each corner, 40 px or less."""
    height, width = pixels.shape[:2]
    side = min(40, height, width)
    starts = [(x, y) for x in (0, width - side) for y in (0, height - side)]
    return [Region(x, y, x + side, y + side) for x, y in starts]


def test_facts_match_the_pixels(case: Case) -> None:
    with case.open() as reader:
        info = reader.info
        assert isinstance(reader, Reader)
        assert [(level.height_px, level.width_px) for level in info.levels] == [
            pixels.shape[:2] for pixels in case.levels
        ]
        assert [level.index for level in info.levels] == list(range(len(case.levels)))
        assert [level.downsample for level in info.levels] == [2.0**i for i in range(len(case.levels))]
        assert info.dtype == case.levels[0].dtype
        assert len(set(info.channel_names)) == case.levels[0].shape[2]
        assert (info.is_rgb, info.mpp) == (case.is_rgb, case.mpp)
        assert (info.mpp_source is None) == (info.mpp is None)


@pytest.mark.parametrize("is_at_hand", [False, True])
def test_any_region_of_any_level_equals_the_reference(case: Case, is_at_hand: bool) -> None:
    """Read anew, or a part of what was read before."""
    with case.open() as source:
        reader = RecentReader(source) if is_at_hand else source

        @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.data())
        def claim(data: st.DataObject) -> None:
            level = data.draw(st.integers(0, len(case.levels) - 1))
            region = data.draw(regions(*case.levels[level].shape[:2]))
            pixels = reader.read(region, level=level)
            assert pixels.dtype == reader.info.dtype
            np.testing.assert_array_equal(pixels, cut(case.levels[level], region))

        claim()


def test_what_is_read_belongs_to_the_caller(case: Case) -> None:
    region = corners(case.levels[0])[0]
    with case.open() as reader:
        pixels = reader.read(region, level=0)
        pixels[:] = 1
        np.testing.assert_array_equal(reader.read(region, level=0), cut(case.levels[0], region))


@pytest.mark.parametrize(
    ("x0", "y0", "dx", "dy"), [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 5), (5, 5, 1, -1)]
)
def test_a_region_that_is_empty_or_begins_outside_is_refused(
    case: Case, x0: int, y0: int, dx: int, dy: int
) -> None:
    with case.open() as reader, pytest.raises(ShapeError):
        reader.read(Region(x0, y0, x0 + dx, y0 + dy), level=0)


def test_a_region_that_leaves_the_level_is_refused(case: Case) -> None:
    with case.open() as reader:
        for level in reader.info.levels:
            width, height = level.width_px, level.height_px
            for region in (Region(0, 0, width + 1, 1), Region(0, 0, 1, height + 1)):
                with pytest.raises(ShapeError, match="leaves"):
                    reader.read(region, level=level.index)


@pytest.mark.parametrize("level", [-1, 99])
def test_a_level_that_does_not_exist_is_refused(case: Case, level: int) -> None:
    with case.open() as reader, pytest.raises(ShapeError, match="level"):
        reader.read(Region(0, 0, 1, 1), level=level)


def test_four_threads_read_what_one_reads(case: Case) -> None:
    jobs = [(i, region) for i, pixels in enumerate(case.levels) for region in corners(pixels)] * 6
    with case.open() as reader, ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda job: reader.read(job[1], level=job[0]), jobs))
    for (level, region), pixels in zip(jobs, read, strict=True):
        np.testing.assert_array_equal(pixels, cut(case.levels[level], region))


def test_closing_twice_is_allowed_and_reading_afterwards_is_an_error(case: Case) -> None:
    reader = case.open()
    reader.close()
    reader.close()
    with pytest.raises(InputError, match="closed"):
        reader.read(Region(0, 0, 1, 1), level=0)


def test_closing_while_others_read_never_breaks_a_read(case: Case) -> None:
    reader = case.open()
    region = corners(case.levels[0])[-1]

    def read_until_closed() -> int:
        count = 0
        while True:
            try:
                pixels = reader.read(region, level=0)
            except InputError:
                return count
            count += 1
            np.testing.assert_array_equal(pixels, cut(case.levels[0], region))

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(read_until_closed) for _ in range(3)]
        reader.read(region, level=0)
        reader.close()
        assert all(future.result(timeout=20) >= 0 for future in running)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc")
def test_the_context_leaves_no_file_open(case: Case) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with case.open() as reader:
        reader.read(corners(case.levels[0])[0], level=0)
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
