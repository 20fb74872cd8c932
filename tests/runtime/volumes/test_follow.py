"""Sections at time points become tracks: cells move, jump with their field, and divide."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.volumes.follow import Track, follow_sections
from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.matching import Chain
from darcnn.runtime.volumes.sections import Section


def square(plane: int, x: int, y: int, side: int = 6) -> Section:
    return Section(plane, x, y, np.ones((side, side), bool), 0.9, False)


def places(chains: list[Chain]) -> list[list[tuple[int, int]]]:
    return sorted([[(one.plane, one.x) for one in chain] for chain in chains])


def follow(planes: list[list[Section]]) -> list[Chain]:
    return [track.sections for track in follow_sections(planes)]


def test_a_cell_that_swells_and_shrinks_in_time_is_one_track() -> None:
    sides = [20 + round(2 * np.sin(t / 5)) for t in range(120)]
    planes = [[square(t, 30 - side // 2, 30 - side // 2, side)] for t, side in enumerate(sides)]
    assert [len(chain) for chain in follow(planes)] == [120]
    assert len(list(link_sections(planes))) > 1


def test_a_cell_that_leaps_is_one_track_and_other_cells_are_not_its_continuation() -> None:
    def moves(*places: int, side: int = 6) -> list[list[Section]]:
        return [[square(t, x, 0, side)] for t, x in enumerate(places)]

    leaping = moves(0, 9, 18)
    assert len(list(link_sections(leaping))) == 3  # planes of a volume
    assert places(follow(leaping)) == [[(0, 0), (1, 9), (2, 18)]]
    assert len(follow(moves(0, 15))) == 2  # two diameters and more
    assert len(follow([[square(0, 0, 0)], [square(1, 9, 0, 11)]])) == 2  # larger
    gone = [[square(0, 0, 0), square(0, 12, 0)], [square(1, 20, 0)]]  # one of them went on, and not far
    assert places(follow(gone)) == [[(0, 0)], [(0, 12), (1, 20)]]
    speck = [[square(0, 0, 0)], [square(1, 9, 0), square(1, 5, 0, 2)]]  # nearer, but not alike
    assert places(follow(speck)) == [[(0, 0), (1, 9)], [(1, 5)]]
    missed = [[square(0, 0, 0)], [], [square(2, 9, 0)]]  # by then it may be any cell
    assert len(follow(missed)) == 2


def test_cells_keep_their_tracks_where_the_stage_jumps() -> None:
    """Each cell lands where another was: overlap alone gives it that one's track."""
    rng = np.random.default_rng(1)
    columns = [(12 * n + int(rng.integers(-2, 3)), int(rng.integers(0, 40))) for n in range(12)]
    still = [[square(t, x, y) for x, y in columns] for t in range(2)]
    jumped = [[square(t, x + 12, y + 5) for x, y in columns] for t in range(2, 4)]
    chains = follow([*still, *jumped])
    assert sorted([(one.x, one.y) for one in chain] for chain in chains) == sorted(
        [(x, y), (x, y), (x + 12, y + 5), (x + 12, y + 5)] for x, y in columns
    )


def family(*planes: list[Place]) -> set[tuple[tuple[int, int, int], ...]]:
    """Return (first time point, last, x of the first) of each track and of its parent, if it has one."""
    made = [[square(t, x, y, side) for x, y, side in plane] for t, plane in enumerate(planes)]
    tracks = list(follow_sections(made))
    of = {track.number: track for track in tracks}
    assert sorted(of) == list(range(len(tracks)))

    def name(track: Track) -> tuple[int, int, int]:
        return track.sections[0].plane, track.sections[-1].plane, track.sections[0].x

    ended: set[int] = set()
    for track in tracks:
        if track.parent is not None:  # a mother comes before her daughters
            assert track.parent in ended
            assert track.sections[0].plane == of[track.parent].sections[-1].plane + 1
            assert [one.parent for one in tracks].count(track.parent) == 2
        ended.add(track.number)
    return {(name(one),) if one.parent is None else (name(one), name(of[one.parent])) for one in tracks}


