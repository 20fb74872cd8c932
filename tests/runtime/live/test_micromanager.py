"""A real pymmcore-plus core acquires with devices of Python, and the frames are real fluorescence fields."""

import importlib.util
import logging
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("pymmcore_plus", reason="needs the extra micromanager")
useq = pytest.importorskip("useq", reason="needs the extra micromanager")

from darcnn.runtime.errors import UsageError  # noqa: E402
from darcnn.runtime.live import Calibration, LiveSegmenter  # noqa: E402
from darcnn.runtime.live.micromanager import LiveAcquisition, SmartAcquisition  # noqa: E402
from darcnn.runtime.live.visits import locate_objects  # noqa: E402
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


def test_frames_that_come_late_by_another_thread_are_waited_for(core, open_live, frame_of):
    """With Qt frames wait for the thread of the windows, and the survey ends before they are pushed."""
    live, late = open_live(), []
    survey = survey_of(FOUR[:2])
    with SmartAcquisition(core, live, survey, visit=VISIT, pixel_size_um=LOW_UM) as smart:
        core.mda.events.frameReady.disconnect(smart._on_frame)  # as if another thread had them
        late.extend(
            threading.Timer(0.3 + n, smart._on_frame, (frame_of(), event, {}))
            for n, event in enumerate(event.replace(metadata={"darcnn_survey": True}) for event in survey)
        )
        for timer in late:
            timer.start()
        events = list(smart.events())
        for timer in late:
            timer.join()
        core.mda.events.frameReady.connect(smart._on_frame)
        assert len(smart.visits) == 2
        assert len(events) == 4
        assert smart.n_frames == 2


def test_frames_that_never_come_are_not_waited_for_for_ever(core, open_live, monkeypatch, caplog):
    monkeypatch.setattr("darcnn.runtime.live.micromanager._PATIENCE_S", 0.05)
    with (
        caplog.at_level(logging.WARNING),
        SmartAcquisition(core, open_live(), survey_of(FOUR), visit=VISIT) as smart,
    ):
        assert len(list(smart.events())) == 4
    assert "4 frames of the survey have not come" in caplog.text


def test_a_visit_goes_to_the_focus_of_the_survey_and_a_second_run_begins_anew(core, open_live, frame_of):
    survey = [event.replace(z_pos=10.0 * n) for n, event in enumerate(survey_of(FOUR[:2]))]
    with SmartAcquisition(core, open_live(), survey, visit=VISIT, pixel_size_um=LOW_UM) as smart:
        for _ in range(2):
            visits = []
            for event in smart.events():
                if event.metadata.get("darcnn_survey"):
                    smart._on_frame(frame_of(), event, {})
                else:
                    visits.append(event)
            assert sorted(event.z_pos for event in visits) == [0.0, 10.0]
    fixed = VISIT.replace(z_pos=3.0)
    with SmartAcquisition(core, open_live(), survey, visit=fixed, pixel_size_um=LOW_UM) as smart:
        seen = [
            event.z_pos
            for event in smart.events()
            if not event.metadata.get("darcnn_survey") or smart._on_frame(frame_of(), event, {})
        ]
    assert set(seen) == {3.0}


def test_an_autofocus_moves_a_visit_away_from_the_plan(core, open_live, frame_of):
    survey = [event.replace(z_pos=10.0) for event in survey_of(FOUR[:1])]
    with SmartAcquisition(core, open_live(), survey, visit=VISIT, pixel_size_um=LOW_UM) as smart:
        visits = []
        for event in smart.events():
            if event.metadata.get("darcnn_survey"):
                smart._on_frame(frame_of(), event, {"position": {"x": 0.0, "y": 0.0, "z": 15.0}})
            else:
                visits.append((event.x_pos, event.z_pos))
    assert [z for _, z in visits] == [15.0]
    assert visits[0][0] == pytest.approx(FOUR[0][0], abs=12)  # along the stage the plan is right


