"""What runs the two graphs of a bundle: uint8 tiles in, boxes, scores and masks out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Detections", "Engine", "EngineSpec", "UploadsTiles"]


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The static sizes an engine was made for."""

    name: str  # "onnxruntime 1.26.0 CPUExecutionProvider", for run.json
    batch: int  # tiles per `detect`
    tile_px: int  # a tile is tile_px x tile_px
    channels: int  # 1 to 4
    detections: int  # slots per tile
    mask_batch: int  # boxes per `masks`
    mask_px: int  # a mask is mask_px x mask_px


@dataclass(frozen=True, slots=True)
class Detections:
    """The result of one `detect` call, B tiles.

    `boxes` (B, D, 4) float32, x0 y0 x1 y1 in tile pixels; `scores` (B, D) float32, 0 = empty slot;
    `converged` (B,) bool; `atlas` is the engine's own handle on the features that masks are made from
    (valid until the engine's next `detect`).
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    converged: NDArray[np.bool_]
    atlas: Any


@runtime_checkable
class Engine(Protocol):
    """Runs a model on fixed-shape batches. One thread at a time."""

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        ...

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        """Find objects on `tiles`, (B, S, S, C) uint8 with exactly B = spec.batch."""
        ...

    def masks(
        self,
        detections: Detections,
        boxes: NDArray[np.float32],
        tile_index: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Return (M, m, m) mask probabilities for `boxes` (M, 4) px on tiles `tile_index` (M,).

        M is free: the engine pads the last batch. A mask covers its box; cell centres are at
        `(i + 0.5) / m` of the box. The result is the caller's.
        """
        ...

    def close(self) -> None:
        """Release device memory; closing twice is allowed."""
        ...


@runtime_checkable
class UploadsTiles(Protocol):
    """What an engine on a device may do beside: take the next tiles in while it computes."""

    def upload(self, tiles: NDArray[np.uint8]) -> Any:
        """Start to copy `tiles`, a batch, and return at once what `detect` takes in their place.

        May be called while another thread computes.
        """
        ...