MOTHER = (50, 50, 12)
DAUGHTERS = [(46, 52, 8), (58, 52, 8)]  # their middle is hers


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_cell_that_divides_ends_and_is_the_parent_of_both_daughters(is_taken: bool) -> None:
    daughters = DAUGHTERS if is_taken else [(41, 52, 8), (63, 52, 8)]  # apart, none lies on their mother
    found = family([MOTHER], [MOTHER], daughters, daughters)
    mother = (0, 1, 50)
    assert found == {(mother,), ((2, 3, daughters[0][0]), mother), ((2, 3, daughters[1][0]), mother)}


@pytest.mark.parametrize(
    "planes",
    [
        [MOTHER, (46, 55, 5), (46, 55, 8)],  # straight from a nucleus at rest
        [MOTHER, MOTHER, MOTHER, (53, 53, 6), (46, 52, 6), (46, 52, 8)],  # seen as a plate before
    ],
)
def test_chromosomes_are_small_before_and_after_a_division(planes: list[Place]) -> None:
    *before, first, later = planes
    both = [[(x, y, side), (112 - x - side, y, side)] for x, y, side in (first, later)]
    n_alone = len(before)
    mother = (0, n_alone - 1, 50)
    found = family(*([one] for one in before), *both)
    assert found == {
        (mother,),
        *(((n_alone, n_alone + 1, x), mother) for x, _, _ in both[0]),
    }


@pytest.mark.parametrize(
    ("name", "planes"),
    [
        ("a neighbour comes", [[MOTHER], [MOTHER, (64, 52, 10)], [MOTHER, (64, 52, 10)]]),
        ("both on one side", [[MOTHER], [(56, 52, 8), (66, 52, 8)], [(56, 52, 8), (66, 52, 8)]]),
        ("far apart", [[MOTHER], [(30, 52, 8), (74, 52, 8)], [(30, 52, 8), (74, 52, 8)]]),
        ("a speck", [[MOTHER], [(48, 51, 10), (60, 54, 3)], [(48, 51, 10), (60, 54, 3)]]),
        ("larger than she", [[MOTHER], [(42, 50, 13), (58, 50, 13)], [(42, 50, 13), (58, 50, 13)]]),
        ("found in pieces once", [[MOTHER], DAUGHTERS, [MOTHER], [MOTHER]]),
        ("at the end", [[MOTHER], [MOTHER], DAUGHTERS]),
    ],
)
def test_what_only_looks_like_a_division_is_none(name: str, planes: list[list[Place]]) -> None:
    assert all(len(one) == 1 for one in family(*planes)), name


def test_daughters_divide_again_and_neighbours_do_not_mind() -> None:
    still = [(110, 50, 12), (50, 110, 12), (20, 20, 8)]
    granddaughters = [(42, 53, 6), (50, 53, 6)]
    planes = [
        [MOTHER, *still],
        [*DAUGHTERS, *still],
        [*still, *DAUGHTERS],
        [*granddaughters, DAUGHTERS[1], *still],
        [*granddaughters, DAUGHTERS[1], *still],
    ]
    assert family(*planes) == {
        ((0, 0, 50),),
        ((1, 2, 46), (0, 0, 50)),
        ((1, 4, 58), (0, 0, 50)),
        ((3, 4, 42), (1, 2, 46)),
        ((3, 4, 50), (1, 2, 46)),
        *(((0, 4, x),) for x, _, _ in still),
    }


Place = tuple[int, int, int]  # x, y and side of a square

FIELD = [(24 * n + 7 * (n % 3), 110 + 9 * (n % 4), 8) for n in range(8)]  # cells that do nothing


def jumped(*planes: list[Place], at: int, by: tuple[int, int]) -> list[list[Place]]:
    """Return the planes with the field; from time point `at` on all of it lies elsewhere."""
    shift = [(0, 0) if t < at else by for t in range(len(planes))]
    return [
        [(x + dx, y + dy, side) for x, y, side in [*plane, *FIELD]]
        for plane, (dx, dy) in zip(planes, shift, strict=True)
    ]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("by", [(0, 0), (21, 13)])
