"""An engine that gives what another one answered again at once: what is left of a run is all else."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.engines.protocol import Detections, Engine, EngineSpec, UploadsTiles

__all__ = ["ReplayedEngine"]


class ReplayedEngine:
    """An `Engine` that keeps the answers of `inner` in memory, by their inputs, and gives them again."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self._found: dict[int, Detections] = {}
        self._masks: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._tiles = 0  # the key of the last `detect`
        self._last: Any = None  # what `inner` answered to it, if it was asked
        self.is_recording = False

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        return self._inner.spec

    def upload(self, tiles: NDArray[np.uint8]) -> Any:
        """Start to copy `tiles` to the device, if the engine is on one and is asked."""
        is_asked = isinstance(self._inner, UploadsTiles) and not self.is_recording
        return self._inner.upload(tiles) if is_asked else tiles

    def detect(self, tiles: Any) -> Detections:
        """Find objects on `tiles`, as `inner` does or did."""
        self._last = None
        if not self.is_recording:
            self._last = self._inner.detect(tiles)
            return self._last
        self._tiles = hash(tiles.tobytes())
        if self._tiles not in self._found:
            self._last = found = self._inner.detect(tiles)
            kept = (found.boxes.copy(), found.scores.copy(), found.converged.copy())
            self._found[self._tiles] = Detections(*kept, atlas=None)
        return self._found[self._tiles]

    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return mask probabilities for `boxes`, as `inner` does or did."""
        if not self.is_recording:
            return self._inner.masks(detections, boxes, tile_index)
        key = self._tiles, hash(boxes.tobytes())
        if key not in self._masks:
            self._masks[key] = self._inner.masks(self._last, boxes, tile_index)
        return self._masks[key]

    def close(self) -> None:
        """Close the engine."""
        self._inner.close()
