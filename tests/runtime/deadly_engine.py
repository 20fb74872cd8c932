"""What kills a worker or fails in it, for tests of what survives that; workers import it by its name."""

import os
import signal
from pathlib import Path

from darcnn.runtime.engines.oracle import OracleEngine
from darcnn.runtime.errors import DeviceError

DEADLY = 255  # a pixel that kills, of `OneDeadlyPicture`


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


class OneDeadlyPicture(OracleEngine):
    """Kills its process at tiles with a `DEADLY` pixel."""

    def detect(self, tiles):
        if tiles.max() == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(tiles)


def make_once(make, marker):
    """Return what `make` makes, for the first who asks; the others fail."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        raise DeviceError("no memory left", where="cuda:0", fix="wait") from None
    return make()
