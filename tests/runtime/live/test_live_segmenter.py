import asyncio
import logging
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.live import FrameDroppedError, LiveSegmenter

N = 12


def boxes_of(instances):
    return sorted(map(tuple, instances.boxes.tolist()))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=5),
    batch=st.integers(1, 4),
)
def test_frames_of_any_size_and_batch_give_what_the_segmenter_gives(
    make_engine, to_segmenter, frame_of, sizes, batch
):
    frames = [frame_of(height, width) for height, width in sizes]
    with LiveSegmenter(to_segmenter(make_engine(batch=batch)), queue=2) as live:
        tickets = [live.push(frame) for frame in frames]
        results = [ticket.result(30) for ticket in tickets]
    whole = to_segmenter(make_engine())
    for frame, result in zip(frames, results, strict=True):
        expected = whole(frame)
        assert result.status == "done"
        assert result.tiles_done == result.n_tiles > 0
        np.testing.assert_array_equal(result.instances.labels(), expected.labels())


def test_a_result_comes_by_ticket_iteration_callback_and_await(open_live, frame_of):
    told = []
    live = open_live(on_result=told.append)
    tickets = [live.push(frame_of(), key=f"t{n}") for n in range(3)]

    async def gather():
        return await asyncio.gather(*tickets)

    awaited = asyncio.run(gather())
    live.end()
    iterated = list(live)
    live.drain(10)
    live.close()
    assert [ticket.result() for ticket in tickets] == awaited == iterated == told
    assert [result.key for result in told] == ["t0", "t1", "t2"]
    assert [len(result.instances) for result in told] == [1, 1, 1]


def test_waiting_for_a_ticket_can_be_cancelled_without_losing_the_frame(open_live, engine, frame_of):
    live = open_live(engine)
    engine.gate.clear()
    ticket = live.push(frame_of())

    async def wait_a_little():
        return await asyncio.wait_for(_result(ticket), 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(wait_a_little())
    with pytest.raises(TimeoutError):
        ticket.result(0.01)
    engine.gate.set()
    assert ticket.result(10).status == "done"


async def _result(ticket):
    return await ticket


@pytest.mark.parametrize("policy", ["block", "drop_oldest", "drop_newest"])
def test_a_producer_twice_as_fast_is_accounted_for_exactly(open_live, make_engine, frame_of, policy):
    engine = make_engine(delay_s=0.01)
    told = []
    live = open_live(engine, queue=4, policy=policy, on_result=told.append)
    frame, tickets = frame_of(), []
    for _ in range(60):
        tickets.append(live.push(frame))
        time.sleep(0.005)
    live.drain(30)
    live.end()
    results = list(live)
    live.close()
    stats = live.stats()
    by_number = {result.number: result for result in results}
    assert sorted(by_number) == [ticket.number for ticket in tickets] == list(range(60))
    assert len(results) == len(told) == 60
    delivered = [result.number for result in results if result.status == "done"]
    dropped = [result.number for result in results if result.status == "dropped"]
    assert delivered == sorted(delivered)
    assert (stats.pushed, stats.delivered, stats.dropped, stats.failed) == (
        60,
        len(delivered),
        len(dropped),
        0,
    )
    assert stats.pushed == stats.delivered + stats.dropped + stats.failed
    assert stats.pending == stats.unread == 0
    assert stats.max_waiting <= 4
    assert bool(dropped) == (policy != "block")
    for ticket in tickets:
        assert ticket.outcome(0) is by_number[ticket.number]
    if policy == "drop_oldest":
        assert delivered[-1] == 59  # the newest is always worth most
    if policy == "drop_newest":
        assert delivered[:4] == [0, 1, 2, 3]


def test_a_dropped_frame_says_why(open_live, engine, frame_of):
    live = open_live(engine, queue=1, policy="drop_newest")
    engine.gate.clear()
    engine.entered.clear()
    live.push(frame_of())
    engine.entered.wait(10)
    live.push(frame_of())
    late = live.push(frame_of(), key="third")
    with pytest.raises(FrameDroppedError, match="frame third: the queue was full; push more slowly"):
        late.result(0)


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_a_producer_is_not_kept_by_the_engine_in_the_drop_policies(open_live, engine, policy):
    live = open_live(engine, queue=2, policy=policy)
    engine.gate.clear()
    frame = np.zeros((512, 512), np.uint16)

    def push_p90():  # a machine that does other things too delays a few
        times = []
        for _ in range(400):
            start = time.perf_counter()
            live.push(frame)
            times.append(time.perf_counter() - start)
        return np.percentile(times, 90)

    assert min(push_p90() for _ in range(3)) < 1e-3  # the machine may have other things to do, once or twice
    assert live.stats().dropped >= 1200 - 4


def test_the_callers_buffer_is_free_when_push_returns(open_live, engine, frame_of):
    live = open_live(engine)
    engine.gate.clear()
    buffer = frame_of()
    tickets = [live.push(buffer) for _ in range(3)]
    buffer[:] = 0
    engine.gate.set()
    assert [len(ticket.result(10).instances) for ticket in tickets] == [1, 1, 1]


def test_without_a_copy_the_frame_is_read_in_place(open_live, engine, frame_of):
    live = open_live(engine)
    engine.gate.clear()
    engine.entered.clear()
    buffer = np.zeros_like(frame_of())
    live.push(np.zeros_like(buffer))
    engine.entered.wait(10)
    ticket = live.push(buffer, copy=False)
    buffer[:] = frame_of()
    engine.gate.set()
    assert len(ticket.result(10).instances) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame[::-1, ::-1],
        np.asfortranarray,
        lambda frame: np.repeat(np.repeat(frame, 2, 0), 2, 1)[::2, ::2],
    ],
)
def test_strides_of_any_kind_are_read_right(open_live, to_segmenter, engine, frame_of, change):
    frame = change(frame_of(40, 50))
    frame.flags.writeable = False
    result = open_live().push(frame).result(10)
    np.testing.assert_array_equal(result.instances.labels(), to_segmenter(engine)(frame).labels())


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros((0, 9), np.uint8), "has no pixels"),
        (np.zeros((9, 9), np.complex64), "holds complex64"),
        ([[0, 1], [1, 0]], "no array"),
        (np.zeros((9, 9, 2), np.uint8), r"has 2 channels \(they come last\)"),
        (np.ma.masked_array(np.zeros((9, 9)), mask=True), "is a masked array"),
    ],
)
def test_a_bad_frame_fails_by_its_ticket_and_the_next_one_goes_on(open_live, frame_of, frame, words):
    live = open_live()
    bad, good = live.push(frame, key="bad"), live.push(frame_of())
    with pytest.raises(InputError, match=f"frame bad: .*{words}") as caught:
        bad.result(10)
    assert "\n" not in str(caught.value)
    assert len(good.result(10).instances) == 1
    assert (live.stats().failed, live.stats().done) == (1, 1)


