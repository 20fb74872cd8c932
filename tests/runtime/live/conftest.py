"""Segmenters on engines that need no model and do as they are told, and frames whose objects are known."""

import threading
import time

import numpy as np
import pytest

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.live import LiveSegmenter
from darcnn.runtime.segmenter import Segmenter

TILE, HALO = 32, 8


class ObedientEngine(OracleEngine):
    """The oracle, but it may be slow, wait for a gate, or fail on tiles that hold a forbidden label."""

    def __init__(self, *, tile_px=TILE, batch=1, delay_s=0.0, forbidden=None):
        super().__init__(tile_px=tile_px, batch=batch)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.delay_s = delay_s
        self.forbidden = forbidden
        self.n_calls = 0
        self.n_closed = 0

    def detect(self, tiles):
        self.n_calls += 1
        self.entered.set()
        if not self.gate.wait(30):
            raise TimeoutError("the test never opened the gate")
        time.sleep(self.delay_s)
        if self.forbidden is not None and (tiles[..., 0] == self.forbidden).any():
            raise RuntimeError(f"saw label {self.forbidden}")
        return super().detect(tiles)

    def close(self):
        self.n_closed += 1


def make_segmenter(engine, *, mpp=None):
    return Segmenter(engine, make_oracle_manifest(engine, halo_px=HALO, mpp=mpp))


def draw(height=24, width=24, *, label=1):
    """Return a frame with one object of 4 x 5 px at (6, 7) for each 24 px, labelled from `label` on."""
    labels = np.zeros((height, width), np.int64)
    for y in range(7, height - 4, 24):
        for x in range(6, width - 5, 24):
            labels[y : y + 4, x : x + 5] = label
            label += 1
    return encode_labels(labels)


@pytest.fixture
def engine():
    return ObedientEngine()


@pytest.fixture
def open_live():
    """Return what opens live segmenters that are closed after the test, whatever it did."""
    opened = []

    def open_(engine=None, **options):
        live = LiveSegmenter(make_segmenter(engine or ObedientEngine()), **options)
        opened.append((live, engine))
        return live

    yield open_
    for live, engine in opened:
        if engine is not None:
            engine.gate.set()
        live.close(30)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    def ours():  # other libraries keep threads of their own
        return {thread for thread in threading.enumerate() if thread.name.startswith("darcnn")}

    before = ours()
    yield
    deadline = time.monotonic() + 10
    while (left := ours() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


@pytest.fixture(scope="session")
def make_engine():
    return ObedientEngine


@pytest.fixture(scope="session")
def to_segmenter():
    return make_segmenter


@pytest.fixture(scope="session")
def frame_of():
    return draw
