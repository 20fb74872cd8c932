"""Does a bundle find what the network finds? Both run on real tiles, and their objects are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from darcnn.export.graph import freeze_network
from darcnn.export.pack import options_of
from darcnn.export.static import ExportOptions, pack_atlas
from darcnn.runtime.boxes import non_maximum_suppression, pairwise_iou
from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.protocol import Engine
from darcnn.training.model.network import Darcnn

__all__ = [
    "Objects",
    "Parity",
    "TileParity",
    "compare_objects",
    "find_with_engine",
    "find_with_torch",
    "verify_bundle",
]

T = TypeVar("T")
Tiles = Mapping[str, NDArray[np.uint8]]  # name -> (S, S, C)

STRONG_SCORE = 0.1  # weaker objects may flip at the score threshold, 0.05
MATCH_IOU = 0.9
MAX_UNMATCHED = 0.01  # share of strong objects that the other side lacks
# The largest differences of a bundle that agrees, by the precision of its layers.
LIMITS = {
    "fp32": {
        "box_px": 0.5,
        "box_median_px": 0.05,
        "score": 0.01,
        "mask": 0.02,  # mean over the cells of one mask
        "features": 1e-3,  # of the largest feature; seen also where there is no object
    },
    # float16 has 11 bits: a box that lies between two pyramid levels may be pooled from the other one
    "fp16": {"box_px": 0.5, "box_median_px": 0.05, "score": 0.02, "mask": 0.05, "features": 1e-2},
}


@dataclass(frozen=True, slots=True)
class Objects:
    """What one side finds on a tile, by descending score."""

    boxes: NDArray[np.float32]  # (N, 4) tile px
    scores: NDArray[np.float32]  # (N,)
    masks: NDArray[np.float32]  # (N, 28, 28) probabilities
    atlas: NDArray[np.float32] | None  # (P, C) pooled features' source; None where it stays on a GPU


@dataclass(frozen=True, slots=True)
class TileParity:
    """How far apart network and bundle are on one tile."""

    tile: str
    n_torch: int  # objects with a score above 0.1
    n_onnx: int
    n_matched: int  # of n_torch
    n_unmatched: int  # of both sides together
    box_px: float  # largest difference of a side, matched objects
    box_median_px: float
    score: float  # largest difference, matched objects
    mask: float  # largest mean difference of a mask, matched objects
    features: float  # largest difference of h_p, relative to the largest feature


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison on all tiles."""

    tiles: tuple[TileParity, ...]
    precision: str = "fp32"  # of the bundle's layers

    @property
    def n_objects(self) -> int:
        """Strong objects of both sides together."""
        return sum(tile.n_torch + tile.n_onnx for tile in self.tiles)

    @property
    def complaints(self) -> tuple[str, ...]:
        """What does not agree; empty if all does."""
        unmatched = sum(tile.n_unmatched for tile in self.tiles)
        found = [f"{unmatched} of {self.n_objects} objects unmatched"] * (
            unmatched > MAX_UNMATCHED * self.n_objects
        )
        for name, limit in LIMITS[self.precision].items():
            worst = max((float(getattr(tile, name)) for tile in self.tiles), default=0.0)
            if not worst < limit:  # NaN disagrees
                found.append(f"{name} differs by {worst:.3g}, limit {limit:g}")
        return tuple(found)

    @property
    def agrees(self) -> bool:
        """Tell whether the bundle may stand for the network."""
        return not self.complaints


def verify_bundle(bundle: Bundle, network: Darcnn, tiles: Tiles, *, backend: str = "onnxruntime") -> Parity:
    """Compare the bundle, run as a user runs it with `backend`, with the network that it was made of.

    The network computes in PyTorch by its own evaluation path; its weights are rounded to float16 as the
    bundle's are, and its limits are those of the bundle. ONNX Runtime runs on the CPU here.

    Raises:
        DeviceError: the backend is not installed, or needs a GPU or an engine that is not there.
    """
    options = options_of(bundle.manifest)
    reference = _with_limits(freeze_network(network), options)
    device = "cpu" if backend == "onnxruntime" else "auto"
    with closing(open_engine(bundle, device=device, backend=backend)) as engine:
        found = find_with_engine(engine, tiles, bundle.manifest.limits.nms_threshold)
        pairs = ((name, find_with_torch(reference, tiles[name]), one) for name, one in found)
        return Parity(tuple(compare_objects(*pair) for pair in pairs), bundle.precision)


