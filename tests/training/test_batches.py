"""Batches: a pure function of seed, stage and step, with boxes that enclose their masks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.runtime.errors import InputError
from darcnn.training.data.batches import collate, make_source_tile, prefetch, random_generator
from darcnn.training.data.source import LabelledTile, PhotographSource

FAST = settings(deadline=None, max_examples=60)
keys = st.tuples(
    st.integers(0, 2**31), st.sampled_from(["source", "adapt", "refine", "target"]), st.integers(0, 10**6),
    st.integers(0, 64),
)  # fmt: skip


@FAST
@given(keys, keys)
def test_generators_agree_where_seed_stage_step_and_index_agree(
    first: tuple[int, str, int, int], second: tuple[int, str, int, int]
) -> None:
    def draw(key: tuple[int, str, int, int]) -> list[int]:
        return list(random_generator(*key).integers(0, 2**62, 4))

    assert draw(first) == draw(first)
    assert (draw(first) == draw(second)) == (first == second)


def test_source_tiles_are_a_pure_function_of_their_key(photographs: PhotographSource) -> None:
    cutouts = photographs.cutouts()

    def tile(step: int) -> LabelledTile:
        generator = random_generator(1, "source", step, 0)
        return make_source_tile(photographs, cutouts, generator, 64, scene_fraction=0.5, grey_fraction=0.5)

    first = [tile(step) for step in range(6)]
    again = [tile(step) for step in reversed(range(6))][::-1]  # whatever was made before
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.masks, other.masks)
    assert len({one.image.tobytes() for one in first}) == 6


def test_every_source_tile_shows_an_object(photographs: PhotographSource) -> None:
    cutouts = photographs.cutouts()
    for index in range(20):
        generator = random_generator(2, "source", 0, index)
        tile = make_source_tile(photographs, cutouts, generator, 64, scene_fraction=0.5, grey_fraction=0.5)
        assert len(tile.masks) > 0


def test_a_source_whose_crops_show_nothing_is_an_error_not_a_hang(
    photographs: PhotographSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = LabelledTile(np.zeros((64, 64, 3), np.uint8), np.zeros((0, 64, 64), bool))
    monkeypatch.setattr(PhotographSource, "tile", lambda *arguments: empty)
    with pytest.raises(InputError, match=r"source\.diameter_px: no object"):
        make_source_tile(photographs, [], np.random.default_rng(0), 64, scene_fraction=0.0, grey_fraction=0.5)


@pytest.mark.parametrize("scene_fraction", [0.0, 1.0])
def test_scene_fraction_chooses_between_photographs_and_scenes(
    photographs: PhotographSource, monkeypatch: pytest.MonkeyPatch, scene_fraction: float
) -> None:
    calls: list[str] = []
    original = PhotographSource.tile

    def counted(source: PhotographSource, *arguments: object) -> LabelledTile:
        calls.append("photograph")
        return original(source, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PhotographSource, "tile", counted)
    cutouts = photographs.cutouts()
    for index in range(4):
        generator = random_generator(2, "source", 0, index)
        make_source_tile(
            photographs, cutouts, generator, 64, scene_fraction=scene_fraction, grey_fraction=0.0
        )
    assert bool(calls) == (scene_fraction == 0.0)


@FAST
@given(
    hnp.arrays(
        bool,
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9).map(lambda s: (s[0], s[1], s[1])),
    )
)
def test_boxes_enclose_their_masks_tightly(masks: np.ndarray) -> None:
    masks = masks[masks.any(axis=(1, 2))]
    size = masks.shape[1]
    batch = collate([LabelledTile(np.zeros((size, size, 3), np.uint8), masks)], [0])
    (target,) = batch.targets
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1] * len(masks)
    assert np.array_equal(target["masks"].numpy() > 0, masks)
    for box, mask in zip(target["boxes"].numpy(), masks, strict=True):
        x0, y0, x1, y1 = (int(v) for v in box)
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert mask[y0].any()
        assert mask[y1 - 1].any()
        assert mask[:, x0].any()
        assert mask[:, x1 - 1].any()


def test_a_tile_without_objects_has_no_boxes() -> None:
    tile = LabelledTile(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8), bool))
    (target,) = collate([tile], [0]).targets
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 8, 8)


def test_images_of_a_batch_are_bytes_as_numbers_channels_first() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    batch = collate([LabelledTile(image, np.zeros((0, 8, 8), bool))] * 3, range(3))
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert batch.image_size == (8, 8)
    assert np.array_equal(batch.images[2].permute(1, 2, 0).numpy(), image)


def test_prefetch_yields_every_step_in_order() -> None:
    assert list(prefetch(lambda step: step * step, range(3, 9))) == [9, 16, 25, 36, 49, 64]
    assert list(prefetch(lambda step: step, range(0))) == []


def test_prefetch_is_one_ahead_and_no_more() -> None:
    made: list[int] = []
    second_begun = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 1:
            second_begun.set()
        return step

    steps = prefetch(make, range(10))
    assert next(steps) == 0
    assert second_begun.wait(timeout=10)
    assert made == [0, 1]
    steps.close()  # type: ignore[attr-defined]


def test_prefetch_hands_errors_to_the_caller() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("gone")
        return step

    steps = prefetch(make, range(5))
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(steps)


def test_prefetch_leaves_no_thread_behind() -> None:
    steps = prefetch(lambda step: step, range(5))
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
