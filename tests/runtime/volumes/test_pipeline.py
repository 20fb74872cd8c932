"""From a volume to files: the label volume is its own prediction, whatever happens on the way."""

from __future__ import annotations

import errno
import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from PIL import Image

import darcnn.runtime
from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.errors import InputError, OutputError, UsageError
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import IntensityRule, Window
from darcnn.runtime.readers.protocol import Reader
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.slab import Slab
from darcnn.runtime.volumes import agree, extras, find, joining
from darcnn.runtime.volumes.agree import Agreement
from darcnn.runtime.volumes.labels import Numbered
from darcnn.runtime.volumes.open import open_volume
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.overview import write_overview
from darcnn.runtime.volumes.pipeline import run_volume
from darcnn.runtime.volumes.record import VolumeCounts
from darcnn.runtime.volumes.solid import SolidFile, write_solids
from darcnn.runtime.volumes.stack import Stack, measure_stack
from darcnn.runtime.volumes.volume import AXES, Axis, Stored, Volume, VolumeInfo

pytest.importorskip("mrcfile", reason="volumes need the extra volumes")
starfile = pytest.importorskip("starfile", reason="volumes need the extra volumes")

_FIELD = Path(__file__).parents[2] / "data/target/u2os_2abc40c118.png"
_TISSUE = next((Path(__file__).parents[2] / "data/tissue").glob("*.png"))


def same_objects(labels: np.ndarray, truth: np.ndarray) -> bool:
    """Tell whether both volumes hold the same objects, whatever their numbers."""
    pairs = np.unique(np.stack([labels.ravel(), truth.ravel()]), axis=1)
    return len(pairs.T) == len(np.unique(truth)) == len(np.unique(labels))


@pytest.mark.parametrize("axis", ["z", "y", "x", "all"])
def test_every_object_comes_back_once_with_all_its_voxels(
    axis: str, oracle16: Segmenter, mrc_file: Path, balls: np.ndarray, tmp_path: Path
) -> None:
    summary = run_volume(oracle16, mrc_file, tmp_path / "out", options=VolumeOptions(axis=axis))  # type: ignore[arg-type]
    assert summary.n_objects == balls.max()
    labels = zarr.open_group(summary.folder / "labels.ome.zarr", mode="r")["0"][:]
    assert same_objects(labels, balls)
    table = pq.read_table(summary.folder / "objects.parquet").to_pandas()
    assert sorted(table["volume_voxels"]) == sorted(np.bincount(balls.ravel())[1:])
    for row in table.itertuples():
        where = np.argwhere(labels == row.id)
        assert np.allclose(where.mean(axis=0) + 0.5, (row.z, row.y, row.x))
        assert row.volume_nm3 == pytest.approx(len(where) * 1.2**3, rel=1e-5)
        assert row.mean_intensity == balls[tuple(where[0])]
        on_edge = (where == 0).any() or (where == np.array(balls.shape) - 1).any()
        assert row.truncated == on_edge


