import logging
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darcnn.runtime.diameter import estimate_diameter
from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.intensity import IntensityRule, Window, measure_window
from darcnn.runtime.live import Calibration, LiveSegmenter
from darcnn.runtime.load import load
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.segmenter import Segmenter

DATA = Path(__file__).resolve().parents[2] / "data" / "target"


@pytest.fixture(scope="module")
def field():
    """A real field of nuclei, 128 x 128 px, as a 12-bit camera would give it."""
    image = Image.open(DATA / "u2os_2abc40c118.png").convert("L")
    return np.asarray(image).astype(np.uint16) * 16


def fluorescence():
    if not (DATA.parents[2] / "runtime" / "models" / "nuclei-fluorescence.darcnn").exists():
        pytest.skip("the model nuclei-fluorescence is not in this checkout")
    return load("nuclei-fluorescence", device="cpu")


def same(one, other):
    np.testing.assert_array_equal(one.boxes, other.boxes)
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.labels(), other.labels())


def test_a_given_window_holds_while_the_size_is_learned():
    tissue = np.asarray(Image.open(next((DATA.parent / "tissue").glob("*.png"))).convert("RGB"))
    frame = tissue.astype(np.uint16) * 16  # of a camera with 12 bits
    window = Window(0.0, 4095.0)
    with LiveSegmenter("nuclei-he", calibration=Calibration(window=window)) as live:
        found = live.push(frame).outcome(120)
    assert found.status == "done", found.error
    with load("nuclei-he", device="cpu") as plain:
        same(found.instances, plain(frame, window=window))


def test_a_dark_frame_does_not_teach_what_white_is():
    engine = OracleEngine(tile_px=64, channels=1)
    frame = np.zeros((60, 60), np.uint16)
    frame[5:15, 5:15], frame[30:40, 30:40] = 100, 200  # nowhere near the white of 16 bits
    with LiveSegmenter(Segmenter(engine, make_oracle_manifest(engine, halo_px=16))) as live:
        assert live.push(np.zeros_like(frame)).outcome(30).status == "done"
        found = live.push(frame).outcome(30)
    assert found.status == "failed"
    assert "65535 is white" in str(found.error)


