"""Contact sheets: the same images each time, outlines where the objects are, and training none the wiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from darcnn.runtime.intensity import IntensityRule
from darcnn.training.checkpoint import CheckpointInfo
from darcnn.training.config import Recipe, TargetSet
from darcnn.training.contact_sheet import ContactSheet, draw_outlines
from darcnn.training.data.batches import Batch
from darcnn.training.data.target import TargetImages
from darcnn.training.history import sheets_of
from darcnn.training.loop import LoopPlan, train
from darcnn.training.model.network import Darcnn
from darcnn.training.steps import source_losses

GREEN = (0, 225, 70)


def green(picture: Image.Image) -> np.ndarray:
    return np.asarray((np.asarray(picture) == GREEN).all(axis=2))


@pytest.fixture
def small(with_target: Callable[..., Recipe]) -> Recipe:
    """The tiny recipe with one image and tiles of 64 px."""
    return replace(with_target(sets=(TargetSet("target/u2os_1*.png"),)), tile_px=64)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_outline_is_drawn_where_it_is_on_any_number_of_channels(channels: int) -> None:
    image = np.zeros((20, 30, channels), np.uint8)
    image[5, 5, 0] = 255
    square = np.array([(4, 6), (14, 6), (14, 16), (4, 16), (4, 6)], np.float64)
    picture = draw_outlines(image, [square], "", enlarged=4.0)
    assert (picture.mode, picture.size) == ("RGB", (120, 80))
    rows, columns = np.nonzero(green(picture))
    # edges at x 4 and 14, y 6 and 16 of the image; a line is a pixel wide
    assert (columns.min(), rows.min()) == (pytest.approx(16, abs=1), pytest.approx(24, abs=1))
    assert (columns.max(), rows.max()) == (pytest.approx(56, abs=1), pytest.approx(64, abs=1))
    assert not green(picture)[30:60, 20:50].any()
    seen = np.asarray(picture)[20:24, 20:24].mean(axis=(0, 1))
    assert seen[0] > 100
    assert (seen[1] > 100) == (channels <= 2)  # one channel is shown grey, of two the first


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_sheet_of_images_of_any_number_of_channels_shows_what_is_found(
    small: Recipe, network: Darcnn, channels: int, tmp_path: Path
) -> None:
    with Image.open(Path(__file__).parents[1] / "data" / "target" / "u2os_1f6b7cead1.png") as picture:
        grey = np.array(picture.convert("L"))[:96, :80]
    pixels = np.stack([grey // (n + 1) for n in range(channels)])  # (C, H, W)
    if channels == 3:
        tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(pixels, 0, 2), photometric="rgb")
    else:
        axes = "CYX" if channels > 1 else "YX"
        tifffile.imwrite(tmp_path / "a.ome.tif", pixels.squeeze(), ome=True, metadata={"axes": axes})
    target = replace(
        small.target, sets=(TargetSet("a.*"),), channels=channels, intensity=IntensityRule("full_range")
    )
    recipe = replace(small, target=target)
    sheet = ContactSheet(recipe, TargetImages(tmp_path, target, recipe.seed))
    picture = sheet(network.eval())
    assert picture.size == (384, 384)
    assert green(picture).sum() > 50


def test_the_same_network_gives_the_same_picture_and_draws_no_random_number(
    small: Recipe, network: Darcnn, data: Path
) -> None:
    targets = TargetImages(data, small.target, small.seed)
    state = torch.random.get_rng_state()
    first = ContactSheet(small, targets)(network.eval())
    again = ContactSheet(small, TargetImages(data, small.target, small.seed))(network.eval())
    assert first.tobytes() == again.tobytes()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_sheet_has_at_most_eight_images_evenly_spaced(small: Recipe, network: Darcnn, data: Path) -> None:
    targets = TargetImages(data, small.target, small.seed)
    (image,) = targets.images
    shades = [replace(image, pixels=np.full_like(image.pixels, 10 * number)) for number in range(24)]
    targets.images = shades
    picture = np.asarray(ContactSheet(small, targets)(network.eval()))
    assert picture.shape == (2 * 390 - 6, 4 * 390 - 6, 3)
    # the median, since outlines may run across
    shown = [np.median(picture[y : y + 384, x : x + 384, 2]) for y in (0, 390) for x in (0, 390, 780, 1170)]
    assert shown == [10 * (3 * k + 1) for k in range(8)]


@pytest.mark.slow
def test_sheets_do_not_change_what_is_learned(
    small: Recipe, network: Darcnn, small_batch: Batch, data: Path, tmp_path: Path
) -> None:
    def learn(name: str, sheet: ContactSheet | None) -> Darcnn:
        learner = copy.deepcopy(network)
        info = CheckpointInfo("source", 0, False, small)
        plan = LoopPlan(
            "source", 2, learning_rate=1e-3, warm_up=1, folder=tmp_path / name, info=info, sheet=sheet,
            sheet_every=1,
        )  # fmt: skip
        return train(learner, plan, lambda number: small_batch, lambda b, step: source_losses(learner, b))

    sheet = ContactSheet(small, TargetImages(data, small.target, small.seed), source_branch=True)
    shown, unseen = learn("shown", sheet), learn("unseen", None)
    for name, tensor in shown.state_dict().items():
        assert torch.equal(tensor, unseen.state_dict()[name]), name
    assert [step for step, _ in sheets_of(tmp_path / "shown")] == [1, 2]
    assert not sheets_of(tmp_path / "unseen")