def test_a_volume_behind_a_url_gives_what_a_folder_gives(
    oracle: Segmenter, served: tuple[Path, str, Callable[[], None]], balls: np.ndarray, tmp_path: Path
) -> None:
    folder, address, _ = served
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    scale = [{"type": "scale", "scale": [1.2] * 3}]
    levels = [{"path": "0", "coordinateTransformations": scale}]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    group = zarr.create_group(folder / "a.ome.zarr", attributes={"ome": ome})
    group.create_array("0", data=balls, chunks=(8, 32, 32))
    near = run_volume(oracle, folder / "a.ome.zarr", tmp_path / "near")
    far = run_volume(oracle, f"{address}/a.ome.zarr", tmp_path / "far")
    assert near.n_objects == balls.max()
    assert content(near.folder) == content(far.folder)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_size_of_a_block_changes_no_byte(
    block: int, oracle16: Segmenter, mrc_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_volume(oracle16, mrc_file, tmp_path / "one")
    monkeypatch.setattr(find, "_BLOCK", block)
    other = run_volume(oracle16, mrc_file, tmp_path / "two")
    assert content(first.folder) == content(other.folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("is_packed", [False, True])
def test_workers_find_what_one_process_finds_to_the_byte(
    is_packed: bool, oracle16: Segmenter, mrc_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = pytest.importorskip("darcnn.runtime.cluster", reason="needs the extra cluster")
    path = mrc_file
    if is_packed:  # workers read what the command has unpacked, and leave it to it
        path = tmp_path / "balls.mrc.gz"
        path.write_bytes(gzip.compress(mrc_file.read_bytes()))
    monkeypatch.setattr(find, "_BLOCK", 3)
    alone = run_volume(oracle16, path, tmp_path / "alone")
    seen: list[int] = []
    make = partial(Segmenter, oracle16.engine, oracle16.manifest)
    with cluster.open_cluster(make, n_workers=2) as runner:
        monkeypatch.chdir(tmp_path)  # workers have another working folder
        shared = run_volume(
            oracle16,
            Path(path.name),
            Path("shared"),
            find_blocks=runner.find_blocks,
            progress=lambda done, total, **more: seen.append(done),
        )
    assert content(alone.folder) == content(shared.folder)
    assert seen[-1] == 20
    assert len(seen) == 7  # once a block
    assert seen == sorted(seen)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files but run.json, which holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", ".lock")
    }


def test_a_stopped_run_goes_on_with_the_blocks_that_it_lacks(
    oracle16: Segmenter, mrc_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_volume(oracle16, mrc_file, tmp_path / "whole")

    def stop(done: int, total: int, **more: float) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_volume(oracle16, mrc_file, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out" / "balls" / "run.json").exists()
    name = oracle16.engine.spec.name
    with monkeypatch.context() as patch:
        patch.setattr(oracle16.engine, "_spec", replace(oracle16.engine.spec, name="another"))
        with pytest.raises(OutputError, match=f"begun on {name}, and this is another; pass --restart"):
            run_volume(oracle16, mrc_file, tmp_path / "out")
    seen: list[int] = []
    again = run_volume(
        oracle16, mrc_file, tmp_path / "out", progress=lambda done, total, **more: seen.append(done)
    )
    assert seen[0] == 8  # the first block was there already
    assert content(again.folder) == content(whole.folder)
    assert not list(again.folder.glob(".parts*"))
    with pytest.raises(OutputError, match="complete result"):
        run_volume(oracle16, mrc_file, tmp_path / "out", options=VolumeOptions(axis="x"))
    assert run_volume(oracle16, mrc_file, tmp_path / "out").was_done


def test_coordinates_are_read_back_by_starfile_and_as_points(
    oracle16: Segmenter, mrc_file: Path, balls: np.ndarray, tmp_path: Path
) -> None:
    folder = run_volume(oracle16, mrc_file, tmp_path / "out").folder
    tables = starfile.read(folder / "particles.star")
    particles = tables["particles"]
    for axis, side in zip("ZYX", balls.shape, strict=True):  # Angstrom from the centre, as RELION 5 has them
        centred = (particles[f"rlnCoordinate{axis}"] - side / 2) * 12.0
        assert np.allclose(particles[f"rlnCenteredCoordinate{axis}Angst"], centred, atol=0.02)
    assert tables["optics"]["rlnTomoTiltSeriesPixelSize"].iloc[0] == pytest.approx(12.0)
    points = np.loadtxt(folder / "particles.txt")
    assert len(particles) == len(points) == balls.max()
    for row, (x, y, z) in zip(particles.itertuples(), points, strict=True):
        found = round(row.rlnCoordinateZ), round(row.rlnCoordinateY), round(row.rlnCoordinateX)
        assert balls[found] > 0  # the middle of a ball
        assert (x, y, z) == pytest.approx(
            (row.rlnCoordinateX + 0.5, row.rlnCoordinateY + 0.5, row.rlnCoordinateZ), abs=0.01
        )


def test_labels_in_mrc_have_the_geometry_of_the_volume(
    oracle16: Segmenter, mrc_file: Path, balls: np.ndarray, tmp_path: Path
) -> None:
    import mrcfile

    folder = run_volume(
        oracle16, mrc_file, tmp_path / "out", options=VolumeOptions(also=("labels-mrc",))
    ).folder
    with mrcfile.open(folder / "labels.mrc") as file:
        assert same_objects(np.asarray(file.data), balls)
        assert float(file.voxel_size.x) == pytest.approx(12.0)
    assert mrcfile.validate(folder / "labels.mrc")


@pytest.mark.parametrize("voxel_nm", [None, (1.3, 1.3, 1.3)])
@pytest.mark.parametrize("has_size", [True, False])
def test_labels_in_mrc_lie_where_the_volume_lies(
    oracle16: Segmenter, mrc_file: Path, tmp_path: Path, voxel_nm: tuple[float, ...] | None, has_size: bool
) -> None:
    import mrcfile

    with mrcfile.open(mrc_file, "r+") as file:
        file.header.origin = (100, 200, 300)
        file.nstart = (5, 6, 7)
        if not has_size:
            file.voxel_size = 1.0  # what is not believed
    options = VolumeOptions(also=("labels-mrc",), voxel_nm=voxel_nm)  # type: ignore[arg-type]
    folder = run_volume(oracle16, mrc_file, tmp_path / "out", options=options).folder
    with mrcfile.open(folder / "labels.mrc") as file:
        assert file.header.origin.item() == (100, 200, 300)
        assert file.nstart.item() == (5, 6, 7)
        asked = 13.0 if voxel_nm else 12.0 if has_size else 1.0
        assert file.voxel_size.item() == pytest.approx((asked, asked, asked))


def test_labels_in_mrc_know_their_voxels_where_the_header_of_the_volume_is_careless(
    oracle16: Segmenter, mrc_file: Path, tmp_path: Path
) -> None:
    import mrcfile

    with mrcfile.open(mrc_file, "r+") as file:
        for name in ("mapc", "mapr", "maps", "mx", "my", "mz"):
            file.header[name] = 0
    options = VolumeOptions(also=("labels-mrc",), voxel_nm=(1.3, 1.2, 1.1))
    folder = run_volume(oracle16, mrc_file, tmp_path / "out", options=options).folder
    with mrcfile.open(folder / "labels.mrc") as file:
        assert file.voxel_size.item() == pytest.approx((11.0, 12.0, 13.0))


def test_labels_in_mrc_without_mrcfile_are_refused_before_anything_is_found(
    oracle16: Segmenter, balls: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "s.tif", balls.astype(np.uint16), metadata={"axes": "ZYX"})
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    options = VolumeOptions(also=("labels-mrc",))
    with pytest.raises(UsageError, match=r"labels-mrc needs the package mrcfile; run pip install 'darcnn"):
        run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("n_planes", "n_found"), [(8, 1), (4, 1), (1, 1)])
def test_a_volume_thinner_than_a_slab_has_objects_too(
    oracle16: Segmenter, tmp_path: Path, n_planes: int, n_found: int
) -> None:
    labels = np.zeros((n_planes, 40, 40), np.uint16)
    labels[:, 10:20, 10:20] = 1
    with gzip.open(tmp_path / "v.mrc.gz", "wb") as packed:
        mrcfile = pytest.importorskip("mrcfile")
        with mrcfile.new(tmp_path / "v.mrc", labels) as file:
            file.set_volume()
        packed.write((tmp_path / "v.mrc").read_bytes())
    slabs = replace(oracle16.manifest.input, slab=Slab(0.5), nominal_diameter_px=12.0)
    with Segmenter(oracle16.engine, replace(oracle16.manifest, input=slabs)) as segmenter:
        summary = run_volume(segmenter, tmp_path / "v.mrc.gz", tmp_path / "out")
    assert json.loads((summary.folder / "run.json").read_text())["network"]["planes_joined"] == 7
    assert summary.n_objects == n_found


def test_planes_with_as_many_objects_as_the_model_can_report_are_warned_of(
    oracle16: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((6, 60, 60), np.uint16)
    labels[:, 10:20, 10:20] = 1
    tifffile.imwrite(tmp_path / "s.tif", labels, metadata={"axes": "ZYX"})
    found = Segmenter.segment

    def fill(self: Segmenter, reader: Reader, *rest: object, **options: object) -> Instances:
        is_full = int(reader.info.name.split()[0] == "s,") and next(calls) in (1, 4)
        return replace(found(self, reader, *rest, **options), is_saturated=bool(is_full))  # type: ignore[arg-type]

    calls = iter(range(6))
    monkeypatch.setattr(Segmenter, "segment", fill)
    summary = run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out")
    assert any("as many objects as the model can report: 2;" in warning for warning in summary.warnings)
    assert json.loads((summary.folder / "run.json").read_text())["counts"]["planes_saturated"] == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [(np.uint16(3000), "--window 0,4095"), (np.float32(200), "0 is black and 1 is white")],
)
def test_values_that_do_not_reach_white_are_refused_as_in_images(
    oracle: Segmenter, tmp_path: Path, values: np.generic, words: str
) -> None:
    stack = np.zeros((4, 40, 40), values.dtype)
    stack[:, 10:20, 10:20] = values
    tifffile.imwrite(tmp_path / "s.tif", stack, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=words):
        run_volume(oracle, tmp_path / "s.tif", tmp_path / "out")
    window = VolumeOptions(window=(0.0, 4095.0))
    assert run_volume(oracle, tmp_path / "s.tif", tmp_path / "told", options=window).folder.exists()


@pytest.mark.parametrize("shape", [(64, 1440, 1024), (64, 1024, 1440)])
def test_the_planes_of_an_overview_are_shrunk_alike(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    _, height, width = shape
    values = np.zeros(shape, np.uint8)
    values[24:40, height // 2 - 10 : height // 2 + 10, width - 100 : width - 60] = 100
    values[24:40, height - 100 : height - 60, width // 2 - 10 : width // 2 + 10] = 100
    info = VolumeInfo(tmp_path / "v.mrc", "v", shape, values.dtype)
    (tmp_path / "raw").write_bytes(values.tobytes())
    write_solids(tmp_path / "none.arrow", [])
    none = Numbered(SolidFile(tmp_path / "none.arrow"), np.zeros(0, np.int64), np.zeros(0, np.int64))
    with Volume(info, Stored(tmp_path / "raw", values.dtype)) as volume:
        stacks = [Stack(volume, axis) for axis in AXES]
        write_overview(tmp_path / "o.png", stacks, Window(0.0, 100.0), none, model_name="m")
    page = np.asarray(Image.open(tmp_path / "o.png").convert("L"))
    scale = 1024 / max(height, width)
    z_height, z_width = round(height * scale), round(width * scale)
    right = page[z_height + 8 : z_height + 8 + round(64 * scale)]  # the plane across y, below
    assert np.flatnonzero((right > 200).sum(axis=0).clip(0, 28) % 28)[0] == pytest.approx(
        (width - 100) * scale, abs=2
    )
    below = page[:z_height, z_width + 8 : z_width + 8 + round(64 * scale)]  # across x, beside
    assert np.flatnonzero(((below > 200).sum(axis=1) % below.shape[1]) > 0)[0] == pytest.approx(
        (height - 100) * scale, abs=2
    )


def test_formats_are_added_to_a_finished_result(oracle16: Segmenter, mrc_file: Path, tmp_path: Path) -> None:
    folder = run_volume(oracle16, mrc_file, tmp_path / "out").folder
    both = VolumeOptions(also=("csv", "labels-mrc"))
    whole = run_volume(oracle16, mrc_file, tmp_path / "whole", options=both)
    assert run_volume(oracle16, mrc_file, tmp_path / "out", options=both).was_done
    for name in ("objects.csv", "labels.mrc"):
        assert (folder / name).stat().st_size == (whole.folder / name).stat().st_size
    assert (folder / "objects.csv").read_bytes() == (whole.folder / "objects.csv").read_bytes()
    lines = (folder / "objects.csv").read_text().splitlines()
    assert len(lines) == whole.n_objects + 1
    assert "sphericity" in lines[0]
    with pytest.raises(UsageError, match="no format geojson"):
        run_volume(oracle16, mrc_file, tmp_path / "out", options=VolumeOptions(also=("geojson",)))


def test_a_filter_on_nanometres_needs_a_voxel_size(
    oracle16: Segmenter, balls: np.ndarray, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "s.tif", balls.astype(np.uint16), metadata={"axes": "ZYX"})
    options = VolumeOptions(row_filter="diameter_nm > 3")
    with pytest.raises(UsageError, match=r"diameter_nm is not known.*--voxel-size"):
        run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out", options=options)
    told = replace(options, voxel_nm=(1.0, 1.0, 1.0))
    assert run_volume(oracle16, tmp_path / "s.tif", tmp_path / "told", options=told).n_objects


def test_a_filter_on_micrometres_needs_a_pixel_size_in_a_series(
    oracle16: Segmenter, balls: np.ndarray, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "s.tif", balls, imagej=True, metadata={"axes": "TYX"})
    options = VolumeOptions(row_filter="area_um2 > 3")
    with pytest.raises(UsageError, match=r"area_um2 is not known.*--mpp"):
        run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out", options=options)


@pytest.mark.parametrize("along", ["z", "t"])
def test_labels_lie_where_the_image_in_ome_zarr_does(
    oracle16: Segmenter, balls: np.ndarray, tmp_path: Path, along: str
) -> None:
    group = zarr.create_group(tmp_path / "s.zarr", zarr_format=2)
    group.create_array("0", data=balls.astype(np.uint16)[:, None])
    kinds = {"t": ("time", "minute"), "c": ("channel", None)}
    described = [(axis, *kinds.get(axis, ("space", "micrometer"))) for axis in f"{along}cyx"]
    axes = [{"name": a, "type": kind} | ({"unit": unit} if unit else {}) for a, kind, unit in described]
    own = [
        {"type": "scale", "scale": [2.5, 1, 0.5, 0.25]},
        {"type": "translation", "translation": [0, 0, 10, 20]},
    ]
    joint = [{"type": "scale", "scale": [2.0, 1, 1, 1]}, {"type": "translation", "translation": [1, 0, 0, 0]}]
    datasets = [{"path": "0", "coordinateTransformations": own}]
    image = {"version": "0.4", "axes": axes, "datasets": datasets, "coordinateTransformations": joint}
    group.attrs["multiscales"] = [image]
    options = VolumeOptions(pixels=True)
    folder = run_volume(oracle16, tmp_path / "s.zarr", tmp_path / "out", options=options).folder
    labels = zarr.open_group(folder / "labels.ome.zarr", mode="r")
    (found,) = labels.attrs["ome"]["multiscales"]
    assert found["axes"] == [axis for axis in axes if axis["name"] != "c"]
    assert found["datasets"][0]["coordinateTransformations"] == [
        {"type": "scale", "scale": [5.0, 0.5, 0.25]},
        {"type": "translation", "translation": [1.0, 10.0, 20.0]},
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "translation", "path": "elsewhere"},
        {"type": "translation", "translation": ["a", 0, 0]},
        {"type": "translation", "translation": [float("nan"), 0, 0]},
        {"type": "scale", "scale": [0, 1, 1]},
    ],
)
def test_labels_begin_at_0_where_the_place_of_an_image_makes_no_sense(
    oracle16: Segmenter, balls: np.ndarray, tmp_path: Path, wrong: dict[str, object]
) -> None:
    group = zarr.create_group(tmp_path / "s.zarr", zarr_format=2)
    group.create_array("0", data=balls.astype(np.uint16))
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    scale = {"type": "scale", "scale": [2, 2, 2]}
    datasets = [{"path": "0", "coordinateTransformations": [scale, wrong]}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    options = VolumeOptions(pixels=True, axis="z")
    folder = run_volume(oracle16, tmp_path / "s.zarr", tmp_path / "out", options=options).folder
    (found,) = zarr.open_group(folder / "labels.ome.zarr", mode="r").attrs["ome"]["multiscales"]
    assert [one["type"] for one in found["datasets"][0]["coordinateTransformations"]] == ["scale"]


def test_a_stack_of_colours_is_none_for_a_model_that_sees_them(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((4, 40, 50, 3), np.uint8), photometric="rgb")
    for channels, told in ((3, False), (1, True)):
        engine = OracleEngine(tile_px=64, channels=channels)
        with Segmenter(engine, make_oracle_manifest(engine, halo_px=16)) as segmenter:
            if told:
                assert not run_volume(segmenter, tmp_path / "s.tif", tmp_path / "out").n_objects
            else:
                with pytest.raises(InputError, match="stack of colour pictures"):
                    run_volume(segmenter, tmp_path / "s.tif", tmp_path / "out")


def test_planes_of_unknown_distance_are_told_to_be_assumed(
    oracle16: Segmenter, balls: np.ndarray, tmp_path: Path
) -> None:
    for name, sizes in (("told", {"PhysicalSizeZ": 0.5}), ("not", {})):
        metadata = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, **sizes}
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", balls.astype(np.uint16), metadata=metadata)
        summary = run_volume(oracle16, tmp_path / f"{name}.ome.tif", tmp_path / "out")
        assert any("how far apart" in warning for warning in summary.warnings) == (name == "not")
        record = json.loads((summary.folder / "run.json").read_text())
        assert record["input"]["voxel_depth_is_known"] == (name == "told")
    tifffile.imwrite(tmp_path / "bare.tif", balls.astype(np.uint16), photometric="minisblack")
    (warning,) = (
        w for w in run_volume(oracle16, tmp_path / "bare.tif", tmp_path / "out").warnings if "voxel" in w
    )
    assert "as far apart as pixels" in warning
    assert "--voxel-size Z,Y,X" in warning


def test_the_overview_shows_voxels_as_deep_as_they_are(
    oracle16: Segmenter, balls: np.ndarray, tmp_path: Path
) -> None:
    sizes = {}
    for depth in (1.0, 3.0):
        tifffile.imwrite(tmp_path / "s.tif", balls.astype(np.uint16), metadata={"axes": "ZYX"})
        options = VolumeOptions(voxel_nm=(depth, 1.0, 1.0), overwrite=True)
        folder = run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out", options=options).folder
        with Image.open(folder / "overview.png") as picture:
            sizes[depth] = picture.size
    # 60 x 70 voxels across z, 20 deep, 14 times enlarged; the width of the other is that of the best objects
    assert sizes[3.0][0] == 60 * 14 + 8 + 3 * 20 * 14
    assert sizes[3.0][0] > sizes[1.0][0]


def test_a_model_that_knows_its_scale_asks_for_the_voxel_size(tmp_path: Path, balls: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "s.tif", balls, metadata={"axes": "ZYX"})
    engine = OracleEngine(tile_px=64, channels=1)
    manifest = make_oracle_manifest(engine, halo_px=16)
    manifest = replace(manifest, input=replace(manifest.input, mpp=0.001))
    with Segmenter(engine, manifest) as segmenter:
        with pytest.raises(InputError, match=r"no voxel size.*--voxel-size"):
            run_volume(segmenter, tmp_path / "s.tif", tmp_path / "out")
        options = VolumeOptions(voxel_nm=(1.0, 1.0, 1.0))
        assert run_volume(segmenter, tmp_path / "s.tif", tmp_path / "told", options=options).n_objects


def test_table_and_labels_count_the_same_voxels(tmp_path: Path) -> None:
    field = np.asarray(Image.open(_FIELD).convert("L"))[:256, :256]
    shifted = [np.roll(field, 3 * k, axis=1) for k in range(4)]  # chains that run into each other
    tifffile.imwrite(tmp_path / "s.tif", np.stack(shifted), metadata={"axes": "ZYX"})
    with darcnn.runtime.load("nuclei-fluorescence", min_score=0.3) as segmenter:
        folder = run_volume(
            segmenter, tmp_path / "s.tif", tmp_path / "out", options=VolumeOptions(diameter_px=25.0)
        ).folder
    table = pq.read_table(folder / "objects.parquet").to_pandas()
    labels = np.asarray(zarr.open_array(folder / "labels.ome.zarr/0", mode="r")[:])
    assert len(table) > 3
    assert np.array_equal(np.bincount(labels.ravel(), minlength=len(table) + 1)[1:], table.volume_voxels)
    at = np.argwhere(labels == 1)
    assert np.allclose(table.loc[0, ["z", "y", "x"]].astype(float), at.mean(axis=0) + 0.5, atol=1e-3)


def test_a_series_is_told_to_be_one(oracle16: Segmenter, balls: np.ndarray, tmp_path: Path) -> None:
    wide = np.pad(balls, ((0, 0), (0, 250), (0, 250)))  # its labels have two levels
    metadata = {"axes": "TYX", "PhysicalSizeX": 0.3, "PhysicalSizeY": 0.3}
    tifffile.imwrite(tmp_path / "s.ome.tif", wide.astype(np.uint16), metadata=metadata)
    summary = run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "out")
    assert summary.warnings == ()
    record = json.loads((summary.folder / "run.json").read_text())
    assert (record["input"]["is_series"], record["input"]["pixel_um_yx"]) == (True, [0.3, 0.3])
    labels = zarr.open_group(summary.folder / "labels.ome.zarr", mode="r")
    image = labels.attrs["ome"]["multiscales"][0]
    assert [axis["name"] for axis in image["axes"]] == ["t", "y", "x"]
    scales = [level["coordinateTransformations"][0]["scale"] for level in image["datasets"]]
    assert np.allclose(scales, [[1, 0.3, 0.3], [1, 0.6, 0.6]])
    assert [axis.get("unit") for axis in image["axes"]] == [None, "micrometer", "micrometer"]
    assert np.array_equal(labels["1"][:], labels["0"][:, ::2, ::2])
    assert labels["1"][:].any()


def test_a_series_has_a_row_for_each_object_and_time_point(oracle16: Segmenter, tmp_path: Path) -> None:
    """Two cells: one drifts and is away for a time point, one leaps further than it is wide."""
    series = np.zeros((5, 2, 60, 90), np.uint16)
    for t in range(5):
        if t != 2:
            series[t, 0, 10:18, 5 + 2 * t : 13 + 2 * t] = 1
        series[t, 0, 40:48, 4 + 11 * t : 12 + 11 * t] = 2
    series[:, 1] = 100 * np.arange(5)[:, None, None]
    metadata = {"axes": "TCYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Channel": {"Name": ["a", "b"]}}
    metadata |= {"TimeIncrement": 2.5, "TimeIncrementUnit": "min"}
    tifffile.imwrite(tmp_path / "s.ome.tif", series, metadata=metadata)
    options = VolumeOptions(channel="a", also=("csv",))
    folder = run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "out", options=options).folder
    objects = pq.read_table(folder / "objects.parquet").to_pandas()
    assert objects[["t_first", "t_last", "n_time_points"]].to_numpy().tolist() == [[0, 4, 4], [0, 4, 5]]
    assert (objects.area_px.tolist(), objects.area_um2.tolist()) == ([64, 64], [16, 16])
    assert not objects.truncated.any()
    assert not {"z", "volume_voxels", "sphericity", "diameter_nm"} & set(objects)
    table = pq.read_table(folder / "tracks.parquet").to_pandas()
    assert table[["id", "t"]].to_numpy().tolist() == [
        [1, 0], [2, 0], [1, 1], [2, 1], [2, 2], [1, 3], [2, 3], [1, 4], [2, 4]
    ]  # fmt: skip
    assert table.time_s.tolist() == [150.0 * t for t in table.t]
    drifting, leaping = table[table.id == 1], table[table.id == 2]
    assert drifting.x.tolist() == [9, 11, 15, 17]
    assert leaping.x.tolist() == [8, 19, 30, 41, 52]
    assert (table.area_um2 == 16.0).all()
    assert drifting.mean_intensity_b.tolist() == [0, 100, 300, 400]
    assert not table.truncated.any()
    labels = np.asarray(zarr.open_array(folder / "labels.ome.zarr/0", mode="r")[:])
    assert np.array_equal(labels > 0, series[:, 0] > 0)
    assert len((folder / "tracks.csv").read_text().splitlines()) == 10
    assert not (folder / "particles.star").exists()
    with Image.open(folder / "overview.png") as picture:
        assert picture.size == (3 * 630 + 2 * 8, 420 + 36)  # three time points, seven times as large
        last = np.asarray(picture.convert("RGB"))[:420, -630:].astype(int)
    is_coloured = np.ptp(last, axis=2) > 80
    assert is_coloured[7 * 44, 7 * 30]  # where the leaping cell has been
    assert not is_coloured[7 * 30].any()
    (folder / "tracks.csv").unlink()
    run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "out", options=options)
    assert (folder / "tracks.csv").exists()
    with pytest.raises(UsageError, match="--axis"):
        run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "x", options=replace(options, axis="all"))
    with pytest.raises(UsageError, match="--slab"):
        run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "x", options=replace(options, n_joined=3))
    large = replace(options, row_filter="area_um2 > 20", overwrite=True)
    assert run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "out", options=large).n_objects == 0


