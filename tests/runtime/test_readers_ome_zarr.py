"""OME-Zarr of either version, near and far: axes and sizes as its metadata say, one line where it is bad."""

import json
import random
from importlib.util import find_spec

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from darcnn.runtime.cli import main
from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Region
from darcnn.runtime.pipeline import RunOptions, run_slide
from darcnn.runtime.readers import count_planes, open_source
from darcnn.runtime.readers.ome_zarr import OmeZarrReader
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.slide_list import list_slides

UNITS = {"unit": "micrometer"}


def write(path, pixels, axes, *, version="0.5", units=UNITS, scale=None, omero=None):
    """Write one level; `axes` are letters."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    group.create_array("0", data=pixels, chunks=tuple(min(64, n) for n in pixels.shape))
    entries = [{"name": name, "type": "space", **(units if name in "zyx" else {})} for name in axes]
    transformations = [{"type": "scale", "scale": scale or [1.0] * len(axes)}]
    content = {
        "multiscales": [
            {
                "version": version,
                "axes": entries,
                "datasets": [{"path": "0", "coordinateTransformations": transformations}],
            }
        ]
    }
    if omero is not None:
        content["omero"] = {"channels": omero}
    group.attrs.update({"ome": content} if version == "0.5" else content)
    return path


def read_all(path, **planes):
    with open_source(path, **planes) as reader:
        info = reader.info
        return info, reader.read(Region(0, 0, info.width_px0, info.height_px0), level=0)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_axes_channels_and_sizes_are_what_the_metadata_say(tmp_path, version):
    pixels = np.arange(2 * 3 * 4 * 20 * 30, dtype=np.uint16).reshape(2, 3, 4, 20, 30)
    omero = [{"label": "DAPI"}, {"label": "GFP", "color": "00FF00"}, {}]
    scale = [1, 1, 3, 250, 500]
    path = write(
        tmp_path / "a.ome.zarr",
        pixels,
        "tczyx",
        version=version,
        units={"unit": "nanometer"},
        scale=scale,
        omero=omero,
    )
    info, found = read_all(path, z=2, t=1)
    assert np.array_equal(found, np.moveaxis(pixels[1, :, 2], 0, 2))
    assert info.channel_names == ("DAPI", "GFP", "channel_2")
    assert (info.name, info.mpp, info.mpp_source) == ("a", (0.5, 0.25), "OME-Zarr scale")
    planes = count_planes(path)
    assert (planes.n_z, planes.n_t) == (4, 2)
    with pytest.raises(InputError, match="--z N with N from 0 to 3"):
        open_source(path, t=0)


def test_scales_of_the_image_and_of_the_level_multiply(tmp_path):
    path = write(tmp_path / "a.zarr", np.zeros((8, 9), np.uint8), "yx", scale=[0.5, 0.5])
    group = zarr.open_group(path)
    content = group.attrs["ome"]
    content["multiscales"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [0.5, 1.0]}]
    group.attrs["ome"] = content
    assert read_all(path)[0].mpp == (0.5, 0.25)


def test_without_a_unit_the_pixel_size_is_unknown(tmp_path):
    assert read_all(write(tmp_path / "a.zarr", np.zeros((8, 9), np.uint8), "yx", units={}))[0].mpp is None


@pytest.mark.parametrize("unit", ["micrometer", "nanometer", None])
@pytest.mark.parametrize("axes", ["yx", "cyx", "zyx"])
def test_labels_lie_over_the_plane_they_are_of(tmp_path, unit, axes):
    pixels = np.zeros((60, 50) if axes == "yx" else (3, 60, 50), np.uint8)
    scale, place = [4.0, 0.5, 0.25][-len(axes) :], [7.0, 1000.0, 2000.0][-len(axes) :]
    path = write(tmp_path / "a.zarr", pixels, axes, units={"unit": unit} if unit else {}, scale=scale)
    group = zarr.open_group(path)
    content = group.attrs["ome"]
    (level,) = content["multiscales"][0]["datasets"]
    level["coordinateTransformations"].append({"type": "translation", "translation": place})
    group.attrs["ome"] = content
    engine = OracleEngine(tile_px=64, channels=1)
    manifest = make_oracle_manifest(engine, halo_px=16)
    for mpp in (None, 2.0):
        options = RunOptions(channel=0 if "c" in axes else None, mpp=mpp, pixels=True)
        with (
            Segmenter(engine, manifest) as segmenter,
            open_source(path, z=1 if "z" in axes else None) as reader,
        ):
            folder = run_slide(segmenter, reader, tmp_path / str(mpp), options=options).folder
        (found,) = zarr.open_group(folder / "labels.ome.zarr", mode="r").attrs["ome"]["multiscales"]
        told = found["datasets"][0]["coordinateTransformations"]
        if mpp is None:
            assert [axis.get("unit") for axis in found["axes"]] == [unit, unit]
            assert [one[one["type"]] for one in told] == [[0.5, 0.25], [1000.0, 2000.0]]
        else:  # what the user says goes before the file
            assert [axis["unit"] for axis in found["axes"]] == ["micrometer", "micrometer"]
            assert [one[one["type"]] for one in told] == [[2.0, 2.0]]


def test_three_bytes_are_colours_unless_the_file_says_other_ones(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 20, 30)).astype(np.uint8)
    colours = [{"color": colour} for colour in ("FF0000", "00ff00", "0000FF")]
    assert read_all(write(tmp_path / "a.zarr", pixels, "cyx"))[0].is_rgb
    assert read_all(write(tmp_path / "b.zarr", pixels, "cyx", omero=colours))[0].is_rgb
    assert not read_all(write(tmp_path / "c.zarr", pixels, "cyx", omero=colours[::-1]))[0].is_rgb
    assert not read_all(write(tmp_path / "d.zarr", pixels.astype(np.uint16), "cyx"))[0].is_rgb
    info, found = read_all(write(tmp_path / "e.zarr", np.moveaxis(pixels, 0, 2), "yxc"))
    assert info.is_rgb
    assert np.array_equal(found, np.moveaxis(pixels, 0, 2))


def test_the_first_image_of_a_converted_file_is_read(tmp_path):
    zarr.create_group(tmp_path / "a.zarr", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write(tmp_path / "a.zarr" / "0", np.full((8, 9), 7, np.uint8), "yx", version="0.4")
    assert read_all(tmp_path / "a.zarr")[1].min() == 7


def test_what_is_no_image_is_one_line(tmp_path):
    zarr.create_group(tmp_path / "plate.zarr").attrs["ome"] = {"plate": {"wells": []}}
    zarr.create_group(tmp_path / "group.zarr")
    zarr.create_array(tmp_path / "array.zarr", data=np.zeros((3, 3)))
    complex_ = write(tmp_path / "complex.zarr", np.zeros((8, 9), np.complex64), "yx")
    six = write(tmp_path / "six.zarr", np.zeros((2, 8, 9), np.uint8), "qyx")
    for path, message in (
        (tmp_path / "plate.zarr", "is a plate"),
        (tmp_path / "group.zarr", "is no OME-Zarr image"),
        (tmp_path / "array.zarr", "is an array without the metadata"),
        (complex_, "cannot be read"),
        (six, "has axes q y x"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(path)


@pytest.mark.parametrize("other", [np.zeros((2, 20, 25), np.uint16), np.zeros((4, 20, 25), np.uint8)])
def test_levels_of_other_planes_or_types_are_left_out(tmp_path, other):
    path = write(tmp_path / "a.zarr", np.zeros((4, 40, 50), np.uint16), "zyx")
    group = zarr.open_group(path)
    group.create_array("thin", data=other)
    content = dict(group.attrs["ome"])
    content["multiscales"][0]["datasets"].append({"path": "thin"})
    group.attrs["ome"] = content
    with open_source(path, z=3) as reader:
        assert [level.width_px for level in reader.info.levels] == [50]


def test_mutated_metadata_never_end_in_anything_but_one_line(tmp_path):
    path = write(
        tmp_path / "a.zarr",
        np.arange(3 * 40 * 50, dtype=np.uint16).reshape(3, 40, 50),
        "cyx",
        scale=[1, 0.5, 0.5],
    )
    chance = random.Random(0)
    victims = [path / "zarr.json", path / "0" / "zarr.json", path / "0" / "c" / "0" / "0" / "0"]
    originals, said = [victim.read_bytes() for victim in victims], []
    for _ in range(150):
        which = chance.randrange(3)
        content = bytearray(originals[which])
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(content))
            content[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
        victims[which].write_bytes(content)
        try:
            read_all(path)
        except InputError as err:
            said.append(str(err))
        victims[which].write_bytes(originals[which])
    assert len(said) > 50
    assert not any("\n" in line for line in said)


def test_a_url_is_read_as_a_folder_is_and_says_when_it_vanishes(served):
    folder, address, stop = served
    pixels = np.random.default_rng(1).integers(1, 999, (130, 200)).astype(np.uint16)
    write(folder / "a b.ome.zarr", pixels, "yx", scale=[0.5, 0.5])
    url = f"{address}/a%20b.ome.zarr"
    near, _ = read_all(folder / "a b.ome.zarr")
    with open_source(url) as reader:
        assert isinstance(reader, OmeZarrReader)
        info = reader.info
        assert (info.path, info.mpp, info.digest) == (url, near.mpp, near.digest)
        assert np.array_equal(reader.read(Region(60, 60, 70, 70), level=0)[:, :, 0], pixels[60:70, 60:70])
        stop()
        with pytest.raises(InputError, match="check the address and the network"):
            reader.read(Region(190, 120, 200, 130), level=0)
    with pytest.raises(InputError, match="check the address and the network"):
        open_source(f"{address}/other.zarr")


def test_a_run_takes_folders_and_urls(served, tmp_path):
    folder, address, _ = served
    labels = np.zeros((100, 120), np.int32)
    labels[10:24, 10:24], labels[60:74, 80:94] = 1, 2
    write(folder / "a.ome.zarr", np.moveaxis(encode_labels(labels), 2, 0), "cyx", scale=[1, 0.5, 0.5])
    engine = OracleEngine(tile_px=64, mask_px=48)
    results = []
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=16)) as segmenter:
        for name, source in (("near", folder / "a.ome.zarr"), ("far", f"{address}/a.ome.zarr")):
            with open_source(source) as reader:
                summary = run_slide(segmenter, reader, tmp_path / name)
            assert (summary.name, summary.n_objects) == ("a", 2)
            results.append((summary.folder / "objects.parquet").read_bytes())
    record = json.loads((summary.folder / "run.json").read_text())
    assert record["input"]["file"]["of"] == "metadata"
    assert results[0] == results[1]


def test_inputs_may_be_folders_of_zarr_and_urls(tmp_path):
    write(tmp_path / "b.ome.zarr", np.zeros((8, 9), np.uint8), "yx")
    write(tmp_path / "plain", np.zeros((8, 9), np.uint8), "yx")
    (tmp_path / "a.png").touch()
    found = list_slides([str(tmp_path), str(tmp_path / "plain"), "https://nowhere.invalid/x/c.zarr"])
    names = ["a.png", "b.ome.zarr", "plain"]
    assert list(found) == [*(tmp_path / name for name in names), "https://nowhere.invalid/x/c.zarr"]


def test_errors_of_any_network_are_one_line():
    fsspec = pytest.importorskip("fsspec", reason="needs the extra remote")

    class NoCredentialsError(Exception):
        """What a store's own library raises."""

    class Locked(fsspec.AbstractFileSystem):
        protocol = "locked"

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            raise NoCredentialsError("no credentials")

    fsspec.register_implementation("locked", Locked, clobber=True)
    with pytest.raises(InputError, match=r"no credentials.*check the address"):
        open_source("locked://bucket/a.zarr")


def test_the_package_of_a_kind_of_store_is_named():
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    if find_spec("s3fs") is not None:
        pytest.skip("s3fs is installed")
    with pytest.raises(InputError, match=r"pip install 'darcnn\[remote\]' s3fs"):
        open_source("s3://bucket/a.zarr")


def test_an_address_that_does_not_answer_is_one_line(tmp_path):
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    result = CliRunner().invoke(
        main,
        [
            "http://127.0.0.1:1/a.zarr",
            "unknown://a/b.zarr",
            "--model",
            "nuclei-he",
            "--out",
            str(tmp_path / "out"),
        ],
    )
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 2
    assert "check the address" in result.stderr
