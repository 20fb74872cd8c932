"""The C library finds what Python finds, refuses what Python refuses, and is clean under the sanitizers."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import darcnn.runtime
from darcnn.runtime.bundle import MEMBER_CAPS, open_bundle, write_bundle
from darcnn.runtime.engines.openvino import OpenVinoEngine
from darcnn.runtime.errors import BundleError, InputError
from darcnn.runtime.manifest import MAX_TILE_PX, manifest_to_json
from darcnn.runtime.segmenter import Segmenter

TOLERANCE = 1e-3  # of boxes, in pixels, and of scores
TYPES = {"uint8": 0, "uint16": 1, "float32": 2}
ARGUMENT, BUNDLE, INPUT, ENGINE = 1, 2, 3, 4
SANITIZED = {"address": "address,undefined,float-cast-overflow", "thread": "thread"}


class Frame(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("size_bytes", ctypes.c_size_t),
        ("row_stride_bytes", ctypes.c_size_t),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("type", ctypes.c_int),
        ("is_rgb", ctypes.c_int32),
    )


class OpenOptions(ctypes.Structure):
    _fields_ = (("engine", ctypes.c_char_p), ("engine_dir", ctypes.c_char_p), ("threads", ctypes.c_int32))


class Info(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("engine", ctypes.c_char_p),
        ("channels", ctypes.c_int32),
        ("tile_px", ctypes.c_int32),
        ("nominal_diameter_px", ctypes.c_double),
        ("mpp", ctypes.c_double),
        ("min_score", ctypes.c_double),
    )


class Options(ctypes.Structure):
    _fields_ = (
        ("diameter_px", ctypes.c_double),
        ("mpp", ctypes.c_double),
        ("window_low", ctypes.c_double),
        ("window_high", ctypes.c_double),
        ("min_score", ctypes.c_double),
        ("channel", ctypes.c_int32),
    )


class Object(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("x0", "y0", "x1", "y1", "score")),
        *(
            (name, ctypes.c_int32)
            for name in ("is_truncated", "mask_x", "mask_y", "mask_width", "mask_height")
        ),
        ("mask", ctypes.POINTER(ctypes.c_uint8)),
        ("outline", ctypes.POINTER(ctypes.c_double)),
        ("n_outline", ctypes.c_size_t),
    )


@dataclass(frozen=True)
class Found:
    box: tuple[float, ...]
    score: float
    is_truncated: bool
    origin: tuple[int, int]
    mask: np.ndarray
    outline: np.ndarray


class NativeError(Exception):
    def __init__(self, code, message):
        self.code = code
        super().__init__(message)


class Library:
    """darcnn.h as Python objects."""

    def __init__(self, path):
        self._c = ctypes.CDLL(str(path))
        self._c.darcnn_last_error.restype = ctypes.c_char_p
        self._c.darcnn_result_count.restype = ctypes.c_size_t
        for name in ("darcnn_free", "darcnn_result_free", "darcnn_result_count"):
            getattr(self._c, name).argtypes = [ctypes.c_void_p]
        self._c.darcnn_result_object.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._c.darcnn_result_labels.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def exports(self, name):
        return hasattr(self._c, name)

    def call(self, name, *arguments):
        code = getattr(self._c, name)(*arguments)
        if code:
            message = self._c.darcnn_last_error().decode()
            assert message
            assert "\n" not in message
            raise NativeError(code, message)

    def open(self, path, **options):
        chosen, model = OpenOptions(), ctypes.c_void_p(1)
        self._c.darcnn_default_open_options(ctypes.byref(chosen))
        for name, value in options.items():
            setattr(chosen, name, value)
        try:
            self.call("darcnn_open", os.fsencode(path), ctypes.byref(chosen), ctypes.byref(model))
        except NativeError:
            assert model.value is None
            raise
        return model

    def free(self, model):
        self._c.darcnn_free(model)

    def info(self, model):
        info = Info()
        self.call("darcnn_model_info", model, ctypes.byref(info))
        return info

    def segment(self, model, image, *, frame=None, **options):
        with self._result(model, make_frame(image) if frame is None else frame, options) as result:
            return [self._object(result, row) for row in range(self._c.darcnn_result_count(result))]

    def labels(self, model, image, **options):
        labels = np.full(image.shape[:2], -1, np.int32)  # what was there before is overwritten
        with self._result(model, make_frame(image), options) as result:
            self.call("darcnn_result_labels", result, labels.ctypes.data, labels.size)
        return labels

    @contextmanager
    def _result(self, model, frame, options):
        chosen, result = Options(), ctypes.c_void_p(1)
        self._c.darcnn_default_options(ctypes.byref(chosen))
        for name, value in options.items():
            setattr(chosen, name, value)
        try:
            self.call(
                "darcnn_segment", model, ctypes.byref(frame), ctypes.byref(chosen), ctypes.byref(result)
            )
        except NativeError:
            assert result.value is None
            raise
        try:
            yield result
        finally:
            self._c.darcnn_result_free(result)

    def _object(self, result, row):
        o = Object()
        self.call("darcnn_result_object", result, row, ctypes.byref(o))
        mask = np.ctypeslib.as_array(o.mask, (o.mask_height, o.mask_width))
        assert set(np.unique(mask)) <= {0, 1}
        return Found(
            box=(o.x0, o.y0, o.x1, o.y1),
            score=o.score,
            is_truncated=bool(o.is_truncated),
            origin=(o.mask_x, o.mask_y),
            mask=mask.astype(np.bool_),
            outline=np.ctypeslib.as_array(o.outline, (o.n_outline, 2)).copy(),
        )


def make_frame(image, **changes):
    """Return the frame of an array whose pixels are contiguous along a row; the caller keeps the array."""
    height, width = image.shape[:2]
    channels = image.shape[2] if image.ndim == 3 else 1
    frame = Frame(
        pixels=image.ctypes.data,
        size_bytes=(height - 1) * image.strides[0] + width * channels * image.itemsize,
        row_stride_bytes=image.strides[0],
        width=width,
        height=height,
        channels=channels,
        type=TYPES[image.dtype.name],
        is_rgb=channels == 3 and image.dtype == np.uint8,
    )
    for name, value in changes.items():
        setattr(frame, name, value)
    return frame


def build(root, folder, options=""):
    """Run `make native` into `folder`, or skip with what is missing."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'darcnn[native]'")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for program in ("make", "cmake", "ninja", "c++"):
        if shutil.which(program, path=programs) is None:
            pytest.skip(f"no {program} on this machine")
    command = ["make", "native", f"NATIVE_PYTHON={sys.executable}", f"NATIVE_BUILD={folder}"]
    made = subprocess.run(
        [*command, f"NATIVE_OPTIONS={options}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "warning" not in made.stdout + made.stderr
    return folder


@pytest.fixture(scope="session")
def built(root, tmp_path_factory):
    return build(root, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def library(built):
    return Library(
        built / {"darwin": "libdarcnn.dylib", "win32": "darcnn.dll"}.get(sys.platform, "libdarcnn.so")
    )


class FirstLook(Segmenter):
    """Reports what it sees at once, as the library does; Python looks again at full tiles and cut objects."""

    def _look_again(self, sampled, found):
        return found


@pytest.fixture(scope="session")
def shipped(root, library):
    """Return (native model, segmenter of Python) of a shipped model."""
    opened = {}

    def get(name):
        if name not in darcnn.runtime.shipped_models():
            pytest.skip(f"the model {name} is not in this checkout")
        if name not in opened:
            path = root / "runtime" / "models" / f"{name}.darcnn"
            bundle = open_bundle(path)
            opened[name] = (library.open(path), FirstLook(OpenVinoEngine(bundle), bundle.manifest))
        return opened[name]

    yield get
    for model, segmenter in opened.values():
        library.free(model)
        segmenter.close()


@pytest.fixture
def tiny(library, tiny_bundle):
    """Return (native model, segmenter of Python) of a bundle whose batch is two tiles of 8 px."""
    model, bundle = library.open(tiny_bundle), open_bundle(tiny_bundle)
    with FirstLook(OpenVinoEngine(bundle), bundle.manifest) as segmenter:
        yield model, segmenter
    library.free(model)


def check_same(found, expected):
    """Compare what C found with the Instances of Python, in the order that both keep."""
    assert len(found) == len(expected)
    for row, one in enumerate(found):
        np.testing.assert_allclose(one.box, expected.boxes[row], atol=TOLERANCE)
        np.testing.assert_allclose(one.score, expected.scores[row], atol=TOLERANCE)
        assert one.is_truncated == expected.truncated[row]
        assert one.origin == tuple(expected.origins[row])
        np.testing.assert_array_equal(one.mask, expected.masks[row])
        ring = expected.outlines[row]
        assert (one.outline[0] == one.outline[-1]).all()
        np.testing.assert_allclose(_sorted(one.outline), _sorted(ring), atol=TOLERANCE)


def _sorted(ring):
    """Return the points of a closed ring in an order that does not depend on where it starts."""
    points = np.round(ring[:-1], 6)
    return points[np.lexsort(points.T)]


def read_grey(path):
    pixels = np.asarray(Image.open(path))
    return np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels[:, :, 0])


def test_every_function_of_the_header_is_exported_and_documented(library, root):
    header = (root / "runtime" / "native" / "darcnn.h").read_text(encoding="utf-8")
    page = (root / "docs" / "native.md").read_text(encoding="utf-8")
    names = re.findall(r"^DARCNN_API [^;]*?(darcnn_\w+)\(", header, re.MULTILINE)
    assert len(names) == header.count("\nDARCNN_API ") > 9
    assert [name for name in names if not library.exports(name)] == []
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.slow
def test_same_objects_as_python_on_20_real_fields(library, shipped, shared):
    folder = shared / "data" / "fluorescence" / "val" / "images"
    of_one_tile = [path for name in ("small", "dim", "misc") for path in sorted(folder.glob(f"{name}_*"))]
    paths = of_one_tile[::2][:17] + sorted(folder.glob("u2os_*"))[:3]  # those are of four
    if len(paths) < 20:
        pytest.skip("the fluorescence images are not beside this checkout")
    model, segmenter = shipped("nuclei-fluorescence")
    n_objects = 0
    for path in paths:
        image = read_grey(path)
        expected = segmenter(image, pixels=True)
        check_same(library.segment(model, image), expected)
        n_objects += len(expected)
    assert n_objects > 500


@pytest.mark.parametrize("size", [{}, {"diameter_px": 21.0}, {"diameter_px": 61.3}], ids=str)
def test_same_objects_as_python_at_any_scale(library, shipped, root, size):
    model, segmenter = shipped("nuclei-fluorescence")
    image = read_grey(root / "tests" / "data" / "target" / "u2os_1f6b7cead1.png")
    expected = segmenter(image, pixels=not size, **size)
    assert len(expected) > 0
    check_same(library.segment(model, image, **size), expected)


@pytest.mark.parametrize("name", ["nuclei-fluorescence", "nuclei-he"])
def test_model_says_what_it_is(library, shipped, name):
    model, segmenter = shipped(name)
    check_info(library.info(model), segmenter)


def test_model_without_a_scale_says_zero(library, tiny):
    model, segmenter = tiny
    check_info(library.info(model), segmenter)
    assert library.info(model).mpp == 0


def check_info(info, segmenter):
    manifest, spec = segmenter.manifest, segmenter.engine.spec
    assert (info.name.decode(), info.engine.decode()) == (manifest.name, spec.name)
    assert (info.channels, info.tile_px) == (manifest.input.channels, manifest.input.tile_px)
    assert info.nominal_diameter_px == manifest.input.nominal_diameter_px
    assert (info.mpp, info.min_score) == (manifest.input.mpp or 0, manifest.limits.min_score)


def test_label_image_is_that_of_python(library, shipped, root):
    model, segmenter = shipped("nuclei-fluorescence")
    image = read_grey(root / "tests" / "data" / "target" / "u2os_1f6b7cead1.png")
    expected = segmenter(image, pixels=True)
    labels = expected.labels()
    assert sum(mask.sum() for mask in expected.masks) > np.count_nonzero(labels)  # some overlap
    np.testing.assert_array_equal(library.labels(model, image), labels)


def test_equal_scores_and_no_objects_on_the_label_image_are_those_of_python(library, tiny):
    model, segmenter = tiny
    for grey in (200, 0):  # five equal objects of equal scores, or none
        image = np.full((11, 21, 3), grey, np.uint8)
        expected = segmenter(image, pixels=True)
        assert bool(len(expected)) == bool(grey)
        np.testing.assert_array_equal(library.labels(model, image), expected.labels())


def test_frame_beyond_16_megapixels_gives_what_python_finds(library, shipped, root):
    model, segmenter = shipped("nuclei-fluorescence")
    small = Image.open(root / "tests" / "data" / "target" / "u2os_1f6b7cead1.png")
    image = np.asarray(small.resize((4200, 4000))).astype(np.uint16) * 37  # its brightness is sampled
    expected = segmenter(image, diameter_px=250.0)
    assert len(expected) > 5
    check_same(library.segment(model, image, diameter_px=250.0), expected)


def test_strong_reduction_of_a_large_frame_stays_within_a_quarter_of_a_network_pixel(library, shipped, root):
    # Python resamples such frames in blocks: a network pixel may differ by one grey level
    model, segmenter = shipped("nuclei-fluorescence")
    small = Image.open(root / "tests" / "data" / "target" / "u2os_1f6b7cead1.png")
    image = np.asarray(small.resize((4300, 3000))).copy()
    found, expected = library.segment(model, image, diameter_px=900.0), segmenter(image, diameter_px=900.0)
    assert len(found) == len(expected) > 5
    reduction = 900 / 42  # nominal diameter of the model
    for one in found:
        nearest = np.argmin(np.abs(expected.boxes - one.box).max(axis=1))
        np.testing.assert_allclose(one.box, expected.boxes[nearest], atol=0.25 * reduction)
        np.testing.assert_allclose(one.score, expected.scores[nearest], atol=0.01)


def test_same_objects_as_python_in_colour(library, shipped, root):
    model, segmenter = shipped("nuclei-he")
    image = np.asarray(
        Image.open(root / "tests" / "data" / "tissue" / "purple_2246874c8b.png").convert("RGB")
    ).copy()
    for mpp in (0.25, 0.4):
        expected = segmenter(image, mpp=mpp)
        assert len(expected) > 5
        check_same(library.segment(model, image, mpp=mpp), expected)


def test_colours_with_fractions_end_at_one_or_are_refused(library, shipped, root):
    model, segmenter = shipped("nuclei-he")
    image = np.asarray(
        Image.open(root / "tests" / "data" / "tissue" / "purple_2246874c8b.png").convert("RGB")
    ).astype(np.float32)
    image[3, 4] = np.nan
    for is_rgb in (True, False):
        with pytest.raises(InputError) as expected:
            segmenter(image, mpp=0.25)
        frame = make_frame(image, is_rgb=is_rgb)
        with pytest.raises(NativeError, match="0 is black and 1 is white") as caught:
            library.segment(model, image, frame=frame, mpp=0.25)
        assert caught.value.code == INPUT
        assert str(caught.value).split("; ")[0] == f"frame: {expected.value.problem}"
        assert len(library.segment(model, image, frame=frame, mpp=0.25, window_high=255)) > 5
    divided = image / np.float32(255)
    expected = segmenter(divided, mpp=0.25)
    assert len(expected) > 5
    check_same(library.segment(model, divided, mpp=0.25), expected)


def test_types_strides_and_what_is_not_finite(library, shipped, root):
    model, segmenter = shipped("nuclei-fluorescence")
    image = read_grey(root / "tests" / "data" / "target" / "u2os_1f6b7cead1.png")
    camera = image.astype(np.uint16) * 16 + 100
    floats = image.astype(np.float32) / 7
    floats[3:9, 4:50], floats[50, 50] = np.nan, np.inf
    padded = np.full((image.shape[0], image.shape[1] + 37), 255, np.uint8)[:, : image.shape[1]]
    padded[:] = image
    for frame in (camera, floats, padded):
        expected = segmenter(frame, pixels=True)
        assert len(expected) > 0
        check_same(library.segment(model, frame), expected)


def test_window_given_is_that_of_the_frame_it_was_measured_on(library, shipped, root):
    model, _ = shipped("nuclei-fluorescence")
    image = read_grey(root / "tests" / "data" / "target" / "u2os_1f6b7cead1.png")
    low, high = np.percentile(image, (0.5, 99.8))
    measured = library.segment(model, image)
    given_window = library.segment(model, image, window_low=low, window_high=high)
    assert [one.box for one in measured] == [one.box for one in given_window]
    assert not library.segment(model, image, window_low=200, window_high=255)  # all of it is black there
    assert len(library.segment(model, image, min_score=0.99)) < len(measured)


IMAGES = st.tuples(
    st.integers(1, 23), st.integers(1, 23), st.sampled_from(["uint8", "float32"]), st.integers(0, 2**32 - 1)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(IMAGES, st.sampled_from([None, 1.7, 3.0, 4.1]))
def test_any_small_frame_gives_what_python_finds(library, tiny, asked, diameter_px):
    model, segmenter = tiny
    height, width, kind, seed = asked
    image = np.random.default_rng(seed).integers(40, 256, (height, width, 3), np.uint8)
    image = image if kind == "uint8" else image[:, :, 0].astype(np.float32) / 255
    expected = segmenter(image, diameter_px=diameter_px, pixels=diameter_px is None)
    check_same(library.segment(model, image, diameter_px=diameter_px or 0.0), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pixels": None}, "pixels is a null pointer"),
        ({"width": 0}, "of 0 x 8 pixels"),
        ({"height": -1}, "of 9 x -1 pixels"),
        ({"width": 10}, "row_stride_bytes is 27, a row has 30"),
        ({"row_stride_bytes": 26}, "row_stride_bytes is 26, a row has 27"),
        ({"row_stride_bytes": 2**63}, "row_stride_bytes is"),
        ({"size_bytes": 215}, "size_bytes is 215, the frame needs 216"),
        ({"height": 9}, "size_bytes is 216, the frame needs 243"),
        ({"channels": 0}, "0 channels"),
        ({"type": 7}, "unknown pixel type"),
        ({"type": 1, "row_stride_bytes": 55}, "not aligned"),
        ({"channels": 2, "is_rgb": 1}, "neither 3 nor 4 channels"),
    ],
    ids=str,
)
def test_wrong_frame_is_an_error_and_the_next_one_goes_on(library, tiny, changes, said):
    model, _ = tiny
    image = np.full((8, 9, 3), 200, np.uint8)
    with pytest.raises(NativeError, match=said) as caught:
        library.segment(model, image, frame=make_frame(image, **changes))
    assert caught.value.code == ARGUMENT
    assert library.segment(model, image)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"diameter_px": -1}, ARGUMENT, "not a size"),
        ({"mpp": float("nan")}, ARGUMENT, "not a size"),
        ({"diameter_px": 1e-3}, INPUT, "scaled by"),
        ({"window_low": 9, "window_high": 3}, ARGUMENT, "window_low is not below"),
        ({"window_low": 0, "window_high": float("inf")}, ARGUMENT, "window_low is not below"),
        ({"window_low": -1e300, "window_high": 1e300}, ARGUMENT, "both within 1e38"),
        ({"min_score": 1.5}, ARGUMENT, "min_score is not a number between 0 and 1"),
        ({"min_score": float("nan")}, ARGUMENT, "min_score is not a number between 0 and 1"),
        ({"channel": 3}, INPUT, "no channel 3"),
    ],
    ids=str,
)
def test_wrong_option_is_an_error(library, tiny, options, code, said):
    with pytest.raises(NativeError, match=said) as caught:
        library.segment(tiny[0], np.full((8, 9, 3), 200, np.uint8), **options)
    assert caught.value.code == code


