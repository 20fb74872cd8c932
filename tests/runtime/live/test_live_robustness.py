"""What may go wrong around a live segmenter: closing, forking, signals, leaks."""

import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from darcnn.runtime.errors import DeviceError, UsageError
from darcnn.runtime.live import LiveSegmenter, MosaicGrid
from darcnn.runtime.load import load


def n_descriptors():
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no /proc on this system")
    return len(list(folder.iterdir()))


def resident_bytes():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc on this system")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_closing_with_frames_in_flight_ends_within_a_second(make_engine, to_segmenter, frame_of):
    live = LiveSegmenter(to_segmenter(make_engine(delay_s=0.05)), queue=8)
    tickets = [live.push(frame_of(96, 96)) for _ in range(8)]  # 25 tiles each
    start = time.perf_counter()
    live.close()
    assert time.perf_counter() - start < 1
    assert [ticket.outcome(0).status for ticket in tickets] == ["dropped"] * 8
    assert live.stats().pending == 0
    live.close()  # twice is allowed


def test_an_engine_call_that_hangs_is_named(make_engine, to_segmenter, frame_of):
    engine = make_engine()
    live = LiveSegmenter(to_segmenter(engine))
    engine.gate.clear()
    engine.entered.clear()
    ticket = live.push(frame_of())
    assert engine.entered.wait(10)
    with pytest.raises(DeviceError, match=r"the engine call `detect` has not returned 0.1 s after closing"):
        live.close(0.1)
    assert not ticket.is_ready
    engine.gate.set()
    live.close(10)
    assert ticket.outcome(0).status == "dropped"
    assert engine.n_closed == 1


def test_a_callback_that_hangs_is_named(make_engine, to_segmenter, frame_of):
    release = threading.Event()
    live = LiveSegmenter(to_segmenter(make_engine()), on_result=lambda result: release.wait(10))
    live.push(frame_of(), key="a").result(10)
    with pytest.raises(DeviceError, match="on_result for frame a has not returned"):
        live.close(0.05)
    release.set()
    live.close(10)


def test_ending_computes_what_waits(make_engine, to_segmenter, frame_of):
    with LiveSegmenter(to_segmenter(make_engine(delay_s=0.01)), queue=8) as live:
        tickets = [live.push(frame_of()) for _ in range(5)]
        live.end()
        with pytest.raises(UsageError, match="takes no more frames"):
            live.push(frame_of())
        assert [result.status for result in live] == ["done"] * 5
    assert all(ticket.is_ready for ticket in tickets)


def test_an_engine_that_does_not_start_is_said_when_opening(make_engine, to_segmenter):
    class Broken(make_engine):
        def detect(self, tiles):
            raise DeviceError("no memory", where="GPU", fix="free some")

    with pytest.raises(DeviceError, match="GPU: no memory; free some"):
        LiveSegmenter(to_segmenter(Broken()))


def test_a_segmenter_that_is_forgotten_takes_its_thread_along(make_engine, to_segmenter, frame_of):
    before = threading.active_count()
    live = LiveSegmenter(to_segmenter(make_engine()))
    live.push(frame_of()).result(10)
    assert threading.active_count() == before + 1
    del live
    gc.collect()
    assert threading.active_count() == before


def test_a_thousand_segmenters_leave_nothing_behind(make_engine, to_segmenter, frame_of):
    def cycle(times):
        for _ in range(times):
            with LiveSegmenter(to_segmenter(make_engine(tile_px=24))) as live:
                live.push(frame_of(8, 8)).result(10)

    cycle(50)
    threads, files, memory = threading.active_count(), n_descriptors(), resident_bytes()
    cycle(1000)
    assert threading.active_count() == threads
    assert n_descriptors() == files
    assert resident_bytes() < 1.02 * memory


