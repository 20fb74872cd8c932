"""A queue with a bound, and what happens to a frame that finds it full."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Literal, TypeVar, get_args

from darcnn.runtime.errors import UsageError

__all__ = ["POLICIES", "BoundedQueue", "Policy", "QueueClosedError"]

Policy = Literal["block", "drop_oldest", "drop_newest"]
POLICIES: tuple[str, ...] = get_args(Policy)

T = TypeVar("T")


class QueueClosedError(Exception):
    """Nothing can be put any more."""


class BoundedQueue(Generic[T]):
    """First in, first out, never more than `bound` items; one thread at a time may put, any may take.

    A producer asks for room first and puts afterwards, so that what is dropped need not be copied:

    >>> queue = BoundedQueue[str](1, "drop_oldest")
    >>> queue.make_room(), queue.put("a")
    ((True, None), None)
    >>> queue.make_room(), queue.put("b"), queue.take()
    ((True, 'a'), None, 'b')
    """

    def __init__(self, bound: int, policy: Policy) -> None:
        """Make an empty queue.

        Raises:
            UsageError: the bound is below 1, or there is no such policy.
        """
        if not isinstance(bound, int) or bound < 1:
            raise UsageError(f"a queue of {bound} frames", where="queue", fix="give 1 or more")
        if policy not in POLICIES:
            raise UsageError(
                f"no policy {policy!r}", where="policy", fix=f"choose one of {', '.join(POLICIES)}"
            )
        self._bound = bound
        self._policy = policy
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_ended = False
        self._is_woken = False
        self._max_length = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def may_block(self) -> bool:
        """Whether `make_room` may wait."""
        return self._policy == "block"

    @property
    def max_length(self) -> int:
        """The most items that ever waited at once."""
        return self._max_length

    @property
    def is_ended(self) -> bool:
        """Whether nothing can be put any more."""
        return self._is_ended

    def make_room(self) -> tuple[bool, T | None]:
        """Return whether one item may be put now, and the item that had to go for it.

        `block` waits until there is room; `drop_oldest` gives up the item that waits longest;
        `drop_newest` says no.

        Raises:
            QueueClosedError: the queue was ended before or meanwhile.
        """
        with self._changed:
            if self._policy == "block":
                self._changed.wait_for(lambda: self._is_ended or len(self._items) < self._bound)
            if self._is_ended:
                raise QueueClosedError
            if len(self._items) < self._bound:
                return True, None
            if self._policy == "drop_newest":
                return False, None
            return True, self._items.popleft()

    def put(self, item: T) -> None:
        """Append an item; `make_room` said that it may be.

        Raises:
            QueueClosedError: the queue was ended meanwhile.
        """
        with self._changed:
            if self._is_ended:
                raise QueueClosedError
            self._items.append(item)
            self._max_length = max(self._max_length, len(self._items))
            self._changed.notify_all()

    def take(self, *, wait: bool = True) -> T | None:
        """Return the oldest item, or None.

        Waits for one unless told not to, and until it is woken, or until none can come any more.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._is_ended or self._is_woken or bool(self._items))
                self._is_woken = False
            if not self._items:
                return None
            self._changed.notify_all()
            return self._items.popleft()

    def take_if(self, is_wanted: Callable[[T], bool]) -> list[T]:
        """Return the items that are wanted, oldest first, wherever they wait."""
        with self._changed:
            wanted = [item for item in self._items if is_wanted(item)]
            if wanted:
                self._items = deque(item for item in self._items if item not in wanted)
                self._changed.notify_all()
            return wanted

    def wake(self) -> None:
        """Let the thread that waits in `take`, or the next that does, look around: it gets None."""
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    def end(self) -> None:
        """Let nothing more in; what waits can still be taken."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def clear(self) -> list[T]:
        """Let nothing more in, and return what waits, oldest first."""
        with self._changed:
            self._is_ended = True
            items = list(self._items)
            self._items.clear()
            self._changed.notify_all()
            return items