def test_of_several_channels_one_is_segmented_and_the_others_are_not_waited_for(
    core, open_live, frame_of, monkeypatch
):
    monkeypatch.setattr("darcnn.runtime.live.micromanager._PATIENCE_S", 60.0)

    class OnDapi(SmartAcquisition):
        def accepts(self, event):
            return event.channel.config == "DAPI"

    survey = [event.replace(channel=name) for event in survey_of(FOUR[:2]) for name in ("DAPI", "FITC")]
    start = time.monotonic()
    with OnDapi(core, open_live(), survey, visit=VISIT, pixel_size_um=LOW_UM) as smart:
        for _ in range(2):
            for event in smart.events():
                if event.channel is not None:
                    smart._on_frame(frame_of(), event, {})
            assert (smart.n_frames, smart.n_lost, len(smart.visits)) == (2, 0, 2)
    assert time.monotonic() - start < 50.0  # patience never ran out


@pytest.mark.parametrize("known_by", ["core", "option"])
def test_the_fields_of_a_sequence_are_as_large_as_the_camera_sees_them(core, open_live, known_by):
    if known_by == "core":
        core.definePixelSizeConfig("10x")
        core.setPixelSizeUm("10x", LOW_UM)
    survey = useq.MDASequence(
        stage_positions=[(0, 0)], grid_plan=useq.GridRowsColumns(rows=2, columns=2), channels=["DAPI"]
    )
    size = None if known_by == "core" else LOW_UM
    *_, width, height = core.getROI()
    with SmartAcquisition(core, open_live(), survey, visit=VISIT, pixel_size_um=size) as smart:
        events = smart.events()
        places = {(event.x_pos, event.y_pos) for event in (next(events) for _ in range(4))}
        events.close()
    assert places == {(x * width / 2, y * height / 2) for x in (-1, 1) for y in (-1, 1)}
    assert survey.grid_plan.fov_width is None  # the caller's stays as it is


def test_a_grid_of_fields_of_unknown_size_is_refused(core, open_live):
    survey = useq.MDASequence(stage_positions=[(0, 0)], grid_plan=useq.GridRowsColumns(rows=2, columns=2))
    smart = SmartAcquisition(core, open_live(), survey, visit=VISIT)
    with pytest.raises(UsageError, match="fields of view of unknown size; pass pixel_size_um"):
        next(smart.events())


def test_where_an_event_plans_no_place_the_frame_says_where_the_stage_was(core, open_live, frame_of):
    with LiveAcquisition(core, open_live(), pixel_size_um=LOW_UM) as acquisition:
        place = {"x": 500.0, "y": -700.0, "z": 3.0}
        acquisition._on_frame(frame_of(), useq.MDAEvent(), {"position": place})
        (one,) = acquisition.found()
    assert (abs(one.x_um - 500) < 24, abs(one.y_um + 700) < 24, one.z_um) == (True, True, 3.0)


def test_an_acquisition_without_a_stage_is_not_stopped(core, open_live, frame_of, monkeypatch, caplog):
    def fail():
        raise RuntimeError('No device with label ""')

    with (
        caplog.at_level(logging.ERROR),
        LiveAcquisition(core, open_live(), pixel_size_um=LOW_UM) as acquisition,
    ):
        monkeypatch.setattr(acquisition._core, "getXYPosition", fail)
        acquisition._on_frame(frame_of(), useq.MDAEvent(), {})
    assert acquisition.n_lost == 1
    assert "No device with label" in caplog.text


def test_one_thread_may_ask_while_frames_come_in_another(core, open_live, frame_of):
    live, errors = open_live(), []
    with LiveAcquisition(core, live, pixel_size_um=LOW_UM) as acquisition:

        def ask():
            try:
                while not done.is_set():
                    acquisition.found(0)
            except Exception as err:
                errors.append(err)

        done = threading.Event()
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for n in range(200):
            acquisition._on_frame(frame_of(), useq.MDAEvent(index={"t": n}, x_pos=0, y_pos=0), {})
        done.set()
        for thread in threads:
            thread.join()
        assert len(acquisition.found()) == acquisition.n_frames == 200
    assert errors == []


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
