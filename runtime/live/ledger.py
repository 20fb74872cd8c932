"""The book of a live segmenter: what was pushed, what became of it, and who has been told."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable

from darcnn.runtime.errors import UsageError
from darcnn.runtime.live.stats import LiveStats, Stopwatch
from darcnn.runtime.live.ticket import LiveResult, Ticket

__all__ = ["Ledger"]

_log = logging.getLogger(__name__)

# What is kept for an iteration or a callback that does not keep up; objects of a large frame are megabytes.
_UNREAD_RESULTS = 1024
_UNREAD_WITH_OBJECTS = 64


class Ledger:
    """Counts exactly, and hands each result to its ticket at once, then to iteration and callback.

    The callback runs in the thread that calls `tell`, nowhere else: a producer whose push drops a frame
    is not kept by it.
    """

    def __init__(self, on_result: Callable[[LiveResult], None] | None) -> None:
        self._on_result = on_result
        self._changed = threading.Condition()
        self._n_pushed = 0
        self._counts: Counter[str] = Counter()
        self._unread = _Backlog()
        self._untold = _Backlog()
        self._is_iterated = on_result is None  # else nobody may ever ask for what the iteration lost
        self._n_told = 0
        self._here = threading.local()  # has `is_telling` in a thread that calls the callback now
        self._n_callback_errors = 0
        self._is_ended = False
        self.stopwatch = Stopwatch()

    def issue(self, key: Hashable) -> Ticket:
        """Count a frame in; a frame without a key is known by its number."""
        with self._changed:
            number = self._n_pushed
            self._n_pushed += 1
        return Ticket(number if key is None else key, number, self.check_wait)

    def settle(self, ticket: Ticket, result: LiveResult) -> None:
        """Count a frame out; its ticket, and who iterates, have the result when this returns."""
        with self._changed:
            self._counts[result.status] += 1
            self._unread.append(result)
            if self._on_result is not None:
                self._untold.append(result)
            ticket.resolve(result)
            self._changed.notify_all()

    def tell(self) -> None:
        """Call the callback with each result that it has not seen, in order."""
        if self._on_result is None:
            return
        while True:
            with self._changed:
                result = self._untold.take()
            if result is None:
                return
            self._here.is_telling = True
            try:
                self._on_result(result)
            except (Exception, SystemExit):  # the caller's code: the acquisition goes on without it
                with self._changed:
                    self._n_callback_errors += 1
                _log.exception("on_result raised on frame %r; the next frame goes on", result.key)
            finally:
                self._here.is_telling = False
                with self._changed:
                    self._n_told += 1
                    self._changed.notify_all()

    def check_wait(self) -> None:
        """Refuse to wait in the callback: it keeps the thread that would have to go on.

        Raises:
            UsageError: this is the thread that calls the callback, and it does so now.
        """
        if getattr(self._here, "is_telling", False):
            raise UsageError(
                "would wait for itself",
                where="on_result",
                fix="wait in another thread; what must push from on_result needs a policy that drops",
            )

    def read(self) -> LiveResult | None:
        """Return the next result in order, waiting for it; None once no more can come."""
        if not len(self._unread):
            self.check_wait()
        with self._changed:
            self._is_iterated = True
            self._changed.wait_for(lambda: len(self._unread) > 0 or self._is_ended)
            return self._unread.take()

    def wait_settled(self, timeout: float | None) -> bool:
        """Tell whether every frame has a result, and the callback has it, within `timeout` seconds."""

        def is_settled() -> bool:
            n_settled = self._counts.total()
            is_told = self._on_result is None or self._n_told + self._untold.n_lost == n_settled
            return self._n_pushed == n_settled and is_told

        with self._changed:
            return self._changed.wait_for(is_settled, timeout)

    @property
    def is_ended(self) -> bool:
        """Whether the thread that calls the callback is gone: whoever settles a frame now must `tell`."""
        return self._is_ended

    def end(self) -> None:
        """Say that no more results can come, but of a push that is under way."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def summary(self, *, waiting: int, max_waiting: int) -> LiveStats:
        """Return the counts, with those of the queue, and the times."""
        with self._changed:
            counts = {name: self._counts[name] for name in ("done", "late", "dropped", "failed")}
            return LiveStats(
                pushed=self._n_pushed,
                **counts,
                waiting=waiting,
                max_waiting=max_waiting,
                callback_errors=self._n_callback_errors,
                unread=self._unread.n_lost * self._is_iterated + self._untold.n_lost,
                stages=self.stopwatch.summary(),
            )


class _Backlog:
    """Results that somebody has yet to take, oldest first; of too many the oldest go, and are counted."""

    def __init__(self) -> None:
        self._results: deque[LiveResult] = deque()
        self._n_with_objects = 0
        self.n_lost = 0

    def __len__(self) -> int:
        return len(self._results)

    def append(self, result: LiveResult) -> None:
        self._results.append(result)
        self._n_with_objects += result.instances is not None
        while len(self._results) > _UNREAD_RESULTS or self._n_with_objects > _UNREAD_WITH_OBJECTS:
            self.take()
            self.n_lost += 1

    def take(self) -> LiveResult | None:
        if not self._results:
            return None
        result = self._results.popleft()
        self._n_with_objects -= result.instances is not None
        return result