def test_labels_of_stacks_and_series_as_tiff(oracle16: Segmenter, balls: np.ndarray, tmp_path: Path) -> None:
    for axes, order in (("ZYX", "ZYX"), ("TYX", "TYX")):
        metadata = {"axes": axes, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
        tifffile.imwrite(tmp_path / f"{axes}.ome.tif", balls.astype(np.uint16), metadata=metadata)
        options = VolumeOptions(also=("labels-tiff",), axis="z")
        folder = run_volume(oracle16, tmp_path / f"{axes}.ome.tif", tmp_path / "out", options=options).folder
        expected = np.asarray(zarr.open_array(folder / "labels.ome.zarr/0", mode="r")[:])
        with tifffile.TiffFile(folder / "labels.ome.tiff") as tiff:
            assert tiff.series[0].axes == order
            assert np.array_equal(tiff.asarray(), expected)
            assert 'PhysicalSizeX="0.5"' in str(tiff.ome_metadata)
            assert ('PhysicalSizeZ="2.0"' in str(tiff.ome_metadata)) == (axes == "ZYX")
        at_once = (folder / "labels.ome.tiff").read_bytes()
        (folder / "labels.ome.tiff").unlink()
        run_volume(oracle16, tmp_path / f"{axes}.ome.tif", tmp_path / "out", options=options)
        assert (folder / "labels.ome.tiff").read_bytes() == at_once


def test_a_flash_does_not_blind_the_whole_stack() -> None:
    random = np.random.default_rng(0)
    planes = random.normal(100, 5, (14, 64, 64)).astype(np.float32)
    planes[:, 20:40, 20:40] += 400
    rule = IntensityRule("percentile", low=0.5, high=99.8)
    steady = window_of(planes, rule)
    assert 480 < steady.high < 540
    planes[3] += 40_000
    flashed = window_of(planes, rule)
    assert abs(flashed.high - steady.high) < 10
    for empty in (
        0,
        random.normal(80, 5, (10, 64, 64)),
    ):  # what shows objects is no flash
        hazy = planes.copy()
        hazy[3] -= 40_000
        hazy[4:] = empty
        assert window_of(hazy, rule).high > 450


def window_of(planes: np.ndarray, rule: IntensityRule) -> Window:
    class Planes(Volume):
        def read(self, axis: Axis, index: int) -> np.ndarray:
            return planes[index].copy()

    info = VolumeInfo(Path("a"), "a", planes.shape, planes.dtype)
    return measure_stack(Stack(Planes(info, Stored(Path("a"), planes.dtype)), "z"), rule, scale=1.0)


def test_planes_without_a_name_are_a_series_when_told(oracle16: Segmenter, tmp_path: Path) -> None:
    planes = np.zeros((4, 60, 90), np.uint16)
    for t in range(4):
        planes[t, 40:48, 4 + 11 * t : 12 + 11 * t] = 2
    tifffile.imwrite(tmp_path / "s.tif", planes, photometric="minisblack")
    as_volume = run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out")
    assert as_volume.n_objects == 4
    assert any("--series" in warning for warning in as_volume.warnings)
    options = VolumeOptions(series=True, voxel_nm=(500.0, 500.0, 500.0), overwrite=True)
    summary = run_volume(oracle16, tmp_path / "s.tif", tmp_path / "out", options=options)
    assert (summary.n_objects, summary.warnings) == (1, ())
    table = pq.read_table(summary.folder / "tracks.parquet").to_pandas()
    assert table.t.tolist() == [0, 1, 2, 3]
    assert (table.area_um2 == 16.0).all()


def test_values_that_are_not_finite_count_for_nothing_and_a_channel_keeps_its_name(
    oracle16: Segmenter, tmp_path: Path
) -> None:
    series = np.zeros((3, 60, 90), np.float32)
    series[:, 10:18, 5:13] = 1
    series[1, 12, 7] = np.nan
    metadata = {"axes": "TYX", "Channel": {"Name": ["DAPI"]}}
    tifffile.imwrite(tmp_path / "s.ome.tif", series, metadata=metadata)
    folder = run_volume(oracle16, tmp_path / "s.ome.tif", tmp_path / "out").folder
    table = pq.read_table(folder / "tracks.parquet").to_pandas()
    assert table.mean_intensity_DAPI.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_a_stack_of_tissue_without_a_voxel_size_is_measured_first(tmp_path: Path) -> None:
    with Image.open(_TISSUE) as picture:
        grey = np.asarray(picture.convert("L"))[:256, :256]
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([grey] * 2), metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "white.tif", np.full((2, 90, 90), 250, np.uint8), metadata={"axes": "ZYX"})
    with darcnn.runtime.load("nuclei-he") as segmenter:
        found = run_volume(segmenter, tmp_path / "stack.tif", tmp_path / "out")
        assert not run_volume(segmenter, tmp_path / "white.tif", tmp_path / "out").n_objects
    assert found.n_objects > 3
    assert found.measured_px is not None


