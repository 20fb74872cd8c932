"""Sections of neighbouring planes become chains: one to one, over a gap, through a merger, cut at a waist."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.matching import Chain
from darcnn.runtime.volumes.sections import Section, read_sections, to_table


def square(plane: int, x: int, y: int, side: int = 6, score: float = 0.9) -> Section:
    return Section(plane, x, y, np.ones((side, side), bool), score, False)


def wide(plane: int, x: int, y: int, width: int, height: int = 6) -> Section:
    return Section(plane, x, y, np.ones((height, width), bool), 0.9, False)


def places(chains: list[Chain]) -> list[list[tuple[int, int]]]:
    return sorted([[(one.plane, one.x) for one in chain] for chain in chains])


def test_two_objects_side_by_side_stay_two() -> None:
    planes = [[square(z, 0, 0), square(z, 8, 0)] for z in range(4)]
    assert places(list(link_sections(planes))) == [
        [(z, 0) for z in range(4)],
        [(z, 8) for z in range(4)],
    ]


def test_the_best_overlap_wins_and_each_section_goes_once() -> None:
    planes = [[square(0, 0, 0)], [square(1, 3, 0), square(1, 1, 0)]]
    assert places(list(link_sections(planes))) == [[(0, 0), (1, 1)], [(1, 3)]]


def test_an_object_missed_on_one_plane_goes_on_and_on_two_planes_does_not() -> None:
    one_missed = [[square(0, 0, 0)], [], [square(2, 0, 0)]]
    assert places(list(link_sections(one_missed))) == [[(0, 0), (2, 0)]]
    two_missed = [[square(0, 0, 0)], [], [], [square(3, 0, 0)]]
    assert places(list(link_sections(two_missed))) == [[(0, 0)], [(3, 0)]]


def test_a_section_without_gap_is_preferred_to_one_behind_a_gap() -> None:
    planes = [[square(0, 0, 0)], [square(1, 4, 0)], [square(2, 2, 0)]]
    assert places(list(link_sections(planes))) == [[(0, 0), (1, 4), (2, 2)]]
    apart = [[square(0, 0, 0)], [square(1, 5, 0)], [square(2, 2, 0)]]  # the first two hardly overlap
    assert places(list(link_sections(apart))) == [[(0, 0)], [(1, 5), (2, 2)]]


def test_a_merger_of_one_plane_is_cut_between_its_chains() -> None:
    pair = [[square(z, 40, 7), square(z, 48, 7)] for z in range(4)]
    planes = [pair[0], [wide(1, 40, 7, 14)], pair[2]]
    assert places(list(link_sections(planes))) == [[(0, 40), (1, 40), (2, 40)], [(0, 48), (1, 47), (2, 48)]]
    touched = [pair[0], [wide(1, 40, 7, 14)], [wide(2, 40, 7, 14), square(2, 53, 12)]]
    assert sorted(len(chain) for chain in link_sections(touched)) == [1, 1, 3]  # not cut for what hardly does
    missed = [pair[0], [square(1, 40, 7)], [wide(2, 40, 7, 14)], pair[3]]
    widths = {one.mask.shape[1] for chain in link_sections(missed) for one in chain if one.plane == 2}
    assert widths == {14}  # nor for one that was not on the plane before


def test_a_merger_that_lasts_is_one_object() -> None:
    planes = [[square(0, 0, 0), square(0, 7, 0)], [wide(1, 0, 0, 13)], [wide(2, 0, 0, 13)]]
    assert len(list(link_sections(planes))) == 2  # one goes on, the other ends: nothing is invented


def test_objects_one_behind_the_other_are_cut_at_the_waist() -> None:
    sides = [3, 5, 6, 6, 5, 3, 5, 6, 6, 5, 3]
    planes = [[square(z, 10 - side // 2, 10 - side // 2, side)] for z, side in enumerate(sides)]
    assert [len(chain) for chain in link_sections(planes, min_planes=2)] == [5, 6]


def test_a_column_is_cut_at_slight_waists_and_a_single_object_is_not() -> None:
    """Nuclei on top of one another, 8 px wide and 8 planes deep: their sections hardly shrink between."""
    sides = [6, 8, 8, 8, 8, 8, 8, 6] * 3
    planes = [[square(z, 10 - side // 2, 10 - side // 2, side)] for z, side in enumerate(sides)]
    assert [len(chain) for chain in link_sections(planes)] == [7, 8, 9]
    assert [len(chain) for chain in link_sections(planes[:8])] == [8]
    assert [len(chain) for chain in link_sections(planes, min_planes=2)] == [24]  # of slabs, which blur
    wide_planes = [[square(z, 0, 0, 3 * side)] for z, side in enumerate(sides)]  # one that is as wide as deep
    assert [len(chain) for chain in link_sections(wide_planes)] == [24]


@pytest.mark.parametrize("sides", [[3, 4, 5, 7, 9, 11, 14, 17, 20], [2, 9, 12, 12, 9, 2]])
def test_a_cone_has_no_waist_and_the_caps_of_a_ball_belong_to_it(sides: list[int]) -> None:
    planes = [[square(z, 20 - side // 2, 20 - side // 2, side)] for z, side in enumerate(sides)]
    assert [len(chain) for chain in link_sections(planes, plane_px=3.0)] == [len(sides)]


def test_no_flat_pieces_are_cut_off_unless_planes_lie_far_apart() -> None:
    sides = [4, 8, 9, 8, 4, 8, 9, 8, 4]
    planes = [[square(z, 10 - side // 2, 10 - side // 2, side)] for z, side in enumerate(sides)]
    assert [len(chain) for chain in link_sections(planes, min_planes=2)] == [9]
    assert [len(chain) for chain in link_sections(planes, min_planes=2, plane_px=2.0)] == [4, 5]


def test_what_shows_in_fewer_slabs_than_hold_it_is_noise() -> None:
    lasting = [square(z, 0, 0) for z in range(9)]
    short = [square(z, 30, 0) for z in (3, 4)]
    planes = [[one for one in [*lasting, *short] if one.plane == z] for z in range(9)]
    assert [chain[0].x for chain in link_sections(planes, min_planes=3)] == [0]


def test_no_plane_and_empty_planes_have_no_chain() -> None:
    assert list(link_sections([])) == []
    assert list(link_sections([[], [], []])) == []


@st.composite
def stacks(draw: st.DrawFn) -> list[list[Section]]:
    """Return planes with sections anywhere."""
    planes, along = [], st.integers(0, 20)
    for z in range(draw(st.integers(0, 6))):
        n = draw(st.integers(0, 6))
        planes.append(
            [square(z, draw(along), draw(along), draw(st.integers(1, 8)), 0.5 + k / 20) for k in range(n)]
        )
    return planes


@settings(deadline=None, max_examples=100)
@given(stacks())
def test_every_section_is_in_one_chain_and_no_chain_has_two_of_a_plane(planes: list[list[Section]]) -> None:
    chains = list(link_sections(planes))
    for chain in chains:
        numbers = [one.plane for one in chain]
        assert all(0 < b - a <= 2 for a, b in pairwise(numbers))
    found = sum(one.area_px for chain in chains for one in chain)
    assert found == sum(one.area_px for plane in planes for one in plane)


@settings(deadline=None, max_examples=50)
@given(stacks(), st.integers(0, 2**32 - 1))
def test_the_order_on_a_plane_changes_nothing_but_ties(planes: list[list[Section]], seed: int) -> None:
    again = [read_sections(to_table(plane)) for plane in planes]  # a part file gives them back as they were
    assert places(list(link_sections(planes))) == places(list(link_sections(again)))