def test_whatever_goes_wrong_with_an_array_of_another_library_is_that_frames(open_live, frame_of):
    class Broken:
        def __dlpack_device__(self):
            raise MemoryError("no more")

        def __dlpack__(self, **options):
            raise NotImplementedError

    live = open_live()
    assert live.push(Broken()).outcome(10).status == "failed"
    assert live.push(frame_of()).result(10).status == "done"


def test_a_push_that_is_interrupted_still_has_a_result(open_live):
    class Interrupts:
        def __dlpack_device__(self):
            raise KeyboardInterrupt

        __dlpack__ = None

    live = open_live()
    with pytest.raises(KeyboardInterrupt):
        live.push(Interrupts())
    live.drain(10)
    assert (live.stats().pushed, live.stats().dropped) == (1, 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_an_engine_error_is_that_frames_alone(open_live, make_engine, frame_of, batch):
    engine = make_engine(batch=batch, forbidden=7)
    live = open_live(engine, queue=20)
    engine.gate.clear()
    tickets = [live.push(frame_of(label=label)) for label in (1, 2, 7, 3, 7, 4)]
    engine.gate.set()
    outcomes = [ticket.outcome(10) for ticket in tickets]
    assert [outcome.status for outcome in outcomes] == ["done", "done", "failed", "done", "failed", "done"]
    with pytest.raises(RuntimeError, match="saw label 7"):
        tickets[2].result()
    live.end()
    assert [result.number for result in live] == list(range(6))


def test_tiles_of_frames_that_wait_share_an_engine_call(open_live, make_engine, frame_of):
    engine = make_engine(batch=4)
    live = open_live(engine, queue=20)
    engine.gate.clear()
    engine.entered.clear()
    first = live.push(frame_of())
    engine.entered.wait(10)
    tickets = [live.push(frame_of(16, 16)) for _ in range(8)]  # a tile each
    n_before = engine.n_calls
    engine.gate.set()
    assert first.result(10).status == "done"
    assert [ticket.result(10).status for ticket in tickets] == ["done"] * 8
    assert engine.n_calls - n_before == 2


def test_a_deadline_of_zero_returns_at_once_without_objects(open_live, engine, frame_of):
    live = open_live(engine)
    n_calls = engine.n_calls
    result = live.push(frame_of(), deadline_ms=0).result(10)
    assert (result.status, len(result.instances), result.tiles_done) == ("late", 0, 0)
    assert result.instances.shape == (24, 24)
    assert engine.n_calls == n_calls
    assert live.push(frame_of()).result(10).status == "done"


def test_what_is_late_comes_with_what_is_finished(open_live, make_engine, frame_of):
    live = open_live(make_engine(delay_s=0.05))
    frame = frame_of(96, 96)  # 25 tiles, 1.25 s
    result = live.push(frame, deadline_ms=400).result(10)
    assert result.status == "late"
    assert 0 < result.tiles_done < result.n_tiles == 25
    whole = live.push(frame).result(10)
    assert whole.status == "done"
    assert set(boxes_of(result.instances)) < set(boxes_of(whole.instances))
    assert result.times_ms.total < 600


def test_a_generous_deadline_changes_nothing(open_live, frame_of):
    assert open_live().push(frame_of(), deadline_ms=60_000).result(10).status == "done"


@pytest.mark.parametrize("option", [{"deadline_ms": -1.0}, {"pixel_size_um": 0.0}, {"deadline_ms": np.nan}])
def test_numbers_that_do_not_serve_are_refused(open_live, frame_of, option):
    live = open_live()
    with pytest.raises(UsageError, match=f"{next(iter(option))}: .* does not serve; give"):
        live.push(frame_of(), **option)
    assert live.stats().pushed == 0


def test_a_callback_that_raises_is_logged_and_the_next_frame_goes_on(open_live, frame_of, caplog):
    def fail(result):
        raise ValueError("mine")

    live = open_live(on_result=fail)
    with caplog.at_level(logging.ERROR):
        tickets = [live.push(frame_of(), key=key) for key in "ab"]
        assert [ticket.result(10).status for ticket in tickets] == ["done", "done"]
        live.close()
    assert live.stats().callback_errors == 2
    assert "on_result raised on frame 'b'" in caplog.text


def test_a_callback_is_told_of_a_bad_frame_though_no_other_follows(open_live):
    told = threading.Event()
    live = open_live(on_result=lambda result: told.set())
    assert live.push("no frame").outcome(10).status == "failed"
    assert told.wait(10)


def test_a_callback_may_close(open_live, engine, frame_of):
    closed = threading.Event()

    def close(result):
        live.close()
        closed.set()

    live = open_live(engine, on_result=close, queue=10)
    engine.gate.clear()
    tickets = [live.push(frame_of()) for _ in range(5)]
    engine.gate.set()
    assert closed.wait(10)
    assert [ticket.outcome(10).status for ticket in tickets] == ["done", *["dropped"] * 4]
    with pytest.raises(UsageError, match="takes no more frames"):
        live.push(frame_of())


def test_nobody_who_listens_too_slowly_grows_the_memory(open_live, engine, frame_of):
    live = open_live(engine, queue=1, policy="drop_newest")
    engine.gate.clear()
    for _ in range(1100):
        live.push(frame_of())
    engine.gate.set()
    live.drain(10)
    live.end()
    n_read = len(list(live))
    assert n_read == 1024
    assert live.stats().unread == 1100 - 1024


def test_results_with_objects_are_kept_less_long_and_counted_when_they_go(open_live, frame_of):
    live = open_live(queue=4)
    tickets = [live.push(frame_of(8, 8)) for _ in range(80)]
    live.end()
    live.drain(20)
    assert [result.number for result in live] == list(range(16, 80))
    assert live.stats().unread == 16
    assert tickets[0].result(0).status == "done"


def test_times_add_up_by_stage(open_live, make_engine, frame_of):
    live = open_live(make_engine(delay_s=0.02))
    result = live.push(frame_of()).result(10)
    times = result.times_ms
    assert 20 <= times.detect <= times.total
    parts = times.wait + times.prepare + times.detect + times.masks + times.place
    assert parts <= times.total * 1.001
    stages = live.stats().stages
    assert stages["detect"].n == 1
    assert stages["detect"].p50_ms == stages["detect"].p99_ms == times.detect


def test_the_pixel_size_of_each_frame_decides_its_scale(open_live, make_engine, to_segmenter, frame_of):
    segmenter = to_segmenter(make_engine(), mpp=0.5)
    with LiveSegmenter(segmenter) as live:
        frame = frame_of(40, 40)
        same, unknown = live.push(frame, pixel_size_um=0.5), live.push(frame)
        coarse = live.push(frame, pixel_size_um=4.0)
        assert same.result(10).n_tiles == unknown.result(10).n_tiles == 4
        assert coarse.result(10).n_tiles > 100
        assert coarse.result().pixel_size_um == 4.0


def test_a_deadline_holds_for_frames_that_wait(open_live, engine, frame_of):
    live = open_live(engine, queue=8)
    engine.gate.clear()
    engine.entered.clear()
    first = live.push(frame_of(96, 96))  # 25 tiles
    assert engine.entered.wait(10)
    waiting = live.push(frame_of(), deadline_ms=1)
    patient = live.push(frame_of(), deadline_ms=60_000)
    at_once = live.push(frame_of(), deadline_ms=0)
    assert at_once.outcome(0).status == "late"
    assert len(at_once.result(0).instances) == 0
    engine.delay_s = 0.05
    engine.gate.set()
    assert waiting.outcome(10).status == "late"
    assert not first.is_ready  # it was not waited for
    assert (first.outcome(10).status, patient.outcome(10).status) == ("done", "done")
    assert live.stats().pending == 0


def test_waiting_in_the_callback_is_refused_and_hangs_nobody(open_live, engine, frame_of):
    refused = []

    def wait(result):
        if refused:
            return
        for action in (
            lambda: live.drain(5),
            lambda: live.push(frame_of()),
            lambda: tickets[-1].result(5),
            lambda: list(live),
        ):
            try:
                action()
            except UsageError as err:
                refused.append(str(err))

    live = open_live(engine, on_result=wait, queue=2)
    engine.gate.clear()
    tickets = [live.push(frame_of()) for _ in range(2)]
    engine.gate.set()
    live.drain(10)
    assert len(refused) == 4
    assert all("on_result: would wait for itself" in words for words in refused)
    assert live.stats().callback_errors == 0
    assert live.push(frame_of()).result(10).status == "done"  # the thread goes on


def test_a_deadline_of_nothing_takes_no_room(open_live, engine, frame_of):
    live = open_live(engine, queue=1, policy="drop_oldest")
    engine.gate.clear()
    engine.entered.clear()
    live.push(frame_of())
    assert engine.entered.wait(10)
    waiting = live.push(frame_of())
    assert live.push(frame_of(), deadline_ms=0).outcome(0).status == "late"
    assert live.push(np.zeros((4, 4), np.complex64), deadline_ms=0).outcome(0).status == "failed"
    engine.gate.set()
    assert waiting.outcome(10).status == "done"
    live.close(10)
    with pytest.raises(UsageError, match="takes no more frames"):
        live.push(frame_of(), deadline_ms=0)


def test_every_result_is_told_whoever_settles_it_and_whenever_it_is_closed(
    make_engine, to_segmenter, frame_of
):
    for number in range(30):
        told = []
        live = LiveSegmenter(
            to_segmenter(make_engine()), queue=40, on_result=lambda one, told=told: told.append(one.number)
        )
        stop = threading.Event()

        def push(live=live, stop=stop):
            while not stop.is_set():
                try:
                    live.push(frame_of())
                except UsageError:
                    return

        thread = threading.Thread(target=push)
        thread.start()
        time.sleep(0.002 * (number % 5))
        live.close(10)
        stop.set()
        thread.join()
        live.drain(5)
        assert sorted(told) == list(range(live.stats().pushed))


def test_a_policy_that_drops_lets_the_callback_push(open_live, frame_of):
    pushed = []

    def push_once(result):
        if not pushed:
            pushed.append(live.push(frame_of(), key="again"))

    live = open_live(on_result=push_once, policy="drop_oldest")
    live.push(frame_of()).result(10)
    live.drain(10)
    assert pushed[0].result(10).status == "done"


def test_what_is_drained_has_been_told(open_live, frame_of):
    told = []

    def tell(result):
        time.sleep(0.05)
        told.append(result.number)

    live = open_live(on_result=tell)
    for number in range(3):
        live.push(frame_of())
        live.drain(10)
        assert told == list(range(number + 1))


def test_an_error_is_raised_as_often_as_it_is_asked_for_and_does_not_grow(open_live):
    ticket = open_live().push(np.zeros((4, 4, 7), np.uint8))
    depths = []
    for _ in range(5):
        with pytest.raises(InputError) as caught:
            ticket.result(10)
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1


@pytest.mark.parametrize("options", [{"deadline_ms": "5"}, {"pixel_size_um": "a"}, {"deadline_ms": -1}])
def test_numbers_that_are_none_are_refused(open_live, frame_of, options):
    with pytest.raises(UsageError, match="does not serve"):
        open_live().push(frame_of(), **options)
