"""What goes into a bundle beside the graphs, and the bundle itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from darcnn.export.graph import export_detect, export_mask
from darcnn.export.printing import to_json
from darcnn.export.static import AtlasPool, ExportOptions
from darcnn.runtime.bundle import write_bundle
from darcnn.runtime.errors import UsageError
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.manifest import FORMAT, Anchors, Limits, Manifest, ModelInput
from darcnn.runtime.slab import Slab
from darcnn.runtime.tiling import halo_for
from darcnn.training.checkpoint import CheckpointInfo
from darcnn.training.config import Recipe, recipe_to_table
from darcnn.training.model.network import Darcnn

__all__ = [
    "make_licence",
    "make_manifest",
    "make_members",
    "make_training",
    "manifest_of_recipe",
    "options_of",
    "write_model_bundle",
]


def make_manifest(
    network: Darcnn,
    options: ExportOptions,
    *,
    name: str,
    intensity: IntensityRule,
    nominal_diameter_px: float,
    mpp: float | None,
    min_score: float,
    finds_diameter: bool = False,
    found_diameter_px: float | None = None,
    slab: Slab | None = None,
    max_diameter_px: float | None = None,
) -> Manifest:
    """Return the manifest of a bundle that is not yet written: `files` is empty.

    Args:
        network: whose layers and thresholds the graphs have.
        options: the sizes of the graphs.
        name: of the model.
        intensity: how raw pixels become the bytes of `tile`.
        nominal_diameter_px: a typical object, network pixels.
        mpp: micrometres per network pixel, None where the model knows no scale.
        min_score: what a run keeps unless told otherwise.
        finds_diameter: without a given size, a run measures the objects of an image first.
        found_diameter_px: what it then finds where objects are nominal, network pixels; None: that.
        slab: how much of a volume one plane stands for.
        max_diameter_px: larger findings are not reported; network pixels, None for no limit.
    Raises:
        UsageError: the tile is too small for its halo or does not fit the network.
    """
    options.check(network)
    preset = network.preset
    if options.tile_px <= 2 * options.halo_px:
        raise UsageError(
            f"{options.tile_px} px leave no core between halos of {options.halo_px} px",
            where="--tile",
            fix=f"give more than {2 * options.halo_px}",
        )
    return Manifest(
        format=FORMAT,
        name=name,
        preset=preset.name,
        input=ModelInput(
            tile_px=options.tile_px,
            halo_px=options.halo_px,
            stride_px=max(preset.strides_px),
            batch=options.batch,
            channels=options.channels,
            intensity=intensity,
            nominal_diameter_px=nominal_diameter_px,
            mpp=mpp,
            finds_diameter=finds_diameter,
            found_diameter_px=found_diameter_px,
            slab=slab,
        ),
        anchors=Anchors(preset.anchor_sizes_px, preset.anchor_ratios, preset.strides_px),
        limits=replace(_limits(network, options, min_score), max_diameter_px=max_diameter_px),
        graphs=_signatures(network, options),
        files={},
    )


def manifest_of_recipe(network: Darcnn, recipe: Recipe, name: str, tile_px: int, **sizes: int) -> Manifest:
    """Return the manifest of a bundle of `network`, trained by `recipe`; `sizes` are of `ExportOptions`.

    Raises:
        UsageError: the tile is too small for its halo or does not fit the network.
    """
    target, limit = recipe.target, recipe.export.max_diameters
    options = ExportOptions(
        channels=target.channels,
        tile_px=tile_px,
        halo_px=halo_for(target.nominal_diameter_px, max(network.preset.strides_px)),
        **sizes,
    )
    return make_manifest(
        network,
        options,
        name=name,
        intensity=target.intensity,
        nominal_diameter_px=target.nominal_diameter_px,
        mpp=target.mpp,
        min_score=recipe.export.min_score,
        finds_diameter=target.finds_diameter,
        found_diameter_px=recipe.export.found_diameter_px,
        slab=target.slab,
        max_diameter_px=None if limit is None else limit * target.nominal_diameter_px,
    )


def options_of(manifest: Manifest) -> ExportOptions:
    """Return the options that a bundle's graphs were made with."""
    sizes, limits = manifest.input, manifest.limits
    return ExportOptions(
        channels=sizes.channels,
        tile_px=sizes.tile_px,
        batch=sizes.batch,
        proposals_per_level=limits.proposals_per_level,
        proposals=limits.proposals,
        detections=limits.detections,
        mask_batch=limits.mask_batch,
        halo_px=sizes.halo_px,
    )


def make_training(info: CheckpointInfo) -> dict[str, Any]:
    """Return what training.json says: recipe, stage, data and its licence, figures.

    Of the data folder only its name is told; where it lay is nobody's business.
    """
    recipe = recipe_to_table(info.recipe)
    recipe["data"] = PurePath(info.recipe.data).name
    return {
        "recipe": recipe,
        "stage": info.stage,
        "step": info.step,
        "data_licence": info.recipe.data_licence,
        "figures": info.figures,
    }


def make_licence(name: str, data_licence: str) -> str:
    """Return the text of LICENSE for a model whose maker gives none."""
    return (
        f"Model weights of {name!r}, trained with darcnn.\n\n"
        f"They were derived from data under these terms:\n\n{data_licence.strip()}\n"
    )


def make_members(
    network: Darcnn, options: ExportOptions, training: Mapping[str, Any], licence: str
) -> dict[str, bytes]:
    """Return the members of a bundle other than its manifest."""
    return {
        "detect.onnx": export_detect(network, options),
        "mask.onnx": export_mask(network, options),
        "training.json": to_json(training),
        "LICENSE": licence.encode(),
    }


def write_model_bundle(
    path: Path, network: Darcnn, manifest: Manifest, training: Mapping[str, Any], licence: str
) -> None:
    """Export both graphs of `network` and write the bundle, unverified; replaces `path`.

    Raises:
        OutputError: the file cannot be written.
        BundleError: a graph is larger than readers accept.
    """
    write_bundle(path, manifest, make_members(network, options_of(manifest), training, licence))


def _limits(network: Darcnn, options: ExportOptions, min_score: float) -> Limits:
    return Limits(
        proposals_per_level=options.proposals_per_level,
        proposals=options.proposals,
        detections=options.detections,
        mask_batch=options.mask_batch,
        mask_px=network.preset.mask_px,
        score_threshold=network.target_heads.score_thresh,
        nms_threshold=network.target_heads.nms_thresh,
        min_score=min_score,
    )


def _signatures(network: Darcnn, options: ExportOptions) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    batch, tile, slots, boxes = options.batch, options.tile_px, options.detections, options.mask_batch
    rows = AtlasPool(network, tile).rows_per_tile
    atlas = ("float32", (batch, rows, network.preset.pyramid_channels))
    return {
        "detect": {
            "tile": ("uint8", (batch, tile, tile, options.channels)),
            "boxes": ("float32", (batch, slots, 4)),
            "scores": ("float32", (batch, slots)),
            "atlas": atlas,
            "converged": ("bool", (batch,)),
        },
        "mask": {
            "atlas": atlas,
            "boxes": ("float32", (boxes, 4)),
            "tile_index": ("int64", (boxes,)),
            "masks": ("float32", (boxes, network.preset.mask_px, network.preset.mask_px)),
        },
    }