def test_a_filter_leaves_out_objects_and_numbers_the_others_anew(
    oracle16: Segmenter, mrc_file: Path, balls: np.ndarray, tmp_path: Path
) -> None:
    sizes = np.bincount(balls.ravel())[1:]
    limit = int(np.median(sizes))
    options = VolumeOptions(row_filter=f"volume_voxels > {limit} and sphericity > 0.5")
    folder = run_volume(oracle16, mrc_file, tmp_path / "out", options=options).folder
    table = pq.read_table(folder / "objects.parquet")
    assert 0 < table.num_rows <= (sizes > limit).sum()
    assert table["id"].to_pylist() == list(range(1, table.num_rows + 1))
    labels = zarr.open_group(folder / "labels.ome.zarr", mode="r")["0"][:]
    assert len(np.unique(labels)) == table.num_rows + 1
    counts = json.loads((folder / "run.json").read_text())["counts"]
    assert (counts["objects"], counts["filtered"]) == (table.num_rows, len(sizes) - table.num_rows)
    none = VolumeOptions(row_filter="volume_voxels < 0", overwrite=True)
    summary = run_volume(oracle16, mrc_file, tmp_path / "out", options=none)
    assert summary.warnings[0] == f"--filter leaves out every object that was found ({len(sizes)})"
    with pytest.raises(UsageError, match="--filter"):
        run_volume(oracle16, mrc_file, tmp_path / "no", options=VolumeOptions(row_filter="area_px > 3"))


