"""Work done in a thread of its own, one item ahead of whoever uses it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["map_ahead"]

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], *, name: str) -> Iterator[tuple[T, R]]:
    """Yield each item with what `function` makes of it; a thread called `name` is one item ahead.

    What `function` raises is raised here, in the order of the items.
    """
    ahead: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(1, name) as pool:
        try:
            for item in items:
                ahead.append((item, pool.submit(function, item)))
                if len(ahead) > 1:
                    done, result = ahead.popleft()
                    yield done, result.result()
            for done, result in ahead:
                yield done, result.result()
        finally:
            pool.shutdown(cancel_futures=True)
