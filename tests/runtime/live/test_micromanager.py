"""A real pymmcore-plus core acquires with devices of Python, and the frames are real fluorescence fields."""

import importlib.util
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pymmcore_plus", reason="needs the extra micromanager")
useq = pytest.importorskip("useq", reason="needs the extra micromanager")

from darcnn.runtime.errors import UsageError  # noqa: E402
from darcnn.runtime.live import Calibration, LiveSegmenter  # noqa: E402
from darcnn.runtime.live.micromanager import (  # noqa: E402
    FoundObject,
    LiveAcquisition,
    SmartAcquisition,
    choose_objects,
    locate_objects,
    order_visits,
)
from darcnn.runtime.load import load  # noqa: E402

LOW_UM, HIGH_UM = 1.0, 0.5
NEAR_UM = 2.0  # how far from the middle of its picture a visited object may be


@pytest.fixture(scope="module")
def microscope(root):
    spec = importlib.util.spec_from_file_location(
        "simulated_microscope", root / "examples" / "simulated_microscope.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def specimen(microscope, root):
    return microscope.make_specimen(root / "tests" / "data")


@pytest.fixture
def core(microscope, specimen):
    core = microscope.open_microscope(specimen)
    yield core
    core.unloadAllDevices()


@pytest.fixture(scope="module")
def model(root):
    """Return what opens the shipped model with a known calibration, so that each frame is one tile."""
    if not (root / "runtime" / "models" / "nuclei-fluorescence.darcnn").exists():
        pytest.skip("the model nuclei-fluorescence is not in this checkout")

    def open_model(**options):
        calibration = Calibration(diameter_px=21.0, pixel_size_um=LOW_UM)
        return LiveSegmenter(load("nuclei-fluorescence", device="cpu"), calibration=calibration, **options)

    return open_model


def survey_of(positions):
    return [
        useq.MDAEvent(index={"p": n}, x_pos=x, y_pos=y, properties=[("Turret", "Label", "10x")])
        for n, (x, y) in enumerate(positions)
    ]


VISIT = useq.MDAEvent(properties=[("Turret", "Label", "20x")], metadata={"why": "closer"})
FOUR = [(-96.0, -96.0), (96.0, -96.0), (-96.0, 96.0), (96.0, 96.0)]


@pytest.mark.slow
def test_a_smart_acquisition_visits_the_best_objects_and_sees_them_in_the_middle(core, model):
    frames = []
    core.mda.events.frameReady.connect(lambda image, event, meta: frames.append((image.copy(), event)))
    with (
        model(queue=8) as live,
        SmartAcquisition(core, live, survey_of(FOUR), visit=VISIT, best=4, pixel_size_um=LOW_UM) as smart,
    ):
        core.run_mda(smart.events()).join()  # in a thread of its own, as programs run it
        assert (smart.n_frames, smart.n_lost) == (4, 0)
        assert len(smart.visits) == 4
        visited = frames[4:]
        assert [event.pos_name for _, event in visited] == [f"object {n}" for n in range(4)]
        assert [event.index["p"] for _, event in frames] == list(range(8))
        for (image, event), one in zip(visited, smart.visits, strict=True):
            assert (event.x_pos, event.y_pos) == (one.x_um, one.y_um)
            assert event.metadata["why"] == "closer"
            assert event.metadata["score"] == one.score
            closer = live.push(image, pixel_size_um=HIGH_UM).result(60)
            near = locate_objects(closer, (one.x_um, one.y_um))
            away = min(math.hypot(o.x_um - one.x_um, o.y_um - one.y_um) for o in near)
            assert away < NEAR_UM
        scores = sorted((one.score for one in smart.found()), reverse=True)
        assert {one.score for one in smart.visits} == set(scores[:4])


def test_frames_are_segmented_while_the_acquisition_runs_with_the_cores_own_pixel_size(core, model):
    core.definePixelSizeConfig("10x")
    core.setPixelSizeUm("10x", LOW_UM)
    with model(queue=8) as live, LiveAcquisition(core, live) as acquisition:
        core.mda.run(survey_of(FOUR[:2]))
        found = acquisition.found()
    assert (acquisition.n_frames, acquisition.n_lost) == (2, 0)
    assert {one.frame for one in found} == {"p0", "p1"}
    for one in found:
        x, y = FOUR[0] if one.frame == "p0" else FOUR[1]
        assert abs(one.x_um - x) <= 96
        assert abs(one.y_um - y) <= 96
    assert 10 < np.median([one.diameter_um for one in found]) < 25


def test_nothing_is_pushed_after_leaving(core, open_live):
    live = open_live(policy="drop_oldest")
    with LiveAcquisition(core, live):
        pass
    core.mda.run(survey_of(FOUR[:1]))
    assert live.stats().pushed == 0


def test_a_segmenter_that_was_closed_does_not_stop_the_acquisition(core, open_live, caplog):
    live, n_frames = open_live(), []
    core.mda.events.frameReady.connect(lambda image: n_frames.append(1))
    live.close()
    with caplog.at_level(logging.ERROR), LiveAcquisition(core, live) as acquisition:
        core.mda.run(survey_of(FOUR))
    assert len(n_frames) == acquisition.n_lost == 4
    assert "frame p3 was not segmented: LiveSegmenter: takes no more frames" in caplog.text


def test_frames_that_fail_or_come_too_late_are_counted_and_the_survey_goes_on(
    core, open_live, engine, caplog
):
    live = open_live(engine, queue=1, policy="drop_newest")  # made for colours: grey frames become three
    with (
        caplog.at_level(logging.WARNING),
        SmartAcquisition(core, live, survey_of(FOUR), visit=VISIT, pixel_size_um=LOW_UM) as smart,
    ):
        engine.gate.clear()
        events = smart.events()
        for event in survey_of(FOUR):
            smart._on_frame(np.zeros((8, 8), np.uint16), event.replace(metadata={"darcnn_survey": True}), {})
        assert smart.found(timeout=0.05) == []  # none is ready
        engine.gate.set()
        smart.found()
        assert smart.n_frames + smart.n_lost == 4
        assert smart.n_lost >= 2
        events.close()
    assert "the acquisition goes on without them" in caplog.text
    assert "the queue was full" in caplog.text


def test_without_a_pixel_size_objects_have_no_place_and_that_is_said(open_live, frame_of, caplog):
    result = open_live().push(frame_of(), key="p0").result(10)
    with caplog.at_level(logging.WARNING):
        assert locate_objects(result, (0.0, 0.0)) == []
    assert "frame p0 has no pixel size" in caplog.text


@pytest.mark.parametrize("axes", [(1, 1), (-1, 1), (1, -1)])
def test_an_object_is_where_the_stage_sees_it_in_the_middle(open_live, frame_of, axes):
    result = open_live().push(frame_of(), pixel_size_um=0.5).result(10)  # 4 x 5 px at (6, 7) of 24 x 24
    (one,) = locate_objects(result, (100.0, -50.0), axes)
    assert one.x_um == pytest.approx(100 + axes[0] * 0.5 * (8.5 - 12), abs=0.3)
    assert one.y_um == pytest.approx(-50 + axes[1] * 0.5 * (9.0 - 12), abs=0.3)
    assert one.area_um2 == pytest.approx(20 * 0.25, rel=0.2)


PLACES = st.lists(
    st.builds(
        FoundObject,
        x_um=st.floats(-100, 100),
        y_um=st.floats(-100, 100),
        score=st.floats(0.5, 1),
        area_um2=st.floats(1, 400),
        frame=st.just("p0"),
    ),
    max_size=12,
)


@given(PLACES, st.sampled_from(["score", "size"]), st.integers(1, 5))
def test_the_best_are_chosen_and_none_twice(found, rank, best):
    everything = choose_objects(found, best=None, rank=rank)
    chosen = choose_objects(found, best=best, rank=rank)
    assert chosen == everything[:best]
    if found:
        worth = [one.score if rank == "score" else one.area_um2 for one in found]
        assert (chosen[0].score if rank == "score" else chosen[0].area_um2) == max(worth)
    for n, one in enumerate(everything):
        for other in everything[:n]:
            apart = math.hypot(one.x_um - other.x_um, one.y_um - other.y_um)
            assert apart > max(one.diameter_um, other.diameter_um) / 2


@given(PLACES)
def test_every_object_is_visited_once_and_the_nearest_is_always_next(found):
    visits = list(order_visits(found, start=(0.0, 0.0)))
    assert sorted(map(id, visits)) == sorted(map(id, found))
    at = (0.0, 0.0)
    for n, one in enumerate(visits):
        nearest = min(math.hypot(o.x_um - at[0], o.y_um - at[1]) for o in visits[n:])
        assert math.hypot(one.x_um - at[0], one.y_um - at[1]) == nearest
        at = (one.x_um, one.y_um)


def test_a_plan_that_makes_no_sense_is_refused(core, open_live):
    live = open_live()
    with pytest.raises(UsageError, match="best: 0 objects; give 1 or more"):
        SmartAcquisition(core, live, [], visit=VISIT, best=0)
    with pytest.raises(UsageError, match="no rank 'beauty'"):
        SmartAcquisition(core, live, [], visit=VISIT, rank="beauty")


@pytest.mark.slow
def test_the_example_runs_as_it_is(root, tmp_path):
    script = root / "examples" / "smart_acquisition.py"
    result = subprocess.run(
        [sys.executable, str(script), "--best", "2", "--rows", "1", "--out", str(tmp_path / "visits.png")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "2 visited:" in result.stdout
    assert (tmp_path / "visits.png").stat().st_size > 1000
