"""Random nuclei: each of the size and where it may be, most of each visible, no two with a common pixel."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.training.data.nuclei import NucleusRanges, Plan, plan_nuclei

FAST = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
RANGES = NucleusRanges()
SIZE = 128


def make_plan(
    seed: int, diameter_px: float = 20.0, ranges: NucleusRanges = RANGES, allowed: np.ndarray | None = None
) -> Plan:
    places = np.ones((SIZE, SIZE), bool) if allowed is None else allowed
    return plan_nuclei(places, diameter_px, ranges, np.random.default_rng(seed))


def whole_masks(plan: Plan) -> np.ndarray:
    """Return what each nucleus would show if no other lay over it."""
    masks = np.zeros((len(plan.nuclei), *plan.owner.shape), bool)
    for mask, nucleus in zip(masks, plan.nuclei, strict=True):
        mask[nucleus.place] = nucleus.depth > 0
    return masks


@FAST
@given(seeds, st.floats(6, 60), st.floats(0, 0.5))
def test_masks_are_disjoint_and_little_of_each_is_hidden(
    seed: int, diameter_px: float, max_overlap: float
) -> None:
    plan = make_plan(seed, diameter_px, replace(RANGES, max_overlap=max_overlap))
    assert plan.masks.shape == (len(plan.nuclei), SIZE, SIZE)
    assert plan.masks.sum(axis=0).max(initial=0) <= 1
    for visible, whole in zip(plan.masks, whole_masks(plan), strict=True):
        assert not (visible & ~whole).any()
        assert visible.sum() >= (1 - max_overlap) * whole.sum()
        assert visible.any()


@FAST
@given(seeds, st.floats(8, 40))
def test_areas_lie_within_the_range_of_sizes(seed: int, diameter_px: float) -> None:
    plan = make_plan(seed, diameter_px, replace(RANGES, roughness=(0.0, 0.0), max_overlap=0.0))
    smallest = diameter_px * RANGES.size[0] * math.exp(-2 * RANGES.spread[1])
    largest = diameter_px * RANGES.size[1] * math.exp(2 * RANGES.spread[1])
    for nucleus, mask in zip(plan.nuclei, plan.masks, strict=True):
        assert smallest - 1e-6 <= nucleus.diameter_px <= largest + 1e-6
        exact = math.pi * nucleus.diameter_px**2 / 4
        assert mask.sum() <= 1.1 * exact + 8  # pixels of a grid
        cut = mask[[0, -1]].any() or mask[:, [0, -1]].any()
        assert mask.sum() >= (0.35 if cut else 0.9) * exact - 8


def test_rough_nuclei_have_about_the_area_of_smooth_ones() -> None:
    rough = replace(RANGES, roughness=(0.15, 0.15), max_overlap=0.0)
    ratios = [
        mask.sum() / (math.pi * nucleus.diameter_px**2 / 4)
        for seed in range(10)
        for plan in [make_plan(seed, ranges=rough)]
        for nucleus, mask in zip(plan.nuclei, plan.masks, strict=True)
        if not (mask[[0, -1]].any() or mask[:, [0, -1]].any())
    ]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)


def test_rough_outlines_leave_the_ellipse() -> None:
    def wander(roughness: float) -> float:
        ranges = replace(RANGES, roughness=(roughness, roughness), elongation=(1.0, 1.0), max_overlap=0.0)
        depths = [
            nucleus.depth[tuple(side // 2 for side in nucleus.depth.shape)] * 2 / nucleus.diameter_px
            for seed in range(10)
            for nucleus in make_plan(seed, ranges=ranges).nuclei
            if min(nucleus.x0, nucleus.y0) > 0
            and max(nucleus.place[0].stop, nucleus.place[1].stop) < SIZE  # whole
        ]
        return float(np.std(depths))

    assert wander(0.0) < 0.02
    assert wander(0.15) > 0.05


@FAST
@given(seeds)
def test_centres_lie_where_they_may(seed: int) -> None:
    allowed = np.zeros((SIZE, SIZE), bool)
    allowed[20:60, 70:] = True
    for nucleus in make_plan(seed, allowed=allowed).nuclei:
        x, y = nucleus.centre
        assert allowed[int(y), int(x)]


def test_where_no_place_is_allowed_there_are_none() -> None:
    plan = make_plan(0, allowed=np.zeros((SIZE, SIZE), bool))
    assert plan.nuclei == []
    assert plan.masks.shape == (0, SIZE, SIZE)


@pytest.mark.parametrize("cover", [0.05, 0.3])
def test_the_tile_is_covered_as_ordered(cover: float) -> None:
    ranges = replace(RANGES, cover=(cover, cover), size=(0.8, 0.8))
    covered = [float((make_plan(seed, 16.0, ranges).owner > 0).mean()) for seed in range(10)]
    assert np.mean(covered) == pytest.approx(cover, rel=0.35)


@pytest.mark.parametrize("elongation", [1.0, 2.0])
def test_nuclei_are_as_long_as_ordered(elongation: float) -> None:
    ranges = replace(
        RANGES, elongation=(elongation, elongation), roughness=(0.0, 0.0), cover=(0.1, 0.1), max_overlap=0.0
    )
    ratios = []
    for seed in range(12):
        for mask in make_plan(seed, 24.0, ranges).masks:
            if mask[[0, -1]].any() or mask[:, [0, -1]].any():
                continue
            spread = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T))
            ratios.append(math.sqrt(spread[1] / spread[0]))
    assert np.mean(ratios) == pytest.approx(elongation, rel=0.12)


def test_crowding_brings_nuclei_together() -> None:
    def nearest(crowding: float) -> float:
        ranges = replace(RANGES, crowding=(crowding, crowding), cover=(0.1, 0.1), size=(1.0, 1.0))
        distances = []
        for seed in range(12):
            centres = np.array([nucleus.centre for nucleus in make_plan(seed, 12.0, ranges).nuclei])
            if len(centres) > 1:
                apart = np.linalg.norm(centres[:, None] - centres[None], axis=2) + np.diag(
                    [np.inf] * len(centres)
                )
                distances.extend(apart.min(axis=1))
        return float(np.mean(distances))

    assert nearest(0.9) < 0.8 * nearest(0.0)


@FAST
@given(seeds)
def test_a_plan_is_a_function_of_its_generator(seed: int) -> None:
    first, again = make_plan(seed), make_plan(seed)
    assert np.array_equal(first.owner, again.owner)
    assert [one.centre for one in first.nuclei] == [one.centre for one in again.nuclei]
