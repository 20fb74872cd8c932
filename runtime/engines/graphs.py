"""What every engine knows of the two graphs: their tensors, their static sizes, and how to fill them up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.protocol import EngineSpec
from darcnn.runtime.errors import BundleError, ShapeError

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "Signature",
    "advise_memory",
    "check_manifest",
    "check_signature",
    "check_tiles",
    "expected_signatures",
    "first_line",
    "make_spec",
    "run_masks",
]

INPUTS = {"detect": ("tile",), "mask": ("atlas", "boxes", "tile_index")}
OUTPUTS = {"detect": ("boxes", "scores", "atlas", "converged"), "mask": ("masks",)}

Signature = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype, shape)


def make_spec(bundle: Bundle, name: str) -> EngineSpec:
    """Return the static sizes of an engine called `name` that runs `bundle`."""
    sizes, limits = bundle.manifest.input, bundle.manifest.limits
    return EngineSpec(
        name=name,
        batch=sizes.batch,
        tile_px=sizes.tile_px,
        channels=sizes.channels,
        detections=limits.detections,
        mask_batch=limits.mask_batch,
        mask_px=limits.mask_px,
    )


def expected_signatures(bundle: Bundle) -> dict[str, Signature]:
    """Return the tensors that the two graphs of `bundle` must have, inputs and outputs together.

    Raises:
        BundleError: the manifest does not say what the atlas is.
    """
    sizes, limits = bundle.manifest.input, bundle.manifest.limits
    atlas = bundle.manifest.graphs.get("detect", {}).get("atlas")
    if atlas is None:
        raise BundleError(
            "manifest.json does not say what atlas is", where=bundle.path, fix="export the model again"
        )
    batch, tile = sizes.batch, sizes.tile_px
    return {
        "detect": {
            "tile": ("uint8", (batch, tile, tile, sizes.channels)),
            "boxes": ("float32", (batch, limits.detections, 4)),
            "scores": ("float32", (batch, limits.detections)),
            "atlas": ("float32", atlas[1]),
            "converged": ("bool", (batch,)),
        },
        "mask": {
            "atlas": ("float32", atlas[1]),
            "boxes": ("float32", (limits.mask_batch, 4)),
            "tile_index": ("int64", (limits.mask_batch,)),
            "masks": ("float32", (limits.mask_batch, limits.mask_px, limits.mask_px)),
        },
    }


def check_manifest(bundle: Bundle) -> None:
    """Compare the tensors that the manifest states with what its input and limits ask for.

    Raises:
        BundleError: they differ; the message names the first tensor that does.
    """
    for graph, expected in expected_signatures(bundle).items():
        stated = bundle.manifest.graphs.get(graph, {})
        _compare(bundle, graph, expected, found=stated, source="manifest.json")


def check_signature(bundle: Bundle, graph: str, found: Signature) -> None:
    """Compare the tensors `found` in `graph`, and those that the manifest states, with what they must be.

    Raises:
        BundleError: they differ; the message names the first tensor that does.
    """
    expected, stated = expected_signatures(bundle)[graph], bundle.manifest.graphs.get(graph, {})
    _compare(bundle, graph, expected, found=stated, source="manifest.json")
    _compare(bundle, graph, expected, found=found, source=f"{graph}.onnx")


def check_tiles(spec: EngineSpec, tiles: Any) -> None:
    """Raise a ShapeError unless `tiles`, on the host or on a GPU, are one batch, (B, S, S, C) uint8."""
    wanted = (spec.batch, spec.tile_px, spec.tile_px, spec.channels)
    if tuple(tiles.shape) != wanted or str(tiles.dtype).removeprefix("torch.") != "uint8":
        raise ShapeError(f"tiles are {tiles.dtype} {tuple(tiles.shape)}, not uint8 {wanted}")


def run_masks(
    spec: EngineSpec,
    boxes: NDArray[np.float32],
    tile_index: NDArray[np.int64],
    run: Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Return (M, m, m) masks of `boxes` (M, 4) px on tiles `tile_index` (M,), M free.

    Args:
        spec: of the engine.
        boxes: tile pixels.
        tile_index: 0..batch-1.
        run: the inputs `boxes` (mask_batch, 4) and `tile_index` (mask_batch,) -> `masks` (mask_batch, m, m),
            which are read before the next call.
    Raises:
        ShapeError: the arrays do not fit each other, or an index names no tile of the batch.
    """
    n_boxes = len(boxes)
    if boxes.shape != (n_boxes, 4) or tile_index.shape != (n_boxes,):
        raise ShapeError(f"boxes {boxes.shape} and tile_index {tile_index.shape} do not fit")
    if n_boxes and not 0 <= tile_index.min() <= tile_index.max() < spec.batch:
        raise ShapeError(f"tile_index goes from {tile_index.min()} to {tile_index.max()} of {spec.batch}")
    masks = np.empty((n_boxes, spec.mask_px, spec.mask_px), np.float32)
    for start in range(0, n_boxes, spec.mask_batch):
        rows = slice(start, min(start + spec.mask_batch, n_boxes))
        size = rows.stop - start
        # The last batch is filled up with the whole of tile 0: any box that certainly has pixels.
        padded = np.tile(np.array([0, 0, spec.tile_px, spec.tile_px], np.float32), (spec.mask_batch, 1))
        index = np.zeros(spec.mask_batch, np.int64)
        padded[:size], index[:size] = boxes[rows], tile_index[rows]
        masks[rows] = run({"boxes": padded, "tile_index": index})[:size]
    return masks


def advise_memory(spec: EngineSpec, advice: str) -> str:
    """Return what to do where memory may have given out: `advice`, and half the batch where there is one.

    A batch is part of the graphs: a run cannot halve it.
    """
    half = spec.batch // 2
    return f"{advice}, or make a model with `darcnn-export bundle MODEL --batch {half}`" if half else advice


def first_line(error: object) -> str:
    """Return what a library says of an error, short enough for our one line.

    >>> first_line(RuntimeError("no memory\\nat line 7"))
    'no memory'
    """
    return str(error).strip().split("\n", 1)[0][:200]


def _compare(bundle: Bundle, graph: str, expected: Signature, *, found: Signature, source: str) -> None:
    for name in sorted(set(expected) | set(found)):
        if found.get(name) != expected.get(name):
            raise BundleError(
                f"{source} has {_describe(name, found)} in the {graph} graph, "
                f"the model's input and limits ask for {_describe(name, expected)}",
                where=bundle.path,
                fix="export the model again",
            )


def _describe(name: str, signature: Signature) -> str:
    if name not in signature:
        return f"no {name}"
    kind, shape = signature[name]
    return f"{name} {kind} {list(shape)}"