@pytest.mark.parametrize(
    ("slab", "nominal_px", "voxel_nm", "axes"),
    [
        (Slab(0.0), 5.0, None, ["z", "y", "x"]),
        (None, 5.0, None, ["z"]),  # no model of tomograms
        (Slab(0.0), 14.0, None, ["z"]),  # 20 planes are no three objects
        (Slab(0.0), 5.0, (3.0, 1.0, 1.0), ["z"]),  # no cubes
    ],
)
def test_three_axes_are_looked_along_where_that_serves_model_and_volume(
    slab: Slab | None,
    nominal_px: float,
    voxel_nm: tuple[float, float, float] | None,
    axes: list[str],
    oracle16: Segmenter,
    mrc_file: Path,
    balls: np.ndarray,
    tmp_path: Path,
) -> None:
    manifest = oracle16.manifest
    sizes = replace(manifest.input, slab=slab, nominal_diameter_px=nominal_px)
    segmenter = Segmenter(oracle16.engine, replace(manifest, input=sizes))
    summary = run_volume(segmenter, mrc_file, tmp_path / "out", options=VolumeOptions(voxel_nm=voxel_nm))
    record = json.loads((summary.folder / "run.json").read_text())
    assert record["network"]["axes"] == axes
    assert record["counts"]["objects"] == balls.max()
    assert record["counts"].get("by_axis", {}) == (dict.fromkeys(axes, balls.max()) if len(axes) > 1 else {})


