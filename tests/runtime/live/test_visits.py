"""Objects are where the stage sees them, each is visited once, and the stage travels little."""

import logging
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.errors import UsageError
from darcnn.runtime.live.visits import (
    CameraAxes,
    FoundObject,
    choose_objects,
    locate_objects,
    order_visits,
)


def test_without_a_pixel_size_objects_have_no_place_and_that_is_said(open_live, frame_of, caplog):
    result = open_live().push(frame_of(), key="p0").result(10)
    with caplog.at_level(logging.WARNING):
        assert locate_objects(result, (0.0, 0.0)) == []
    assert "frame p0 has no pixel size" in caplog.text


@pytest.mark.parametrize("axes", [CameraAxes(), CameraAxes(-1, 1), CameraAxes(1, -1)])
def test_an_object_is_where_the_stage_sees_it_in_the_middle(open_live, frame_of, axes):
    frame = frame_of(24, 29)  # 24 high, 29 wide: an object of 4 x 5 px at (6, 7)
    result = open_live().push(frame, pixel_size_um=0.5).result(10)
    (one,) = locate_objects(result, (100.0, -50.0), axes)
    assert one.x_um == pytest.approx(100 + axes.x * 0.5 * (8.5 - 14.5), abs=0.3)
    assert one.y_um == pytest.approx(-50 + axes.y * 0.5 * (9.0 - 12), abs=0.3)
    assert one.area_um2 == pytest.approx(20 * 0.25, rel=0.2)


PLACES = st.lists(
    st.builds(
        FoundObject,
        x_um=st.floats(-100, 100),
        y_um=st.floats(-100, 100),
        score=st.floats(0.5, 1),
        area_um2=st.floats(1, 400),
        frame=st.just("p0"),
        number=st.integers(0, 3),
        is_cut=st.booleans(),
    ),
    max_size=12,
)


@given(PLACES, st.sampled_from(["score", "size"]), st.integers(1, 5))
def test_the_best_are_chosen_and_none_of_two_frames_twice(found, rank, best):
    everything = choose_objects(found, best=None, rank=rank)
    assert choose_objects(found, best=best, rank=rank) == everything[:best]
    worth = [one.score if rank == "score" else one.area_um2 for one in everything]
    assert worth == sorted(worth, reverse=True)

    def is_twin(one, other):
        apart = math.hypot(one.x_um - other.x_um, one.y_um - other.y_um)
        return one.number != other.number and apart <= max(one.diameter_um, other.diameter_um) / 2

    for n, one in enumerate(everything):
        assert not any(is_twin(one, other) for other in everything[:n])
    for one in found:  # what was left out is there in another frame, whole if it was whole here
        twins = [other for other in everything if is_twin(one, other)]
        assert one in everything or any(one.is_cut or not other.is_cut for other in twins)


def test_neighbours_of_one_frame_are_two_and_a_whole_one_is_better_than_a_cut_one():
    side_by_side = [FoundObject(0, 13.0 * n, 0.9, 960, "p0") for n in range(2)]
    assert len(choose_objects(side_by_side, best=None, rank="score")) == 2
    cut = FoundObject(0, 0, 0.99, 500, "p1", number=1, is_cut=True)
    whole = FoundObject(2, 0, 0.8, 900, "p2", number=2)
    assert choose_objects([cut, whole], best=None, rank="score") == [whole]
    assert choose_objects([cut], best=None, rank="score") == [cut]


def test_an_object_at_the_edge_of_a_frame_is_cut(open_live, frame_of):
    frame = frame_of()
    live = open_live()
    for seen in (frame, frame[:, 8:], frame[8:], frame[:, :9], frame[:9]):
        (one,) = locate_objects(live.push(seen, pixel_size_um=1.0).result(10), (0, 0))
        assert one.is_cut is (seen is not frame)


def test_thousands_are_chosen_and_ordered_in_no_time():
    rng = np.random.default_rng(0)
    found = [
        FoundObject(x, y, score, 100.0, "p", number=n % 50)
        for n, (x, y, score) in enumerate(rng.uniform(0, 1, (4000, 3)) * [3000, 3000, 1])
    ]
    start = time.perf_counter()
    chosen = choose_objects(found, best=None, rank="score")
    assert len(list(order_visits(chosen, start=(0, 0)))) == len(chosen) > 3000
    assert time.perf_counter() - start < 3


@given(st.sampled_from([1, -1]), st.sampled_from([1, -1]), st.booleans(), st.tuples(*[st.floats(-9, 9)] * 2))
def test_the_stage_and_the_picture_agree(x, y, is_turned, offset):
    axes = CameraAxes(x, y, is_turned)
    np.testing.assert_array_equal(axes.to_stage(axes.to_picture(np.array(offset))), np.array(offset))


def test_directions_that_are_none_are_refused():
    with pytest.raises(UsageError, match="give 1 or -1"):
        CameraAxes(0, 1)


@given(PLACES)
def test_every_object_is_visited_once_and_the_nearest_is_always_next(found):
    visits = list(order_visits(found, start=(0.0, 0.0)))
    assert sorted(map(id, visits)) == sorted(map(id, found))
    at = (0.0, 0.0)
    for n, one in enumerate(visits):
        nearest = min(math.hypot(o.x_um - at[0], o.y_um - at[1]) for o in visits[n:])
        assert math.hypot(one.x_um - at[0], one.y_um - at[1]) == nearest
        at = (one.x_um, one.y_um)
