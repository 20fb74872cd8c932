"""Images that a bundle is made with: which they are, and the scale that they tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image

from darcnn.export import cli
from darcnn.export.tiles import TileSource, images_in, images_of, learned_images, measure_mpp, read_tiles
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.load import find_bundle
from darcnn.training.checkpoint import CheckpointInfo, load_network, save_checkpoint
from darcnn.training.config import TargetSet


@pytest.fixture
def write(tmp_path, make_picture):
    """Writes a TIFF picture of so many micrometres per pixel."""

    def call(name, um=None):
        resolution = (
            {} if um is None else {"resolution": (1e4 / um, 1e4 / um), "resolutionunit": "CENTIMETER"}
        )
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, make_picture(len(name)), photometric="rgb", **resolution)
        return path

    return call


def test_pixel_size_and_diameter_tell_the_scale(write):
    sources = [TileSource(write("a.tif", 0.5), 8.0), TileSource(write("b.tif", 0.25), 17.0)]
    assert measure_mpp(sources, 16.0) == pytest.approx((0.25 + 0.265625) / 2, rel=1e-3)


def test_where_an_image_tells_nothing_there_is_no_scale(write):
    told = TileSource(write("a.tif", 0.5), 8.0)
    assert measure_mpp([told, TileSource(write("b.tif"), 8.0)], 16.0) is None
    assert measure_mpp([told, TileSource(told.path)], 16.0) is None


def test_images_of_several_scales_tell_none(write):
    path = write("a.tif", 0.5)
    assert measure_mpp([TileSource(path, 8.0), TileSource(path, 11.0)], 16.0) is None


def test_a_volume_tells_it_by_its_voxel_size(tmp_path):
    mrcfile = pytest.importorskip("mrcfile", reason="volumes need the extra volumes")
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(np.zeros((4, 8, 8), np.float32))
        file.voxel_size = 10.5  # Angstrom
    assert measure_mpp([TileSource(tmp_path / "a.mrc", 10.0)], 28.0) == pytest.approx(0.000375)


def test_a_folder_is_searched_for_what_the_recipe_names(write, checkpoint):
    recipe = load_network(checkpoint)[1].recipe
    recipe = replace(recipe, target=replace(recipe.target, sets=(TargetSet("a*.tif", 8.0),)))
    a, b = write("a.tif"), write("b.tif")
    assert images_of(recipe, a.parent) == [TileSource(a, 8.0)]
    a.unlink()
    assert images_of(recipe, b.parent) == [TileSource(b)]  # nothing of that name: what there is


@pytest.mark.usefixtures("makes_no_graphs")
def test_the_bundle_holds_the_scale_that_its_images_tell(write, checkpoint, tmp_path, capsys):
    network, info = load_network(checkpoint)
    folder = write("a.tif", 0.5).parent
    target = replace(info.recipe.target, sets=(TargetSet("*.tif", 8.0),))
    save_checkpoint(
        tmp_path / "run", network, CheckpointInfo("refine", 7, True, replace(info.recipe, target=target))
    )
    paths = [str(tmp_path / "run"), "--data", str(folder), "--out", str(tmp_path / "a.darcnn")]
    with pytest.raises(SystemExit) as done:
        cli.main(["bundle", *paths, "--batch", "2"])
    assert done.value.code == 0
    assert "0.25 um per network pixel" in capsys.readouterr().err
    assert open_bundle(tmp_path / "a.darcnn").manifest.input.mpp == 0.25


def test_images_to_verify_on_do_not_tell_the_scale_where_those_learned_from_are_at_hand(
    write, checkpoint, tmp_path
):
    recipe = load_network(checkpoint)[1].recipe
    own = write("a.tif", 0.5)
    others = tmp_path / "others"
    others.mkdir()
    write("b.tif", 2.0).rename(others / "b.tif")
    recipe = replace(
        recipe, data=str(own.parent), target=replace(recipe.target, sets=(TargetSet("*.tif", 8.0),))
    )
    assert images_of(recipe, others) == [TileSource(others / "b.tif", 8.0)]
    assert learned_images(recipe, others) == [TileSource(own, 8.0)]
    assert learned_images(replace(recipe, data="nowhere"), others) == [TileSource(others / "b.tif", 8.0)]
    assert measure_mpp(learned_images(replace(recipe, data="nowhere"), tmp_path), 16.0) is None


def test_images_of_one_name_in_several_folders_give_a_tile_each(write, tmp_path):
    for well in "abcd":
        (tmp_path / well).mkdir()
        Image.fromarray(np.random.default_rng(ord(well)).integers(0, 255, (64, 64), np.uint8)).save(
            tmp_path / well / "field.png"
        )
    bundle = find_bundle("nuclei-fluorescence")
    assert len(read_tiles(images_in(tmp_path, 20.0), bundle, limit=4)) == 4
