"""One item ahead: the order stays, what goes wrong is raised in its turn, and no thread is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from darcnn.runtime.ahead import map_ahead


def test_a_thread_is_one_item_ahead_and_keeps_the_order() -> None:
    began: list[int] = []
    second_began = threading.Event()

    def double(item: int) -> int:
        began.append(item)
        if item == 1:
            second_began.set()
        return 2 * item

    pairs = map_ahead(double, range(5), name="test-ahead")
    assert next(pairs) == (0, 0)
    assert second_began.wait(10)  # while the caller holds the first
    assert 3 not in began
    assert list(pairs) == [(item, 2 * item) for item in range(1, 5)]
    assert began == list(range(5))


def test_what_goes_wrong_ahead_is_raised_in_its_turn_and_leaves_no_thread() -> None:
    def fail_at_two(item: int) -> int:
        return 1 // (2 - item)

    pairs: Iterator[tuple[int, int]] = map_ahead(fail_at_two, range(9), name="test-ahead")
    assert [next(pairs)[0], next(pairs)[0]] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(pairs)
    given_up = map_ahead(fail_at_two, range(9), name="test-ahead")
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-ahead")]
