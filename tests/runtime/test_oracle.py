"""The label image is its own prediction: whatever the lattice, the path gives back every object once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.errors import ShapeError
from darcnn.runtime.instances import Instances
from darcnn.runtime.segmenter import Segmenter

FAST = settings(deadline=None, max_examples=40)

REACH_PX = 7  # objects are up to this wide and high; one that touches an edge doubles in its mirror image
MASK_PX = 28


@st.composite
def label_images(draw: st.DrawFn) -> np.ndarray:
    """Return objects that hang together by sides, without holes, anywhere, edges and corners included.

    None reaches from edge to opposite edge: with its endless mirror images it would have no end.
    """
    width, height = draw(st.integers(REACH_PX + 1, 70)), draw(st.integers(REACH_PX + 1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int32)
    names = random.choice(100_000, 40, replace=False) + 1
    for name in names[: draw(st.integers(0, 40))]:
        x, y = random.integers(-2, [width, height])
        w, h = random.integers(1, REACH_PX + 1, 2)
        rows = slice(max(y, 0), max(y + h, 0))
        columns = slice(max(x, 0), max(x + w, 0))
        ground = labels[rows, columns]
        if ground.any() or not ground.size:
            continue
        ground[:] = name
        in_corner = rows.start == 0 or rows.stop >= height, columns.start == 0 or columns.stop >= width
        if min(ground.shape) > 1 and not all(in_corner):  # there, a notch and its mirror images are a hole
            ground[0, 0] = 0  # no longer a rectangle, still in one piece
    return labels


def segment(labels: np.ndarray, *, core_px: int, halo_px: int, batch: int = 1) -> Instances:
    engine = OracleEngine(tile_px=core_px + 2 * halo_px, batch=batch, mask_px=MASK_PX, detections=2000)
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=halo_px)) as segmenter:
        return segmenter(encode_labels(labels))


def pixel_sets(labels: np.ndarray) -> list[tuple[tuple[int, int], ...]]:
    names = [name for name in np.unique(labels) if name]
    return sorted(
        tuple(zip(*(v.tolist() for v in np.nonzero(labels == name)), strict=True)) for name in names
    )


def found_sets(instances: Instances) -> list[tuple[tuple[int, int], ...]]:
    return sorted(
        tuple((y + int(oy), x + int(ox)) for y, x in np.argwhere(mask).tolist())
        for (ox, oy), mask in zip(instances.origins, instances.masks, strict=True)
    )


@FAST
@given(label_images(), st.integers(2, 50), st.integers(REACH_PX // 2 + 1, 20))
def test_every_object_comes_back_once_with_its_pixels(labels: np.ndarray, core_px: int, halo_px: int) -> None:
    instances = segment(labels, core_px=core_px, halo_px=halo_px)
    assert found_sets(instances) == pixel_sets(labels)
    if halo_px > REACH_PX:
        assert not instances.truncated.any()


@settings(deadline=None, max_examples=20)
@given(label_images(), st.integers(5, 60))
def test_the_batch_size_changes_nothing(labels: np.ndarray, core_px: int) -> None:
    one, four = (segment(labels, core_px=core_px, halo_px=9, batch=batch) for batch in (1, 4))
    assert np.array_equal(one.boxes, four.boxes)
    assert np.array_equal(one.scores, four.scores)
    assert np.array_equal(one.labels(), four.labels())
    assert [ring.tolist() for ring in one.outlines] == [ring.tolist() for ring in four.outlines]


def test_a_halo_that_is_too_small_loses_pixels() -> None:
    # the identity is no accident: without room around the core objects are cut
    labels = np.zeros((30, 30), np.int32)
    labels[5:12, 5:12] = 1
    assert found_sets(segment(labels, core_px=8, halo_px=0)) != pixel_sets(labels)


def test_one_grey_channel_carries_small_numbers() -> None:
    labels = np.zeros((20, 20), np.int32)
    labels[3:6, 4:9] = 255
    engine = OracleEngine(tile_px=32, channels=1, mask_px=MASK_PX)
    segmenter = Segmenter(engine, make_oracle_manifest(engine, halo_px=8))
    assert found_sets(segmenter(encode_labels(labels, channels=1))) == pixel_sets(labels)


def test_the_oracle_is_an_engine_and_checks_what_it_is_given() -> None:
    engine = OracleEngine(tile_px=16, detections=1)
    assert isinstance(engine, Engine)
    with pytest.raises(ShapeError, match="tiles of shape"):
        engine.detect(np.zeros((2, 16, 16, 3), np.uint8))
    two = np.zeros((16, 16), int)
    two[2, 2], two[8, 8] = 4, 4
    with pytest.raises(ValueError, match="2 parts"):
        engine.detect(encode_labels(two)[None])
    two[8, 8] = 0
    found = engine.detect(encode_labels(two)[None])
    with pytest.raises(ValueError, match="not a box"):
        engine.masks(found, np.array([[0, 0, 1, 1]], np.float32), np.array([0]))
    with pytest.raises(ShapeError, match="do not fit"):
        encode_labels(np.array([[256]]), channels=1)
    engine.close()
    engine.close()


def test_parts_that_wind_are_one_object() -> None:
    labels = np.zeros((9, 9), int)
    labels[0, :], labels[:, 8], labels[8, :], labels[2:, 0], labels[2, :7] = 3, 3, 3, 3, 3
    engine = OracleEngine(tile_px=9, mask_px=18)
    found = engine.detect(encode_labels(labels)[None])
    assert int((found.scores > 0).sum()) == 1
    mask = engine.masks(found, found.boxes[0, :1], np.array([0]))[0]
    assert np.array_equal(mask[::2, ::2] > 0.5, labels > 0)


@pytest.mark.parametrize("side_px", [5, 6, 7])
def test_an_object_in_a_corner_has_one_owner_however_small_the_cores(side_px: int) -> None:
    # each tile sees another share of its mirror images, which must not move it
    labels = np.zeros((20, 20), np.int32)
    labels[:side_px, :side_px], labels[-side_px:, -side_px:] = 1, 2
    for core_px in (1, 2, 3):
        assert found_sets(segment(labels, core_px=core_px, halo_px=4)) == pixel_sets(labels)