def test_a_jump_neither_makes_nor_hides_a_division(at: int, by: tuple[int, int]) -> None:
    wide = [(44, 52, 8), (60, 52, 8)]
    divides = family(*jumped([MOTHER], [MOTHER], DAUGHTERS, wide, at=at, by=by))
    assert sum(len(one) == 2 for one in divides) == 2
    assert len(divides) == 3 + len(FIELD)
    in_pieces = family(*jumped([MOTHER], [MOTHER], DAUGHTERS, [MOTHER], [MOTHER], at=at, by=by))
    assert all(len(one) == 1 for one in in_pieces)


@pytest.mark.parametrize("by", [(0, 0), (21, 13)])
def test_a_cell_missed_where_the_field_jumps_goes_on(by: tuple[int, int]) -> None:
    found = family(*jumped([MOTHER], [MOTHER], [], [MOTHER], at=2, by=by))
    assert ((0, 3, 50),) in found
    assert len(found) == 1 + len(FIELD)


@pytest.mark.parametrize("by", [(0, 0), (21, 13)])
def test_cells_that_merge_once_are_cut_though_the_field_jumps_after(by: tuple[int, int]) -> None:
    pair = [(50, 50, 8), (62, 50, 8)]
    planes = jumped(pair, pair, [], pair, at=3, by=by)
    made = [[square(t, *one) for one in plane] for t, plane in enumerate(planes)]
    made[2].append(Section(2, 50, 50, np.ones((8, 20), bool), 0.9, False))
    assert sorted(len(chain) for chain in follow(made)) == [4] * (2 + len(FIELD))


def test_a_clump_does_not_hide_that_the_field_has_jumped() -> None:
    rng = np.random.default_rng(1)
    cells = [(12 * n + int(rng.integers(-2, 3)), int(rng.integers(0, 40)), 6) for n in range(12)]
    planes = [
        [(x + shift, y + shift // 2, side) for x, y, side in [*cells, (60, 60, 60)]]
        for shift in (0, 0, 12, 12)
    ]
    assert len(family(*planes)) == 13


@pytest.mark.parametrize("last", [[], [(200, 200, 8)], [DAUGHTERS[0]]])
def test_daughters_that_do_not_go_on_were_none(last: list[Place]) -> None:
    assert all(len(one) == 1 for one in family([MOTHER], [MOTHER], DAUGHTERS, last))


def test_cells_that_all_move_further_than_they_are_wide_have_not_divided() -> None:
    """Each comes to lie between where two were: these are on both sides of where each was."""
    still, moved = ([(x + shift, 40, 10) for x in range(0, 96, 24)] for shift in (0, 10))
    assert all(len(one) == 1 for one in family(still, moved, moved))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(4, 12)), max_size=8),
        max_size=6,
    ),
)
def test_tracks_hold_each_section_once(planes: list[list[Place]]) -> None:
    family(*planes)
    made = [[square(t, *one) for one in plane] for t, plane in enumerate(planes)]
    chains = follow(made)
    assert sum(one.area_px for chain in chains for one in chain) == sum(
        side**2 for plane in planes for *_, side in plane
    )
    for chain in chains:
        times = [one.plane for one in chain]
        assert times == sorted(set(times))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(4, 12)), max_size=8),
        max_size=6,
    ),
    st.randoms(),
)
def test_tracks_do_not_depend_on_the_order_of_sections(planes: list[list[Place]], random: Random) -> None:
    # two of one place would be in the order in which they come
    apart = [list({(x, y): (x, y, side) for x, y, side in plane}.values()) for plane in planes]
    assert family(*apart) == family(*[random.sample(plane, len(plane)) for plane in apart])


def test_nothing_has_no_tracks() -> None:
    assert follow([]) == []
    assert follow([[], [], []]) == []
