"""An engine that kills its process, for tests of what survives that; workers import it by its name."""

import os
import signal
from pathlib import Path

from darcnn.runtime.engines.oracle import OracleEngine


class DeadlyEngine(OracleEngine):
    """Kills its process instead of finding anything, until so many have died (`tombs`)."""

    def __init__(self, *, tombs, deaths, **sizes):
        super().__init__(**sizes)
        self._tombs, self._deaths = Path(tombs), deaths

    def detect(self, tiles):
        n_dead = len(list(self._tombs.iterdir()))
        if n_dead < self._deaths:
            (self._tombs / str(n_dead)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(tiles)