@pytest.mark.slow
def test_statistics_are_learned_once_and_never_taken_from_a_later_frame(field):
    with fluorescence() as plain:
        first = plain(field)
        with ArrayReader(field) as reader:
            diameter = estimate_diameter(plain, reader)
    dim = (field // 4).astype(np.uint16)
    with LiveSegmenter(fluorescence()) as live:
        assert live.calibration is None
        same(live.push(field).result(60).instances, first)
        learned = live.calibration
        dark = live.push(dim).result(60).instances
        assert live.calibration is learned
        assert learned.diameter_px == diameter
        assert learned.window == measure_window(IntensityRule("percentile", 0.5, 99.8), field)
        assert learned.dtype == np.uint16
    with LiveSegmenter(fluorescence(), calibration=learned) as live:
        same(live.push(dim).result(60).instances, dark)
        assert live.calibration == learned


@pytest.mark.slow
def test_a_frame_learns_anew_where_that_is_asked(field):
    dim = (field // 4).astype(np.uint16)
    given = Calibration(window=Window(0.0, 1e7), diameter_px=27.0)
    with LiveSegmenter(fluorescence(), calibration=given) as live:
        assert len(live.push(dim).result(60).instances) == 0  # black
        assert live.calibration == given
        again = live.push(dim, calibrate=True).result(60)
        assert len(again.instances) > 0
        assert live.calibration.window == measure_window(IntensityRule("percentile", 0.5, 99.8), dim)
    with LiveSegmenter(fluorescence(), calibration="each") as live:
        same(live.push(field).result(60).instances, fluorescence()(field))
        same(live.push(dim).result(60).instances, fluorescence()(dim))


def test_what_is_given_is_kept_and_only_the_rest_is_learned(field):
    with LiveSegmenter(fluorescence(), calibration=Calibration(diameter_px=30.0)) as live:
        live.push(field).result(60)
        assert live.calibration.diameter_px == 30.0
        assert live.calibration.window is not None


def test_a_frame_of_another_type_than_the_calibration_fails_and_says_what_to_do(field):
    with LiveSegmenter(fluorescence(), calibration=Calibration(diameter_px=27.0)) as live:
        live.push(field).result(60)
        other = live.push((field // 16).astype(np.uint8), key="other")
        with pytest.raises(InputError, match="frame other: holds uint8, the calibration was made for uint16"):
            other.result(60)
        assert live.push(field).result(60).status == "done"


def test_a_known_pixel_size_carries_the_diameter_to_another_magnification(field):
    double = np.repeat(np.repeat(field, 2, 0), 2, 1)
    with LiveSegmenter(fluorescence(), calibration=Calibration(diameter_px=27.0, pixel_size_um=1.0)) as live:
        one = live.push(field, pixel_size_um=1.0).result(60)
        two = live.push(double, pixel_size_um=0.5).result(60)
    assert two.n_tiles == one.n_tiles
    assert abs(len(one.instances) - len(two.instances)) <= 1


def test_the_first_frame_with_objects_is_learned_from_whatever_comes_before(field, caplog):
    noise = np.random.default_rng(0).normal(100, 3, field.shape).astype(np.uint16)
    black = np.zeros((64, 64), np.uint16)
    with caplog.at_level(logging.WARNING), LiveSegmenter(fluorescence()) as live:
        for empty in (black, noise):
            assert len(live.push(empty).result(60).instances) == 0
            assert live.calibration is None
        same(live.push(field).result(60).instances, fluorescence()(field))
        learned = live.calibration
        live.push(noise, calibrate=True).result(60)
        assert live.calibration == learned
    assert caplog.text.count("no objects to learn brightness and size from: the next frame is tried") == 3


def test_brightness_alone_is_learned_from_the_first_frame_with_objects_too(field):
    with LiveSegmenter(fluorescence(), calibration=Calibration(diameter_px=27.0)) as live:
        live.push(np.zeros_like(field)).result(60)
        assert live.calibration.window is None
        assert len(live.push(field).result(60).instances) > 0
        assert live.calibration.window is not None


def test_the_byte_order_is_no_other_type(field):
    with LiveSegmenter(fluorescence(), calibration=Calibration(diameter_px=27.0)) as live:
        first = live.push(field.astype(">u2")).result(60)
        same(live.push(field.astype("<u2")).result(60).instances, first.instances)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": Window(200, 50)}, "is no window"),
        ({"window": Window(100, 100)}, "is no window"),
        ({"window": Window(math.nan, 10)}, "is no window"),
        ({"window": Window((0, 5), (10, 5))}, "is no window"),
        ({"window": (0, 255)}, "is no window"),
        ({"diameter_px": 0}, "diameter_px is 0"),
        ({"diameter_px": math.nan}, "diameter_px is nan"),
        ({"pixel_size_um": "1"}, "pixel_size_um is '1'"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Calibration(**values)


@pytest.mark.slow
def test_values_that_are_not_finite_are_black_and_do_not_count(field):
    holes = field.astype(np.float32)
    calibration = Calibration(window=Window(32.0, 3375.0), diameter_px=27.0)
    holes[:, :64] = np.nan
    black = field.astype(np.float32)
    black[:, :64] = 0
    with LiveSegmenter(fluorescence(), calibration=calibration) as live:
        same(live.push(holes).result(60).instances, live.push(black).result(60).instances)
        nothing = live.push(np.full((64, 64), np.nan, np.float32), calibrate=True).result(60)
        assert len(nothing.instances) == 0


@pytest.mark.slow
def test_the_first_frame_is_as_fast_as_later_ones(field):
    calibration = Calibration(window=Window(32.0, 3375.0), diameter_px=27.0)

    def first_to_later():
        with LiveSegmenter(fluorescence(), calibration=calibration) as live:
            times = [live.push(field).result(60).times_ms.total for _ in range(6)]
        return times[0] / np.median(times[1:])

    assert min(first_to_later() for _ in range(3)) < 1.5  # the machine may be busy, once or twice


def test_what_is_no_calibration_is_refused_before_anything_is_loaded():
    with pytest.raises(
        UsageError, match="'every' is no calibration; give a Calibration, or one of first, each"
    ):
        LiveSegmenter("no such model", calibration="every")


def test_a_frame_that_tells_no_size_teaches_nothing_else(field, caplog):
    """One nucleus is too little to tell a size; its brightness must not be kept either."""
    one = np.full_like(field, np.median(field))
    one[40:70, 40:70] = field[40:70, 40:70]
    with LiveSegmenter(fluorescence()) as live:
        live.push(one).result(60)
        learned = live.calibration
        live.push(field).result(60)
        assert live.calibration.diameter_px is not None
        assert learned is None or learned.diameter_px is not None


def test_a_frame_of_few_bits_is_refused_in_words_of_python_once(make_engine, to_segmenter, frame_of):
    segmenter = to_segmenter(make_engine())
    asked = []
    measure = segmenter.__class__.measure

    def watched(self, reader, plan):
        asked.append(reader.info.dtype)
        return measure(self, reader, plan)

    dark = frame_of().astype(np.uint16)
    bright = dark * 257
    bright[0] = 65535
    with pytest.MonkeyPatch.context() as patch, LiveSegmenter(segmenter) as live:
        patch.setattr(segmenter.__class__, "measure", watched)
        advice = r"give calibration=Calibration\(window=Window\(0, 255\)\) if the camera"
        with pytest.raises(InputError, match=advice):
            live.push(dark + 3).result(10)
        assert live.push(bright).result(10).status == "done"
        assert live.push(dark).result(10).status == "done"  # as bright as it may be
        assert len(asked) == 2
