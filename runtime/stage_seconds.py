"""How long each stage of a run takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["StageSeconds"]


@dataclass(slots=True)
class StageSeconds:
    """Seconds by stage, added up."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float), kw_only=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by stage that somebody else measured."""
        for name, value in seconds.items():
            self.seconds[name] += value