def test_sessions_of_a_real_backend_leave_nothing_behind_either(tiny_bundle):
    frame = np.full((8, 8, 3), 240, np.uint8)

    def cycle(times):
        for _ in range(times):
            with LiveSegmenter(tiny_bundle, device="cpu") as live:
                live.push(frame).result(10)

    cycle(30)
    threads, files, memory = threading.active_count(), n_descriptors(), resident_bytes()
    cycle(100)
    assert threading.active_count() == threads
    assert n_descriptors() == files
    assert resident_bytes() < 1.03 * memory


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_after_opening_gives_a_clear_error(make_engine, to_segmenter, frame_of):
    engine = make_engine()
    with LiveSegmenter(to_segmenter(engine)) as live:
        engine.gate.clear()
        ticket = live.push(frame_of())
        mosaic = live.mosaic(MosaicGrid.from_stage([(0.0, 0.0)], field_px=(24, 24), pixel_size_um=1.0))
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            said = []
            acts = (
                lambda: live.push(frame_of()),
                lambda: mosaic.push(frame_of(), at_um=(0.0, 0.0)),
                lambda: ticket.result(1),
                live.stats,
                live.drain,
            )
            for act in acts:
                try:
                    act()
                    said.append("nothing")
                except UsageError as err:
                    said.append(str(err))
            live.close()  # must neither hang nor fail
            os.write(write_end, "\n".join(said).encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(child, 0)
        engine.gate.set()
        assert ticket.result(10).status == "done"
    assert status == 0
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("LiveSegmenter: was opened in another process")


WAITS = """
import signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born without it
from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.live import LiveSegmenter
from darcnn.runtime.segmenter import Segmenter
import numpy as np
class Slow(OracleEngine):
    def detect(self, tiles):
        time.sleep(0.2)
        return super().detect(tiles)
engine = Slow(tile_px=32)
frame = np.zeros((96, 96, 3), np.uint8)  # 25 tiles, 5 s
try:
    with LiveSegmenter(Segmenter(engine, make_oracle_manifest(engine, halo_px=8)), queue=1) as live:
        live.push(frame)
        print("ready", flush=True)
        {wait}
except KeyboardInterrupt:
    print("interrupted", threading.active_count(), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on Unix")
@pytest.mark.parametrize(
    "wait",
    ["live.push(frame, key=2).result()", "live.push(frame); live.push(frame)", "list(live)", "live.drain()"],
)
def test_ctrl_c_interrupts_every_wait_and_closes(wait):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(wait=wait)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        start = time.perf_counter()
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert out == b"interrupted 1\n", err
    assert time.perf_counter() - start < 3
    assert err == b""


def test_a_program_that_forgets_to_close_ends_in_silence():
    code = WAITS.replace("with LiveSegmenter", "if live := LiveSegmenter").replace(
        "queue=1) as live", "queue=1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code.format(wait="pass")], capture_output=True, timeout=20, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"ready\n", b"")


def test_a_bundle_that_is_replaced_while_open_changes_nothing(tiny_bundle):
    frame = np.full((8, 8, 3), 240, np.uint8)
    expected = load(tiny_bundle, device="cpu")(frame)
    with LiveSegmenter(tiny_bundle, device="cpu") as live:
        live.push(frame).result(10)
        tiny_bundle.write_bytes(b"something else")
        after = live.push(frame).result(10)
        shutil.rmtree(tiny_bundle.parent)
        gone = live.push(frame).result(10)
    for result in (after, gone):
        np.testing.assert_array_equal(result.instances.boxes, expected.boxes)
        np.testing.assert_array_equal(result.instances.scores, expected.scores)


def test_a_short_soak_leaves_memory_threads_and_files_as_they_were(make_engine, to_segmenter, frame_of):
    with LiveSegmenter(to_segmenter(make_engine(tile_px=24)), queue=4, policy="drop_oldest") as live:
        frame = frame_of(8, 8)

        def run(frames):
            for n in range(frames):
                live.push(frame, deadline_ms=0 if n % 7 == 0 else None)
                if n % 3 == 0:
                    live.drain()
            live.drain()

        run(300)
        threads, files, memory = threading.active_count(), n_descriptors(), resident_bytes()
        run(2000)
        stats = live.stats()
        assert stats.pushed == 2300 == stats.delivered + stats.dropped
        assert threading.active_count() == threads
        assert n_descriptors() == files
        assert resident_bytes() < 1.02 * memory


def test_closing_ends_a_calibration_too(make_engine, to_segmenter, frame_of, monkeypatch):
    looks = []

    def learn(segmenter, reader, *rest):
        for _ in range(50):
            looks.append(1)
            segmenter.detect(np.zeros((1, 32, 32, 3), np.uint8))

    monkeypatch.setattr("darcnn.runtime.live.calibration._learn", learn)
    engine = make_engine(delay_s=0.1)
    with LiveSegmenter(to_segmenter(engine)) as live:
        ticket = live.push(frame_of())
        while not looks:
            time.sleep(0.01)
    assert ticket.outcome(0).status == "dropped"
    assert len(looks) < 10


def test_what_went_wrong_in_the_block_is_what_is_raised(make_engine, to_segmenter, frame_of):
    engine = make_engine()
    live = LiveSegmenter(to_segmenter(engine))

    def acquire():
        with live:
            engine.gate.clear()
            engine.entered.clear()
            live.push(frame_of())
            assert engine.entered.wait(10)
            raise RuntimeError("the stage crashed")

    with pytest.raises(RuntimeError, match="the stage crashed"):
        acquire()
    engine.gate.set()
    live.close(10)


def test_failed_frames_are_not_kept_in_memory(open_live, caplog):
    caplog.set_level(logging.INFO)  # what is logged of an error holds its frame, and pytest holds that
    live = open_live(queue=2)
    frames = []
    for _ in range(20):
        frame = np.zeros((8, 8, 7), np.uint8)  # the model has no seven channels
        frames.append(weakref.ref(frame))
        live.push(frame, copy=False)
        del frame
    live.drain(10)
    assert live.stats().failed == 20
    gc.collect()
    assert sum(frame() is not None for frame in frames) <= 2


def test_a_callback_is_told_of_a_frame_that_was_given_up_though_nothing_else_comes(
    make_engine, to_segmenter, frame_of
):
    told, engine = [], make_engine()
    with LiveSegmenter(to_segmenter(engine), on_result=lambda result: told.append(result.status)) as live:
        engine.gate.clear()
        engine.entered.clear()
        live.push(frame_of())
        assert engine.entered.wait(10)
        live.push(frame_of(), deadline_ms=1)
        time.sleep(0.05)
        engine.gate.set()
        live.drain(10)
        assert sorted(told) == ["done", "late"]


def test_a_callback_that_exits_does_not_end_the_segmenter(make_engine, to_segmenter, frame_of):
    def leave(result):
        raise SystemExit(3)

    engine = make_engine()
    live = LiveSegmenter(to_segmenter(engine), on_result=leave)
    for _ in range(3):
        live.push(frame_of())
    live.drain(10)
    assert live.stats().callback_errors == 3
    live.close(10)
    assert engine.n_closed == 1
    assert [result.status for result in live] == ["done"] * 3
