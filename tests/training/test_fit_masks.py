"""Masks fitted to their image: where an object ends in it, and never more than the image tells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.runtime.instances import Instances
from darcnn.training.adapt.fit_masks import contrast_of, fit_masks

FAST = settings(deadline=None, max_examples=25)
SIZE = 96
Disc = Callable[..., np.ndarray]
InstancesOf = Callable[..., Instances]


def picture(inside: np.ndarray, level: float, background: float, noise: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    grey = np.where(inside, level, background) + rng.normal(0, noise, inside.shape)
    return np.clip(grey, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize(("level", "background"), [(200, 30), (60, 40), (80, 220)])
@pytest.mark.parametrize("radius", [15.0, 17.0, 21.0])
def test_fitted_mask_finds_the_edge_of_a_disc_from_a_wrong_mask(
    disc: Disc, instances_of: InstancesOf, level: float, background: float, radius: float
) -> None:
    truth, predicted = disc(SIZE, 48, 48, 19.0), disc(SIZE, 48, 48, radius)
    fitted = fit_masks(picture(truth, level, background), instances_of(predicted.astype(np.int32)))
    assert iou(fitted == 1, truth) > 0.93 > iou(predicted, truth)


def test_one_channel_is_enough(disc: Disc, instances_of: InstancesOf) -> None:
    truth, predicted = disc(SIZE, 48, 48, 19.0), disc(SIZE, 48, 48, 15.0)
    image = picture(truth, 200, 30)[..., :1]
    assert iou(fit_masks(image, instances_of(predicted.astype(np.int32))) == 1, truth) > 0.93


def test_predicted_mask_stays_where_the_image_shows_no_contrast(
    disc: Disc, instances_of: InstancesOf
) -> None:
    predicted = disc(SIZE, 40, 50, 14.0).astype(np.int32)
    flat = picture(predicted > 0, 100, 100)
    assert np.array_equal(fit_masks(flat, instances_of(predicted)), predicted)


@pytest.mark.parametrize(
    ("radius", "level", "quarters", "stays"),
    [
        (17.0, 200, 4, False),
        (15.0, 200, 4, True),  # 0.56 of what was predicted
        (20.0, 200, 3, True),  # ragged: a disc without a quarter
        (17.0, 103, 4, True),  # three grey levels
        (6.0, 200, 4, True),  # a speck: most of the object looks like what is round it
    ],
)
def test_predicted_mask_stays_where_the_image_tells_of_something_else(
    disc: Disc, instances_of: InstancesOf, radius: float, level: int, quarters: int, stays: bool
) -> None:
    shown, predicted = disc(SIZE, 48, 48, radius), disc(SIZE, 48, 48, 20.0).astype(np.int32)
    if quarters == 3:
        shown[:48, :48] = False
    fitted = fit_masks(picture(shown, level, 100, noise=0.0), instances_of(predicted))
    assert np.array_equal(fitted, predicted) == stays


@pytest.mark.parametrize("scores", [[0.9, 0.5], [0.5, 0.9]])
def test_ground_that_two_objects_claim_is_the_better_one_s(
    instances_of: InstancesOf, scores: list[float]
) -> None:
    predicted = np.zeros((40, 40), np.int32)
    predicted[8:30, 4:18], predicted[8:30, 20:34] = 1, 2
    bright = np.zeros((40, 40), np.bool_)
    bright[8:30, 4:34] = True
    fitted = fit_masks(picture(bright, 200, 30), instances_of(predicted, scores))
    assert (fitted[10:28, 18:20] == 1 + np.argmax(scores)).all()


def test_object_that_fills_the_image_keeps_its_mask(instances_of: InstancesOf) -> None:
    everything = np.ones((SIZE, SIZE), np.int32)
    assert np.array_equal(fit_masks(picture(everything > 0, 90, 0), instances_of(everything)), everything)


def test_no_objects_give_an_empty_label_image(instances_of: InstancesOf) -> None:
    nothing = np.zeros((SIZE, SIZE), np.int32)
    assert not fit_masks(picture(nothing > 0, 90, 20), instances_of(nothing)).any()


@FAST
@given(st.floats(10, 20), st.floats(10, 20), st.floats(18, 40), st.booleans())
def test_no_object_takes_a_pixel_that_was_predicted_for_another(
    first: float, second: float, gap: float, first_is_better: bool
) -> None:
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    left = (columns - 30) ** 2 + (rows - 48) ** 2 <= first**2
    right = (columns - 30 - gap) ** 2 + (rows - 48) ** 2 <= second**2
    predicted = np.where(left, 1, np.where(right, 2, 0)).astype(np.int32)
    if len(np.unique(predicted)) < 3:
        return
    scores = [0.9, 0.5] if first_is_better else [0.5, 0.9]
    found = _instances(predicted, scores)
    image = picture(left | right, 180, 20)
    fitted = fit_masks(image, found)
    assert set(np.unique(fitted)) <= {0, 1, 2}
    assert not (fitted[predicted == 1] == 2).any()
    assert not (fitted[predicted == 2] == 1).any()


@FAST
@given(hnp.arrays(np.int32, (14, 17), elements=st.sampled_from([0, 0, 0, 1, 2])), st.integers(0, 2**31))
def test_any_mask_on_any_image_gives_objects_that_were_predicted(labels: np.ndarray, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (*labels.shape, 1), dtype=np.uint8)
    present = [n for n in (1, 2) if (labels == n).any()]
    if len(present) < 2:
        return
    fitted = fit_masks(image, _instances(labels, [0.7, 0.8]))
    assert fitted.shape == labels.shape
    assert set(np.unique(fitted)) <= {0, 1, 2}
    assert not (fitted[labels == 1] == 2).any()
    assert not (fitted[labels == 2] == 1).any()


@pytest.mark.parametrize(("level", "background"), [(180, 60), (40, 220)])
def test_contrast_is_how_much_brighter_an_object_is_than_around_it(
    disc: Disc, instances_of: InstancesOf, level: float, background: float
) -> None:
    mask = disc(SIZE, 48, 48, 19.0)
    (contrast,) = contrast_of(picture(mask, level, background), instances_of(mask.astype(np.int32)))
    assert contrast == pytest.approx(level - background, abs=2)


def _instances(labels: np.ndarray, scores: list[float]) -> Instances:
    masks = tuple(labels == number for number in (1, 2))
    corners = [(np.nonzero(m)[1].min(), np.nonzero(m)[0].min(), np.nonzero(m)[1].max() + 1,
                np.nonzero(m)[0].max() + 1) for m in masks]  # fmt: skip
    return Instances(
        shape=labels.shape,
        boxes=np.array(corners, np.float32),
        scores=np.array(scores, np.float32),
        origins=np.zeros((2, 2), np.int64),
        masks=masks,
        outlines=(np.zeros((5, 2)),) * 2,
        truncated=np.zeros(2, bool),
    )