def test_null_pointers_are_errors(library, tiny, tiny_bundle):
    model = tiny[0]
    path, result = os.fsencode(tiny_bundle), ctypes.c_void_p()
    frame = ctypes.byref(make_frame(np.zeros((8, 9, 3), np.uint8)))
    calls = [
        ("darcnn_open", (None, None, ctypes.byref(result)), "path"),
        ("darcnn_open", (path, None, None), "model"),
        ("darcnn_segment", (None, frame, None, ctypes.byref(result)), "model"),
        ("darcnn_segment", (model, None, None, ctypes.byref(result)), "frame"),
        ("darcnn_segment", (model, frame, None, None), "result"),
        ("darcnn_result_object", (None, 0, ctypes.byref(Object())), "result"),
        ("darcnn_model_info", (None, ctypes.byref(Info())), "model"),
        ("darcnn_model_info", (model, None), "info"),
        ("darcnn_result_labels", (None, ctypes.byref(result), 1), "result"),
    ]
    for name, arguments, what in calls:
        with pytest.raises(NativeError, match=f"{what}: is a null pointer") as caught:
            library.call(name, *arguments)
        assert caught.value.code == ARGUMENT
    library.call("darcnn_segment", model, frame, None, ctypes.byref(result))
    for row, target in ((0, None), (99, ctypes.byref(Object()))):
        with pytest.raises(NativeError, match=r"object: is a null|there are \d+ objects"):
            library.call("darcnn_result_object", result, row, target)
    for target, n, said in ((None, 72, "labels: is a null"), (ctypes.byref(Object()), 71, "has 72 pixels")):
        with pytest.raises(NativeError, match=said) as caught:
            library.call("darcnn_result_labels", result, target, n)
        assert caught.value.code == ARGUMENT
    library._c.darcnn_result_free(result)
    library._c.darcnn_result_free(None)
    library._c.darcnn_free(None)
    assert library._c.darcnn_result_count(None) == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"engine": b"onnx"}, ARGUMENT, "no engine onnx"),
        ({"threads": -1}, ARGUMENT, "threads is negative"),
        ({"engine": b"tensorrt"}, ENGINE, "TensorRT was not built in"),
    ],
    ids=str,
)
def test_wrong_engine_is_an_error(library, tiny_bundle, options, code, said):
    with pytest.raises(NativeError, match=said) as caught:
        library.open(tiny_bundle, **options)
    assert caught.value.code == code


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO is hidden in the way of Linux")
def test_openvino_without_its_cpu_is_an_error_of_the_engine(built, tiny_bundle, tmp_path):
    for path in Path(find_spec("openvino").submodule_search_locations[0], "libs").iterdir():
        if "intel_cpu" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    command = [built / "segment_raw", tiny_bundle, tiny_bundle, "8", "8", "uint8"]
    ran = subprocess.run(
        command,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 1
    assert "open: CPU: OpenVINO failed" in ran.stderr


def refused(library, path):
    """Return why C refuses the bundle, "" where it does not: as a bundle, in a line that names the file."""
    try:
        library.free(library.open(path))
        return ""
    except NativeError as err:
        refusal = err
    assert refusal.code == BUNDLE
    assert str(refusal).startswith(f"{path}: ")
    return str(refusal)


def test_a_file_that_is_no_bundle_is_refused(library, tmp_path, root):
    assert "no such file" in refused(library, tmp_path / "none.darcnn")
    assert "is a folder or a device" in refused(library, tmp_path)
    for content, said in (
        (b"", "is empty"),
        (b"PK\x03\x04", "cut short"),
        (b"\x89PNG" + bytes(99), "not a bundle"),
    ):
        (tmp_path / "a.darcnn").write_bytes(content)
        assert said in refused(library, tmp_path / "a.darcnn")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(sum(MEMBER_CAPS.values()) + 2**21)
    assert "MiB" in refused(library, tmp_path / "huge")


def rewrite(path, change=lambda entries: None, **options):
    """Write the zip at `path` again, its members changed by `change`."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    entries = change(entries) or entries
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries:
            archive.writestr(name, content)


def with_manifest(entries, text):
    return [("manifest.json", text), *entries[1:]]


def with_field(entries, path, value):
    table = json.loads(entries[0][1])
    *parents, name = path.split(".")
    inner = table
    for parent in parents:
        inner = inner[parent]
    if value is None:
        del inner[name]
    else:
        inner[name] = value
    return with_manifest(entries, json.dumps(table))


BROKEN = {
    "is compressed": lambda path: rewrite(path, compression=zipfile.ZIP_DEFLATED),
    "which no bundle has": lambda path: rewrite(path, lambda e: [*e, ("../LICENSE", b"")]),
    "lacks mask.onnx": lambda path: rewrite(path, lambda e: [x for x in e if x[0] != "mask.onnx"]),
    "is not JSON": lambda path: rewrite(path, lambda e: with_manifest(e, '{"format": 1,}')),
    "is not JSON, it is larger or nests": lambda path: rewrite(
        path, lambda e: with_manifest(e, "[" * 100_000)
    ),
    # each element would repeat the name: 25 GB
    "than a manifest": lambda path: rewrite(
        path, lambda e: with_manifest(e, f'{{"{"a" * 500_000}": [{"0," * 50_000}0]}}')
    ),
    "than a manifest at byte 30000": lambda path: rewrite(
        path, lambda e: with_manifest(e, str([0] * 20_000))
    ),
    "is not a table": lambda path: rewrite(path, lambda e: with_manifest(e, "[1]")),
    "names no format": lambda path: rewrite(path, lambda e: with_field(e, "format", True)),
    "made by a newer darcnn": lambda path: rewrite(path, lambda e: with_field(e, "format", 2)),
    "unknown field": lambda path: rewrite(path, lambda e: with_field(e, "colour", "red")),
    "lacks limits/detections": lambda path: rewrite(path, lambda e: with_field(e, "limits.detections", None)),
    "input/tile_px": lambda path: rewrite(path, lambda e: with_field(e, "input.tile_px", "8")),
    "does not list the other": lambda path: rewrite(path, lambda e: with_field(e, "files", {})),
    "(sha256)": lambda path: rewrite(path, lambda e: [*e[:-1], ("LICENSE", b"another\n")]),
    "LICENSE has too many MiB": lambda path: rewrite(
        path, lambda e: [*e[:-1], ("LICENSE", bytes(2**20 + 1))]
    ),
}


@pytest.mark.parametrize("said", BROKEN)
def test_what_python_refuses_is_refused(library, tiny_bundle, said):
    BROKEN[said](tiny_bundle)
    with pytest.raises(BundleError):
        open_bundle(tiny_bundle)
    assert said in refused(library, tiny_bundle)


def test_graphs_that_differ_from_the_manifest_are_refused(library, tmp_path, manifest, members, make_members):
    path = tmp_path / "a.darcnn"
    write_bundle(path, manifest, make_members(slots=7))
    assert "detect.onnx has boxes float32 [2, 7, 4]" in refused(library, path)
    write_bundle(path, replace(manifest, limits=replace(manifest.limits, detections=9)), members)
    assert "ask for boxes float32 [2, 9, 4]" in refused(library, path)
    write_bundle(path, replace(manifest, graphs={}), members)
    assert "does not say what atlas is" in refused(library, path)
    write_bundle(path, manifest, {**members, "mask.onnx": b"not a graph"})
    assert "cannot read mask.onnx" in refused(library, path)
    external = pytest.importorskip("onnx", reason="the graph is made with onnx").ModelProto()
    external.graph.initializer.add().external_data.add(key="location", value="w.bin")
    write_bundle(
        path, manifest, {**members, "mask.onnx": members["mask.onnx"] + external.SerializeToString()}
    )
    assert "mask.onnx keeps weights in another file" in refused(library, path)
    largest = replace(manifest, input=replace(manifest.input, tile_px=MAX_TILE_PX))
    write_bundle(path, largest, members)
    assert f"ask for tile uint8 [2, {MAX_TILE_PX}, {MAX_TILE_PX}, 3]" in refused(library, path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(place=-10, bit=0, length=1)  # of the end of the zip: how long its directory is
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), length=st.integers(0, 10**6))
def test_damage_that_python_refuses_is_refused(library, tiny_bundle, tmp_path, place, bit, length):
    damaged = bytearray(tiny_bundle.read_bytes())
    damaged[place % len(damaged)] ^= 1 << bit
    if length % 3 == 0:
        del damaged[length % len(damaged) :]
    path = tmp_path / "damaged.darcnn"
    path.write_bytes(damaged)
    said = refused(library, path)
    try:
        open_bundle(path)
    except BundleError:
        assert said


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_with_any_byte_changed_never_crashes(library, tiny_bundle, manifest, tmp_path, data):
    text = bytearray(json.dumps(manifest_to_json(open_bundle(tiny_bundle).manifest)).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(
            st.sampled_from(b'"\\{}[],:0-.eE9u\x00\xff')
        )
    path = tmp_path / "changed.darcnn"
    shutil.copy(tiny_bundle, path)
    rewrite(path, lambda entries: with_manifest(entries, bytes(text)))
    refused(library, path)


@pytest.fixture(scope="session")
def frames(root, tmp_path_factory):
    """A raw file of four real frames, 128 x 128, uint8."""
    paths = sorted((root / "tests" / "data" / "target").glob("*.png"))
    path = tmp_path_factory.mktemp("frames") / "frames.raw"
    np.stack([read_grey(path)[:128, :128] for path in paths]).tofile(path)
    return path


def test_example_feeds_frames_from_a_raw_file(library, built, shipped, root, frames):
    _, segmenter = shipped("nuclei-fluorescence")
    bundle = root / "runtime" / "models" / "nuclei-fluorescence.darcnn"
    command = [built / "segment_raw", bundle, frames, "128", "128", "uint8"]
    shown = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300
    ).stdout.splitlines()
    counts = [int(line.split()[2]) for line in shown if line.startswith("frame")]
    stack = np.fromfile(frames, np.uint8).reshape(4, 128, 128)
    assert counts == [len(segmenter(frame, pixels=True)) for frame in stack]
    wrong = subprocess.run(
        [*command[:2], "none", "8", "8", "uint8"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "No such file" in wrong.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are tried on Linux")
@pytest.mark.parametrize("kind", SANITIZED)
def test_threads_on_one_model_are_clean_under(root, tmp_path, frames, kind):
    fast = "-D CMAKE_BUILD_TYPE=RelWithDebInfo -D CMAKE_CXX_FLAGS_RELWITHDEBINFO=-O0 -D DARCNN_EXAMPLE=OFF"
    build(root, tmp_path, f"-D DARCNN_SANITIZE={SANITIZED[kind]} -D DARCNN_STRESS=ON {fast}")
    environment = {
        **os.environ,
        "TBB_ENABLE_SANITIZERS": "1",  # oneTBB would open libraries in a way that sanitizers refuse
        "TSAN_OPTIONS": f"suppressions={root}/tests/runtime/native_tsan.supp",
    }
    bundle = root / "runtime" / "models" / "nuclei-fluorescence.darcnn"
    ran = subprocess.run(
        [tmp_path / "native_stress", bundle, frames, "128", "128"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 wrong" in ran.stdout
    assert ran.stderr == ""


def test_it_is_a_door_not_a_second_product(root):
    paths = [path for path in (root / "runtime" / "native").iterdir() if path.suffix in (".cpp", ".hpp")]
    lines = [line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    assert len([line for line in lines if line and not line.startswith("//")]) < 1500


def test_wheels_hold_nothing_of_it(root):
    listed = (root / "setup.cfg").read_text(encoding="utf-8")
    packages = listed.split("packages =")[1].split("install_requires")[0].split()
    data = listed.split("[options.package_data]")[1].split("[")[0]
    assert "darcnn.runtime" in packages
    assert "native" not in " ".join(packages) + data


def test_bundles_of_any_size_that_python_reads_are_read(root):
    source = (root / "runtime" / "native" / "bundle.cpp").read_text(encoding="utf-8")
    caps = {
        name: int(number or 1) << 20
        for name, number in re.findall(r'{"([\w.]+)", (?:(\d+) \* )?kMiB}', source)
    }
    assert caps == dict(MEMBER_CAPS)
    (whole,) = re.findall(r"kFileCap = (\d+) \* kMiB", source)
    assert int(whole) << 20 == sum(MEMBER_CAPS.values()) + (1 << 20)