def test_three_axes_are_looked_along_where_the_size_of_a_voxel_is_not_known(
    oracle16: Segmenter, mrc_file: Path, tmp_path: Path
) -> None:
    """Headers of tomograms often hold no size, and the diameter tells the scale."""
    import mrcfile

    with mrcfile.open(mrc_file, "r+") as file:
        file.voxel_size = 1.0
    model = replace(oracle16.manifest.input, slab=Slab(0.0), nominal_diameter_px=5.0)
    segmenter = Segmenter(oracle16.engine, replace(oracle16.manifest, input=model))
    with open_volume(mrc_file, tmp_path) as volume:
        assert volume.info.voxel_nm is None
        assert len(find.plan_views(segmenter, volume, "auto", diameter_px=5.0)) == 3


def test_a_volume_too_large_for_the_memory_is_looked_at_along_z(
    oracle16: Segmenter, mrc_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(oracle16.manifest.input, slab=Slab(0.0), nominal_diameter_px=5.0)
    segmenter = Segmenter(oracle16.engine, replace(oracle16.manifest, input=sizes))
    n_bytes = 20 * 70 * 60 * 2
    with open_volume(mrc_file, tmp_path) as volume:
        for most, n_axes in ((n_bytes, 3), (n_bytes - 1, 1)):
            monkeypatch.setattr(find, "_MOST_BYTES", most)
            assert len(find.plan_views(segmenter, volume, "auto")) == n_axes
            assert len(find.plan_views(segmenter, volume, "all")) == 3


def test_axes_that_disagree_are_told(mrc_file: Path, tmp_path: Path) -> None:
    with open_volume(mrc_file, tmp_path) as volume:
        found = Agreement({"z": 100, "y": 60, "x": 80}, n_agreed=79)
        (warning,) = VolumeCounts(3, 3, found, 9).warnings(volume)
        assert warning.startswith("two axes agree on 79 objects where one alone finds 100")
        assert "alone" not in warning.split("finds 100")[1]
        (warning,) = VolumeCounts(3, 3, replace(found, is_of_one=True), 9).warnings(volume)
        assert warning.endswith("; these are the objects of planes across z alone")
        assert not VolumeCounts(3, 3, replace(found, n_agreed=80), 9).warnings(volume)
        assert not VolumeCounts(0, 0, Agreement({"z": 1}), 9).warnings(volume)[1:]  # that there are none


@pytest.mark.parametrize("axis", ["auto", "all"])
def test_where_axes_agree_on_little_one_of_them_decides_unless_all_were_asked_for(
    axis: Literal["auto", "all"],
    oracle16: Segmenter,
    mrc_file: Path,
    balls: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = replace(oracle16.manifest.input, slab=Slab(0.0), nominal_diameter_px=5.0)
    segmenter = Segmenter(oracle16.engine, replace(oracle16.manifest, input=sizes))
    monkeypatch.setattr(joining, "agree", lambda views: [views[0][0]])  # all but one are noise
    summary = run_volume(segmenter, mrc_file, tmp_path / "out", options=VolumeOptions(axis=axis))
    assert summary.n_objects == (balls.max() if axis == "auto" else 1)
    assert any(one.endswith("across z alone") for one in summary.warnings) == (axis == "auto")


def test_one_axis_decides_only_where_it_has_found_more(
    oracle16: Segmenter, mrc_file: Path, balls: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(oracle16.manifest.input, slab=Slab(0.0), nominal_diameter_px=5.0)
    segmenter = Segmenter(oracle16.engine, replace(oracle16.manifest, input=sizes))
    monkeypatch.setattr(agree, "_FEW", 1.01)
    summary = run_volume(segmenter, mrc_file, tmp_path / "out")
    assert summary.n_objects == balls.max()
    (warning,) = summary.warnings
    assert warning.startswith("two axes agree on")
    assert not warning.endswith("alone")


def test_voxels_that_are_no_cubes_are_looked_at_along_z_only(
    oracle16: Segmenter, mrc_file: Path, tmp_path: Path
) -> None:
    options = VolumeOptions(voxel_nm=(3.0, 1.0, 1.0))
    summary = run_volume(oracle16, mrc_file, tmp_path / "out", options=options)
    record = json.loads((summary.folder / "run.json").read_text())
    assert record["input"]["voxel_nm_zyx"] == [3.0, 1.0, 1.0]
    assert record["input"]["voxel_source"] == "--voxel-size"
    with pytest.raises(InputError, match="no cubes"):
        run_volume(oracle16, mrc_file, tmp_path / "all", options=replace(options, axis="all"))
    assert not (tmp_path / "all" / "balls").exists()


def test_an_empty_volume_has_a_complete_result(oracle16: Segmenter, tmp_path: Path) -> None:
    import mrcfile

    with mrcfile.new(tmp_path / "none.mrc") as file:
        file.set_data(np.zeros((3, 40, 40), np.uint16))
    summary = run_volume(oracle16, tmp_path / "none.mrc", tmp_path / "out")
    assert summary.n_objects == 0
    assert "no objects found" in summary.warnings
    assert pq.read_table(summary.folder / "objects.parquet").num_rows == 0
    assert starfile.read(summary.folder / "particles.star") is not None


def test_without_starfile_a_stack_is_searched_and_the_run_says_what_lacks(
    oracle16: Segmenter, mrc_file: Path, balls: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "starfile", None)
    summary = run_volume(oracle16, mrc_file, tmp_path / "out")
    assert summary.n_objects == balls.max()
    assert not (summary.folder / "particles.star").exists()
    assert (summary.folder / "particles.txt").exists()
    (warning,) = (line for line in summary.warnings if "star" in line)
    assert warning == "particles.star is left out: pip install 'darcnn[volumes]', then --overwrite"


def test_a_disk_that_fills_at_the_labels_is_one_line_and_loses_nothing(
    oracle16: Segmenter, mrc_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zarr.storage.LocalStore.set", full)
        with pytest.raises(OutputError, match="no space left on the disk"):
            run_volume(oracle16, mrc_file, tmp_path / "out")
    assert {one.name for one in (tmp_path / "out" / "balls").iterdir()} <= {".parts", ".lock"}
    seen: list[int] = []
    run_volume(oracle16, mrc_file, tmp_path / "out", progress=lambda done, total, **more: seen.append(done))
    assert seen == [20]  # at once: nothing had to be searched again


def test_planes_without_values_have_no_objects_and_disturb_no_others(
    oracle: Segmenter, balls: np.ndarray, tmp_path: Path
) -> None:
    import mrcfile

    values = balls.astype(np.float32)
    values[5] = np.nan
    values[6] = 0.0
    with mrcfile.new(tmp_path / "holes.mrc") as file:
        file.set_data(values)
    rule = IntensityRule("range", 0.0, 255.0)
    manifest = replace(oracle.manifest, input=replace(oracle.manifest.input, intensity=rule))
    summary = run_volume(Segmenter(oracle.engine, manifest), tmp_path / "holes.mrc", tmp_path / "out")
    labels = zarr.open_group(summary.folder / "labels.ome.zarr", mode="r")["0"][:]
    assert not labels[5:7].any()  # two planes in a row are an end
    assert np.array_equal(labels[:5] > 0, balls[:5] > 0)
    assert np.array_equal(labels[7:] > 0, balls[7:] > 0)


@pytest.mark.slow
def test_a_size_that_was_measured_is_told_and_a_given_one_is_not(tmp_path: Path) -> None:
    field = np.asarray(Image.open(_FIELD).convert("L"))[:256, :256]
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([field] * 2), metadata={"axes": "ZYX"})
    with darcnn.runtime.load("nuclei-fluorescence") as segmenter:
        run = partial(run_volume, segmenter, tmp_path / "stack.tif")
        measured, again = (run(tmp_path / "measured") for _ in range(2))
        given = run(tmp_path / "given", options=VolumeOptions(diameter_px=25.0))
    assert measured.measured_px is not None
    assert 15 < measured.measured_px < 40  # nuclei there are some 25 px wide
    assert again.was_done
    assert again.measured_px == measured.measured_px
    record = json.loads((measured.folder / "run.json").read_text())
    assert record["network"]["diameter_px"] == measured.measured_px
    assert given.measured_px is None
