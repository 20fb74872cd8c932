"""Does a bundle find what the network finds? Both run on real tiles, and their objects are compared.

PyTorch is needed only where a network is the reference; a bundle may be compared with another one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.boxes import non_maximum_suppression, pairwise_iou
from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.errors import UsageError

if TYPE_CHECKING:
    from darcnn.export.static import ExportOptions
    from darcnn.training.model.network import Darcnn

__all__ = [
    "COLUMNS",
    "LIMITS",
    "MAX_UNMATCHED",
    "Objects",
    "Parity",
    "TileParity",
    "compare_bundles",
    "compare_objects",
    "compare_runtimes",
    "compare_with_checkpoint",
    "find_with_engine",
    "find_with_torch",
    "limits_of",
    "verify_bundle",
    "with_limits",
]

Tiles = Mapping[str, NDArray[np.uint8]]  # name -> (S, S, C)
Tell = Callable[[str], None]

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
        "features": 1e-3,  # of the largest feature
    },
    # float16 has 11 bits: a box that lies between two pyramid levels may be pooled from the other one
    "fp16": {"box_px": 0.5, "box_median_px": 0.05, "score": 0.02, "mask": 0.05, "features": 1e-2},
}
# What differs, and what it is called in the table and where it is complained of.
COLUMNS = {
    "box_px": "box px",
    "box_median_px": "median px",
    "score": "score",
    "mask": "mask",
    "features": "features",
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
    """How far apart the reference, the network as a rule, and the bundle are on one tile."""

    tile: str
    n_reference: int  # objects of the reference with a score above 0.1
    n_bundle: int  # of the bundle
    n_matched: int  # of n_reference
    n_unmatched: int  # of both sides together
    box_px: float  # largest difference of a side, matched objects
    box_median_px: float
    score: float  # largest difference, matched objects
    mask: float  # largest mean difference of a mask, matched objects
    features: float | None  # largest difference of h_p by the largest feature; None: a side keeps its own


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison on all tiles."""

    tiles: tuple[TileParity, ...]
    precision: str = "fp32"  # of the bundle's layers
    reference: str = "torch"  # what the bundle was compared with

    @property
    def n_objects(self) -> int:
        """Strong objects of both sides together."""
        return sum(tile.n_reference + tile.n_bundle for tile in self.tiles)

    @property
    def n_unmatched(self) -> int:
        """Those of them that the other side lacks."""
        return sum(tile.n_unmatched for tile in self.tiles)

    @property
    def unmatched(self) -> float:
        """The share of objects that the other side lacks; 0 where there is none."""
        return self.n_unmatched / max(self.n_objects, 1)

    def worst(self, column: str) -> float | None:
        """Return the largest difference of one of `COLUMNS`, NaN if there is one; None if none is known."""
        values = [getattr(tile, column) for tile in self.tiles]
        known = [value for value in values if value is not None]
        return float(np.max(known)) if known else None

    @property
    def complaints(self) -> tuple[str, ...]:
        """What does not agree, by the columns of the table; empty if all does.

        Raises:
            UsageError: nobody knows how far apart bundles of this precision may be.
        """
        limits = limits_of(self.precision)
        if not self.n_objects:  # what only objects show, suppression and masks say, was not compared
            return ("no tile has an object to compare",)
        found = [
            f"unmatched {self.unmatched:.1%} ({self.n_unmatched} of {self.n_objects} objects), "
            f"limit {MAX_UNMATCHED:.0%}"
        ] * (self.unmatched > MAX_UNMATCHED)
        for name, limit in limits.items():
            worst = self.worst(name)
            if worst is not None and not worst < limit:  # NaN disagrees
                found.append(f"{COLUMNS[name]} differs by {worst:.3g}, limit {limit:g}")
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
        UsageError: the bundle is in a precision that has no limits.
        DeviceError: the backend is not installed, or needs a GPU or an engine that is not there.
    """
    from darcnn.export.graph import freeze_network
    from darcnn.export.pack import options_of

    limits_of(bundle.precision, str(bundle.path))
    reference = with_limits(freeze_network(network), options_of(bundle.manifest))
    pairs = (
        (name, find_with_torch(reference, tiles[name]), one) for name, one in _find(bundle, tiles, backend)
    )
    return Parity(tuple(compare_objects(*pair) for pair in pairs), bundle.precision)


def compare_bundles(reference: Bundle, bundle: Bundle, tiles: Tiles, *, backend: str) -> Parity:
    """Compare `bundle`, run with `backend`, with what `reference` finds in ONNX Runtime on the CPU.

    Both must have the same sizes: one was derived from the other, or they are the same.

    Raises:
        DeviceError: the backend is not installed, or needs a GPU or an engine that is not there.
    """
    expected = dict(_find(reference, tiles, "onnxruntime"))
    pairs = ((name, expected[name], one) for name, one in _find(bundle, tiles, backend))
    return Parity(tuple(compare_objects(*pair) for pair in pairs), bundle.precision, "float32")


def compare_with_checkpoint(
    bundle: Bundle, checkpoint: Path, data: Path | None, backends: Sequence[str], *, tell: Tell
) -> Iterator[tuple[str, Parity]]:
    """Yield how each backend compares with the network in the folder `checkpoint`, on images of its kind.

    Raises:
        UsageError: the network is of another preset, or there is no image.
    """
    from darcnn.export.tiles import images_of, read_tiles
    from darcnn.training.checkpoint import load_network
    from darcnn.training.trust import checkpoint_in

    network, info = load_network(checkpoint_in(checkpoint))
    if network.preset.name != bundle.manifest.preset:
        raise UsageError(
            f"holds preset {network.preset.name}, the bundle {bundle.manifest.preset}",
            where=checkpoint,
            fix="give the folder that the bundle was made of",
        )
    if info.is_source_only:
        network.start_adaptation()  # as an export of it does
    tiles = read_tiles(images_of(info.recipe, data), bundle)
    tell(f"comparing on {len(tiles)} tiles")
    for backend in backends:
        yield backend, verify_bundle(bundle, network, tiles, backend=backend)


def compare_runtimes(
    opened: Bundle, derived: Bundle, data: Path | None, backends: Sequence[str], *, tell: Tell
) -> Iterator[tuple[str, Parity]]:
    """Yield how `derived`, made of `opened` or the same, compares in each backend with `opened` itself.

    Raises:
        UsageError: there is no image, or nothing to compare with.
    """
    from darcnn.export.tiles import images_in, read_tiles

    if data is None:
        raise UsageError(
            "no images to compare on", where="--data", fix="give a folder of images, or pass --checkpoint"
        )
    others = [name for name in backends if name != "onnxruntime" or derived is not opened]
    if not others:  # it would be compared with itself
        raise UsageError(
            "the bundle in ONNX Runtime is what others are compared with",
            where="--backend",
            fix="name another one, run pip install 'darcnn[openvino]', or pass --checkpoint",
        )
    tiles = read_tiles(images_in(data), opened)
    tell(f"comparing on {len(tiles)} tiles")
    for backend in others:
        yield backend, compare_bundles(opened, derived, tiles, backend=backend)


def _find(bundle: Bundle, tiles: Tiles, backend: str) -> Iterator[tuple[str, Objects]]:
    device = "cpu" if backend == "onnxruntime" else "auto"
    # engines in another precision have the same key: they are made of the same file
    opened = open_engine(bundle, device=device, backend=backend, precision=bundle.precision)
    with closing(opened) as engine:
        yield from find_with_engine(engine, tiles, bundle.manifest.limits.nms_threshold)


def limits_of(precision: str, where: str = "the bundle") -> Mapping[str, float]:
    """Return how far a bundle of this precision may be from its reference, column by column.

    Raises:
        UsageError: nobody knows.
    """
    if precision not in LIMITS:
        raise UsageError(
            f"is in {precision}, for which there are no limits: it may find other boxes than float32",
            where=where,
            fix="score it with `darcnn-train evaluate`, or verify the one that it was made of",
        )
    return LIMITS[precision]


def find_with_torch(network: Darcnn, tile: NDArray[np.uint8]) -> Objects:
    """Return what `network` finds on `tile` (S, S, C), by its own evaluation path."""
    import torch

    from darcnn.export.static import pack_atlas

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
    """Match objects of the reference (`ours`) and of the bundle (`theirs`) by IoU; measure the differences.

    Suppression leaves no two objects of one side with IoU above 0.5, so at 0.9 no object has two matches.
    A strong object of either side may match one that is weak on the other: the score difference then tells.
    """
    iou = pairwise_iou(ours.boxes, theirs.boxes)  # (N, M)
    is_strong, is_strong_too = ours.scores > STRONG_SCORE, theirs.scores > STRONG_SCORE
    has_match = (iou > MATCH_IOU).any(1)
    has_match_too = (iou > MATCH_IOU).any(0)
    matched = np.flatnonzero(is_strong & has_match)
    columns = np.flatnonzero(is_strong_too & has_match_too)
    rows = np.concatenate([matched, iou[:, columns].argmax(0) if len(columns) else columns])
    partners = np.concatenate([iou[matched].argmax(1) if len(matched) else matched, columns])
    rows, partners = np.unique([rows, partners], axis=1)
    box = np.abs(ours.boxes[rows] - theirs.boxes[partners])
    score = np.abs(ours.scores[rows] - theirs.scores[partners])
    mask = np.abs(ours.masks[rows] - theirs.masks[partners]).mean((1, 2))
    return TileParity(
        tile=tile,
        n_reference=int(is_strong.sum()),
        n_bundle=int(is_strong_too.sum()),
        n_matched=len(matched),
        n_unmatched=int((is_strong & ~has_match).sum() + (is_strong_too & ~has_match_too).sum()),
        box_px=float(box.max(initial=0.0)),
        box_median_px=float(np.median(box)) if box.size else 0.0,
        score=float(score.max(initial=0.0)),
        mask=float(mask.max(initial=0.0)),
        features=_features_apart(ours.atlas, theirs.atlas),
    )


def _features_apart(ours: NDArray[np.float32] | None, theirs: NDArray[np.float32] | None) -> float | None:
    """Return the largest difference, relative to our largest feature; None where one side keeps its own."""
    if ours is None or theirs is None:
        return None
    return float(np.abs(ours - theirs).max()) / (float(np.abs(ours).max()) or 1.0)


def with_limits(network: Darcnn, options: ExportOptions) -> Darcnn:
    """Give `network`, a copy of the caller's own, the limits of the graphs, and return it."""
    limits = network.proposer._pre_nms_top_n, network.proposer._post_nms_top_n
    for limit, value in zip(limits, (options.proposals_per_level, options.proposals), strict=True):
        limit["testing"] = value
    network.target_heads.detections_per_img = options.detections
    return network