def find_with_torch(network: Darcnn, tile: NDArray[np.uint8]) -> Objects:
    """Return what `network` finds on `tile` (S, S, C), by its own evaluation path."""
    size = tile.shape[:2]
    with torch.no_grad():
        image = torch.tensor(tile).float().permute(2, 0, 1)[None]
        c2 = network.trunk(image)
        proposals, _, _ = network.proposer.propose(network.rpn_levels(network.shared_encoder(c2)), size)
        pyramid = network.target_encoder(c2)
        boxes, scores = network.target_heads.detect(pyramid, proposals, size)
        masks = network.target_heads.mask_probabilities(pyramid, boxes)
        atlas = pack_atlas(pyramid)
    return Objects(boxes[0].numpy(), scores[0].numpy(), masks.numpy(), atlas[0].numpy())


def find_with_engine(engine: Engine, tiles: Tiles, nms_threshold: float) -> Iterator[tuple[str, Objects]]:
    """Yield the name of each tile and what `engine` finds on it; full batches wherever possible."""
    spec = engine.spec
    names = list(tiles)
    for start in range(0, len(names), spec.batch):
        group = names[start : start + spec.batch]
        batch = np.zeros((spec.batch, spec.tile_px, spec.tile_px, spec.channels), np.uint8)
        batch[: len(group)] = np.stack([tiles[name] for name in group])
        found = engine.detect(batch)
        for index, name in enumerate(group):
            rows = np.flatnonzero(found.scores[index] > 0)
            boxes, scores = found.boxes[index, rows], found.scores[index, rows]
            if not found.converged[index]:  # the host finishes what the graph began
                kept = non_maximum_suppression(boxes, scores, nms_threshold)
                boxes, scores = boxes[kept], scores[kept]
            masks = engine.masks(found, boxes, np.full(len(boxes), index, np.int64))
            atlas = None if found.atlas is None else np.asarray(found.atlas[index])
            yield name, Objects(boxes, scores, masks, atlas)


def compare_objects(tile: str, ours: Objects, theirs: Objects) -> TileParity:
    """Match the objects of PyTorch (`ours`) and of the bundle (`theirs`) by IoU and measure the differences.

    Suppression leaves no two objects of one side with IoU above 0.5, so at 0.9 no object has two matches.
    A strong object may match one that is weak on the other side: the score difference then tells.
    """
    iou = pairwise_iou(ours.boxes, theirs.boxes)  # (N, M)
    is_strong, is_strong_too = ours.scores > STRONG_SCORE, theirs.scores > STRONG_SCORE
    has_match = (iou > MATCH_IOU).any(1)
    has_match_too = (iou > MATCH_IOU).any(0)
    rows = np.flatnonzero(is_strong & has_match)
    partners = iou[rows].argmax(1) if len(rows) else rows
    box = np.abs(ours.boxes[rows] - theirs.boxes[partners])
    score = np.abs(ours.scores[rows] - theirs.scores[partners])
    mask = np.abs(ours.masks[rows] - theirs.masks[partners]).mean((1, 2))
    return TileParity(
        tile=tile,
        n_torch=int(is_strong.sum()),
        n_onnx=int(is_strong_too.sum()),
        n_matched=len(rows),
        n_unmatched=int((is_strong & ~has_match).sum() + (is_strong_too & ~has_match_too).sum()),
        box_px=float(box.max(initial=0.0)),
        box_median_px=float(np.median(box)) if box.size else 0.0,
        score=float(score.max(initial=0.0)),
        mask=float(mask.max(initial=0.0)),
        features=_features_apart(ours.atlas, theirs.atlas),
    )


def _features_apart(ours: NDArray[np.float32] | None, theirs: NDArray[np.float32] | None) -> float:
    """Return the largest difference, relative to our largest feature; 0 where one side keeps its own."""
    if ours is None or theirs is None:
        return 0.0
    return float(np.abs(ours - theirs).max()) / (float(np.abs(ours).max()) or 1.0)


def _with_limits(network: Darcnn, options: ExportOptions) -> Darcnn:
    """Give `network`, a copy of our own, the limits of the graphs."""
    limits = network.proposer._pre_nms_top_n, network.proposer._post_nms_top_n
    for limit, value in zip(limits, (options.proposals_per_level, options.proposals), strict=True):
        limit["testing"] = value
    network.target_heads.detections_per_img = options.detections
    return network
