"""The labelled source: crowds are dropped, crops keep image and masks together, sizes come to order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as run_lengths

from darcnn.runtime.errors import InputError
from darcnn.training.config import Source
from darcnn.training.data.source import PhotographSource

FAST = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
Disc = Callable[..., np.ndarray]
SIZE = 200


def annotation(mask: np.ndarray, number: int, image: int = 1, **changes: Any) -> dict[str, Any]:
    encoded = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": number % 3 + 1,  # several classes, to be collapsed into one
        "iscrowd": 0,
        "area": float(mask.sum()),
        "bbox": [float(v) for v in run_lengths.toBbox(encoded)],
        "segmentation": {"size": list(mask.shape), "counts": encoded["counts"].decode()},
        **changes,
    }


def write(folder: Path, pictures: list[np.ndarray], annotations: list[dict[str, Any]]) -> None:
    for number, picture in enumerate(pictures, start=1):
        Image.fromarray(picture).save(folder / f"{number}.png")
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": p.shape[0], "width": p.shape[1]}
            for n, p in enumerate(pictures, start=1)
        ],
        "categories": [{"id": n, "name": str(n)} for n in (1, 2, 3)],
        "annotations": annotations,
    }
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def open_photographs(folder: Path, *diameter_px: float) -> PhotographSource:
    return PhotographSource(folder, Source(".", "instances.json", diameter_px=diameter_px or (8.0, 80.0)))


@pytest.fixture
def one_disc(tmp_path: Path, disc: Disc) -> Path:
    """A photograph that is white inside its one object, a disc of 60 px, and black outside."""
    mask = disc(SIZE, 90, 110, 30)
    write(tmp_path, [np.where(mask, np.uint8(255), np.uint8(0))], [annotation(mask, 1)])
    return tmp_path


@FAST
@given(seeds)
def test_masks_are_cropped_with_their_image(one_disc: Path, seed: int) -> None:
    tile = open_photographs(one_disc, 20.0, 90.0).tile(np.random.default_rng(seed), 64)
    assert tile.image.shape == (64, 64, 3)
    assert tile.masks.shape[1:] == (64, 64)
    for mask in tile.masks:
        assert np.array_equal(mask, tile.image[..., 0] > 127)


@FAST
@given(seeds, st.sampled_from([(16.0, 16.0), (30.0, 30.0), (20.0, 40.0)]))
def test_objects_come_to_the_size_that_is_ordered(
    one_disc: Path, seed: int, diameter_px: tuple[float, float]
) -> None:
    tile = open_photographs(one_disc, *diameter_px).tile(np.random.default_rng(seed), 64)
    if len(tile.masks) == 0 or tile.masks[0][[0, -1]].any() or tile.masks[0][:, [0, -1]].any():
        return  # cut by the crop's edge
    side = 2 * math.sqrt(tile.masks[0].sum() / math.pi)
    smallest = 0.8 * 64 / SIZE * 60  # a photograph covers most of its tile
    assert max(diameter_px[0], smallest) - 1 <= side <= max(diameter_px[1], smallest) + 1


def test_the_chosen_object_is_in_view(one_disc: Path) -> None:
    photographs = open_photographs(one_disc, 20.0, 30.0)
    views = [photographs.tile(np.random.default_rng(seed), 64) for seed in range(40)]
    assert np.mean([len(view.masks) == 1 for view in views]) > 0.9


def test_a_photograph_smaller_than_the_tile_is_shown_whole_on_grey(tmp_path: Path, disc: Disc) -> None:
    mask = disc(40, 20, 20, 15)
    write(tmp_path, [np.where(mask, np.uint8(255), np.uint8(0))], [annotation(mask, 1)])
    tile = open_photographs(tmp_path, 8.0, 8.0).tile(np.random.default_rng(0), 128)
    assert len(tile.masks) == 1
    assert (tile.image[0] == 114).all()
    assert tile.masks.sum() == pytest.approx(mask.sum() * (0.8 * 128 / 40) ** 2, rel=0.05)


def test_crowds_are_dropped(tmp_path: Path, disc: Disc) -> None:
    single, crowd = disc(SIZE, 60, 60, 30), disc(SIZE, 140, 140, 40)
    picture = np.where(single, np.uint8(255), np.uint8(0))
    write(tmp_path, [picture, picture], [
        annotation(single, 1), annotation(crowd, 2, iscrowd=1), annotation(crowd, 3, image=2, iscrowd=1)
    ])  # fmt: skip
    photographs = open_photographs(tmp_path, 20.0, 60.0)
    assert photographs.images == [1]  # the second shows nothing but a crowd
    assert len(photographs.cutouts()) == 1
    tiles = [photographs.tile(np.random.default_rng(seed), 64) for seed in range(20)]
    assert {len(tile.masks) for tile in tiles} <= {0, 1}
    for mask, image in ((tile.masks[0], tile.image) for tile in tiles if len(tile.masks)):
        assert (image[mask] > 127).all()  # the single object is white, the crowd is not


def test_a_mark_of_a_crowd_on_a_real_image_removes_that_object(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "source" / "instances.json").read_text(encoding="utf-8"))
    source = Source(str(data / "source" / "images"), "instances.json")

    def n_objects() -> int:
        (tmp_path / "instances.json").write_text(json.dumps(content), encoding="utf-8")
        return len(PhotographSource(tmp_path, source).cutouts())

    before = n_objects()
    largest = max(
        (a for a in content["annotations"] if min(a["bbox"][:2]) > 1 and a["bbox"][0] + a["bbox"][2] < 127),
        key=lambda a: a["area"] if a["bbox"][1] + a["bbox"][3] < 127 else 0,
    )
    largest["iscrowd"] = 1
    assert n_objects() == before - 1


def test_cutouts_lie_whole_inside_and_match_their_photograph(one_disc: Path, disc: Disc) -> None:
    (cutout,) = open_photographs(one_disc).cutouts()
    assert cutout.image.shape == (*cutout.mask.shape, 3)
    assert np.array_equal(cutout.mask, cutout.image[..., 0] == 255)
    assert cutout.mask.sum() == disc(SIZE, 90, 110, 30).sum()
    assert cutout.diameter_px == pytest.approx(60, abs=1)


@pytest.mark.parametrize(("x", "radius"), [(20, 30), (100, 8)])
def test_objects_that_are_cut_off_or_small_are_no_cutouts(
    tmp_path: Path, disc: Disc, x: float, radius: float
) -> None:
    mask = disc(SIZE, x, 100, radius)
    write(tmp_path, [mask.astype(np.uint8)], [annotation(mask, 1)])
    assert open_photographs(tmp_path).cutouts() == []


def test_tiles_are_a_function_of_their_generator(photographs: PhotographSource) -> None:
    first, again = (photographs.tile(np.random.default_rng(5), 64) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"images": [], "annotations": []}'])
def test_annotations_that_cannot_serve_are_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "instances.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        open_photographs(tmp_path)
    assert "instances.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_photograph_is_named(one_disc: Path) -> None:
    photographs = open_photographs(one_disc)
    for harm in (lambda path: path.write_bytes(b"no picture"), lambda path: path.unlink()):
        harm(one_disc / "1.png")
        with pytest.raises(InputError, match=r"1\.png"):
            photographs.tile(np.random.default_rng(0), 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"bbox": [150.0, 60.0, 60.0, 60.0]},  # beyond the right border
        {"bbox": [-20.0, 60.0, 60.0, 60.0]},
        {"segmentation": [[60.0, 80.0, 120.0, 80.0, 120.0, 260.0]]},  # a polygon beyond the lower border
        {"segmentation": []},
        {"segmentation": {"size": [SIZE, SIZE + 1], "counts": "0"}},
    ],
)
def test_annotations_that_do_not_fit_their_image_are_refused(
    tmp_path: Path, disc: Disc, changes: dict[str, Any]
) -> None:
    mask = disc(SIZE, 90, 110, 30)
    write(tmp_path, [mask.astype(np.uint8)], [annotation(mask, 1), annotation(mask, 17, **changes)])
    with pytest.raises(InputError, match=r"instances\.json: annotation 17 does not fit .* 1\.png") as caught:
        open_photographs(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_box_that_leaves_its_image_by_rounding_is_accepted(tmp_path: Path, disc: Disc) -> None:
    mask = disc(SIZE, 90, 110, 30)
    write(tmp_path, [mask.astype(np.uint8)], [annotation(mask, 1, bbox=[140.0, 80.0, 60.5, 60.0])])
    assert open_photographs(tmp_path).images == [1]


@pytest.mark.parametrize("missing", ["area", "bbox", "segmentation"])
def test_annotations_without_what_is_needed_are_refused(tmp_path: Path, disc: Disc, missing: str) -> None:
    mask = disc(SIZE, 90, 110, 30)
    incomplete = annotation(mask, 1)
    del incomplete[missing]
    write(tmp_path, [mask.astype(np.uint8)], [incomplete])
    with pytest.raises(InputError, match=missing):
        open_photographs(tmp_path)


def test_a_photograph_of_another_size_than_annotated_is_refused(one_disc: Path) -> None:
    Image.new("RGB", (SIZE // 2, SIZE)).save(one_disc / "1.png")
    with pytest.raises(InputError, match=r"1\.png: is 100 x 200 px, .* 200 x 200 px"):
        open_photographs(one_disc)


def test_a_picture_that_would_be_clipped_to_white_is_refused(one_disc: Path) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 3500, np.uint16)).save(one_disc / "1.png")
    with pytest.raises(InputError, match=r"1\.png: has more than 8 bits, .* source\.labels"):
        open_photographs(one_disc)


def test_of_a_large_set_some_cutouts_of_each_part_are_kept(
    tmp_path: Path, disc: Disc, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = disc(SIZE, 100, 100, 30)
    pictures = [np.full((SIZE, SIZE, 3), 10 * number, np.uint8) for number in range(8)]
    write(tmp_path, pictures, [annotation(mask, n, n) for n in range(1, 9)])
    photographs = open_photographs(tmp_path)
    assert len(photographs.cutouts()) == 8
    monkeypatch.setattr("darcnn.training.data.source._MAX_CUTOUTS", 4)
    assert [int(one.image[0, 0, 0]) for one in photographs.cutouts()] == [10, 30, 50, 70]


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no picture")])
def test_a_missing_or_damaged_photograph_is_named_before_training(
    one_disc: Path, harm: Callable[[Path], object]
) -> None:
    harm(one_disc / "1.png")
    with pytest.raises(InputError, match=r"1\.png"):
        open_photographs(one_disc)


def test_real_photographs_are_read_and_their_crowds_left_out(shared_data: Path) -> None:
    photographs = PhotographSource(shared_data, Source("coco/images", "coco/instances.json"))
    content = json.loads((shared_data / "coco" / "instances.json").read_text(encoding="utf-8"))
    assert any(a["iscrowd"] for a in content["annotations"])
    only_crowds = {a["image_id"] for a in content["annotations"] if a["iscrowd"]} - {
        a["image_id"] for a in content["annotations"] if not a["iscrowd"] and a["area"] >= 16
    }
    assert len(photographs.images) > 500
    assert only_crowds.isdisjoint(photographs.images)
    for seed in range(5):
        tile = photographs.tile(np.random.default_rng(seed), 128)
        assert tile.image.shape == (128, 128, 3)
        assert tile.masks.shape[1:] == (128, 128)
        assert tile.masks.reshape(len(tile.masks), -1).any(axis=1).all()
