import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.errors import UsageError
from darcnn.runtime.live.queue import POLICIES, BoundedQueue, QueueClosedError


@given(
    bound=st.integers(1, 4),
    policy=st.sampled_from(["drop_oldest", "drop_newest"]),
    steps=st.lists(st.booleans(), max_size=60),
)
def test_a_full_queue_gives_up_what_its_policy_says_and_loses_nothing_else(bound, policy, steps):
    queue, model, taken, dropped = BoundedQueue(bound, policy), deque(), [], []
    n_put = 0
    for is_put in steps:
        if is_put:
            has_room, victim = queue.make_room()
            if len(model) == bound:
                assert has_room == (policy == "drop_oldest")
                assert victim == (model.popleft() if policy == "drop_oldest" else None)
                dropped.append(victim if has_room else n_put)
            else:
                assert (has_room, victim) == (True, None)
            if has_room:
                queue.put(n_put)
                model.append(n_put)
            n_put += 1
        else:
            item = queue.take(wait=False)
            assert item == (model.popleft() if model else None)
            if item is not None:
                taken.append(item)
        assert len(queue) == len(model) <= bound
    assert taken == sorted(taken)
    assert sorted(taken + dropped + queue.clear()) == list(range(n_put))


def test_block_lets_a_producer_wait_and_keeps_all_in_order():
    queue, taken = BoundedQueue(3, "block"), []

    def produce():
        for number in range(500):
            assert queue.make_room() == (True, None)
            queue.put(number)
        queue.end()

    producer = threading.Thread(target=produce)
    producer.start()
    while (item := queue.take()) is not None:
        taken.append(item)
    producer.join()
    assert taken == list(range(500))
    assert queue.max_length <= 3


@pytest.mark.parametrize("close", ["end", "clear"])
def test_closing_wakes_a_producer_that_waits(close):
    queue, raised = BoundedQueue(1, "block"), threading.Event()
    queue.make_room()
    queue.put(0)

    def produce():
        try:
            queue.make_room()
        except QueueClosedError:
            raised.set()

    producer = threading.Thread(target=produce)
    producer.start()
    getattr(queue, close)()
    producer.join(10)
    assert raised.is_set()
    assert queue.take() == (0 if close == "end" else None)
    assert queue.take() is None


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_enters_a_queue_that_was_ended(policy):
    queue = BoundedQueue(1, policy)
    queue.end()
    with pytest.raises(QueueClosedError):
        queue.make_room()
    with pytest.raises(QueueClosedError):
        queue.put(1)


def test_a_queue_without_room_or_policy_is_refused():
    with pytest.raises(UsageError, match="queue: a queue of 0 frames; give 1 or more"):
        BoundedQueue(0, "block")
    with pytest.raises(UsageError, match="no policy 'drop_all'; choose one of block, drop_oldest"):
        BoundedQueue(1, "drop_all")
