"""An engine that needs no model: its tiles are an encoded label image, and it reads the objects off them.

With it the whole path from slide to instances must be the identity, which is how the tests prove
that tiling, ownership and mask placement lose nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import ShapeError
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.manifest import FORMAT, Anchors, Limits, Manifest, ModelInput

__all__ = ["OracleEngine", "encode_labels", "make_oracle_manifest"]


def encode_labels(labels: NDArray[np.integer], *, channels: int = 3) -> NDArray[np.uint8]:
    """Return an image (H, W, `channels`) that carries the (H, W) `labels`: its bytes, lowest first.

    Raises:
        ShapeError: a label is negative or has more bytes than there are channels.

    >>> encode_labels(np.array([[0, 258]]))
    array([[[0, 0, 0],
            [2, 1, 0]]], dtype=uint8)
    """
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < 256**channels:
        raise ShapeError(f"labels do not fit into {channels} bytes")
    shifts = 8 * np.arange(channels)
    return (labels[:, :, None].astype(np.int64) >> shifts & 255).astype(np.uint8)


class OracleEngine:
    """Reports every connected part of a label on a tile as an object, pixel for pixel.

    A network sees pixels only, and so does the oracle: the mirror image of an object beyond the
    slide's edge is an object to it, and one that touches the edge is one with its mirror image.

    Boxes are tight and scores 1. A mask says of each of its cells whether the pixel under the cell's
    centre belongs to the part: exact for parts up to half of `mask_px` wide and high, since then the
    two cells next to a pixel's centre both lie in that pixel.
    """

    def __init__(
        self, *, tile_px: int, batch: int = 1, channels: int = 3, detections: int = 256, mask_px: int = 28
    ) -> None:
        self._spec = EngineSpec(
            name="oracle",
            batch=batch,
            tile_px=tile_px,
            channels=channels,
            detections=detections,
            mask_batch=detections,
            mask_px=mask_px,
        )

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        return self._spec

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        """Find the parts on `tiles` (B, S, S, C).

        Raises:
            ShapeError: not the shape that `spec` says.
            ValueError: a tile has more parts than there are slots.
        """
        spec = self._spec
        if tiles.shape != (spec.batch, spec.tile_px, spec.tile_px, spec.channels):
            raise ShapeError(f"tiles of shape {tiles.shape} for {spec}")
        weights = 256 ** np.arange(spec.channels)
        parts = np.stack([_connected_parts(tile.astype(np.int64) @ weights) for tile in tiles])  # (B, S, S)
        boxes = np.zeros((spec.batch, spec.detections, 4), np.float32)
        scores = np.zeros((spec.batch, spec.detections), np.float32)
        for index, part in enumerate(parts):
            found = _boxes(part)
            if len(found) > spec.detections:
                raise ValueError(f"{len(found)} parts on a tile, {spec.detections} slots")
            boxes[index, : len(found)] = found
            scores[index, : len(found)] = 1.0
        return Detections(
            boxes=boxes, scores=scores, converged=np.ones(spec.batch, np.bool_), atlas=(parts, boxes.copy())
        )

    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return (M, m, m): 1 where a cell's centre lies in the part that the box was made for.

        Raises:
            ValueError: a box is not one of `detections`.
        """
        parts, known = detections.atlas
        m = self._spec.mask_px
        result = np.zeros((len(boxes), m, m), np.float32)
        for n, (box, index) in enumerate(zip(boxes, tile_index, strict=True)):
            # at most one slot: two parts that each reach all four sides of one box would cross
            slots = np.flatnonzero((known[index] == box).all(axis=1))
            if not slots.size:
                raise ValueError(f"{box} is not a box of these detections")
            xs, ys = (
                np.floor(box[k] + (np.arange(m) + 0.5) / m * (box[k + 2] - box[k])).astype(np.int64)
                for k in (0, 1)
            )
            result[n] = parts[index][np.ix_(ys, xs)] == slots[0] + 1
        return result

    def close(self) -> None:
        """Nothing to release."""


def make_oracle_manifest(engine: OracleEngine, *, halo_px: int, mpp: float | None = None) -> Manifest:
    """Return the manifest of a model that `engine` would be: bytes pass unchanged, anything found is kept."""
    spec = engine.spec
    return Manifest(
        format=FORMAT,
        name="oracle",
        preset="oracle",
        input=ModelInput(
            tile_px=spec.tile_px,
            halo_px=halo_px,
            stride_px=1,
            batch=spec.batch,
            channels=spec.channels,
            intensity=IntensityRule("full_range"),
            nominal_diameter_px=spec.mask_px / 2,
            mpp=mpp,
        ),
        anchors=Anchors(sizes_px=(spec.mask_px / 2,), ratios=(1.0,), strides_px=(1,)),
        limits=Limits(
            proposals_per_level=spec.detections,
            proposals=spec.detections,
            detections=spec.detections,
            mask_batch=spec.mask_batch,
            mask_px=spec.mask_px,
            score_threshold=0.0,
            nms_threshold=1.0,
            min_score=0.5,
        ),
        graphs={},
        files={},
    )


def _connected_parts(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (H, W): parts of one label that hang together by sides, 1..N in reading order; 0 stays 0."""
    parts = np.where(labels > 0, np.arange(1, labels.size + 1).reshape(labels.shape), 0)
    along_x = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] > 0)
    along_y = (labels[1:] == labels[:-1]) & (labels[1:] > 0)
    while True:  # the lowest number spreads until nothing changes
        before = parts.copy()
        sides: list[tuple[Any, Any, NDArray[np.bool_]]] = [
            (parts[:, :-1], parts[:, 1:], along_x),
            (parts[:-1], parts[1:], along_y),
        ]
        for a, b, joined in sides:
            lowest = np.minimum(a, b)
            a[joined] = lowest[joined]
            lowest = np.minimum(a, b)
            b[joined] = lowest[joined]
        if np.array_equal(before, parts):
            break
    _, numbered = np.unique(np.append(0, parts), return_inverse=True)
    return numbered[1:].reshape(labels.shape).astype(np.int64)


def _boxes(part: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (N, 4) boxes of the parts numbered 1..N on one tile."""
    n = int(part.max())
    ys, xs = np.nonzero(part)
    rows = part[ys, xs] - 1
    low = np.full((n, 2), np.iinfo(np.int64).max)
    high = np.zeros((n, 2), np.int64)
    for axis, at in enumerate((xs, ys)):
        np.minimum.at(low[:, axis], rows, at)
        np.maximum.at(high[:, axis], rows, at + 1)
    return np.concatenate([low, high], axis=1).astype(np.float32)
