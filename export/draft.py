"""A bundle in the making: of a checkpoint, or of another bundle with graphs of other sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darcnn.export.pack import (
    make_licence,
    make_manifest,
    make_members,
    make_training,
    manifest_of_recipe,
    options_of,
)
from darcnn.export.parity import Parity, verify_bundle
from darcnn.export.static import MAX_TOP_K, ExportOptions
from darcnn.export.tiles import TileSource, images_in, images_of, learned_images, measure_mpp, read_tiles
from darcnn.runtime.bundle import Bundle, open_bundle, read_training, write_bundle
from darcnn.runtime.errors import UsageError
from darcnn.runtime.manifest import Manifest
from darcnn.training.checkpoint import load_network
from darcnn.training.model.bundle_weights import load_bundle, preset_of
from darcnn.training.model.network import Darcnn
from darcnn.training.trust import checkpoint_in

__all__ = ["Draft", "Sizes", "draft_of_bundle", "draft_of_checkpoint", "write_verified"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the graphs that a user gave; None: what they are by default, or were."""

    tile_px: int | None = None
    batch: int | None = None
    proposals: int | None = None  # of a level, and of a tile
    detections: int | None = None
    mask_batch: int | None = None

    def given(self, before: ExportOptions, tile_px: int) -> dict[str, int]:
        """Return those that were given, but for the tile, as `ExportOptions` calls them.

        Counts that were not grow with the tile, from what they were for that of `before`: a larger one holds
        more objects.
        """
        growth = max(1.0, (tile_px / before.tile_px) ** 2)
        proposals, detections = self.proposals, self.detections
        if proposals is None:
            proposals = min(MAX_TOP_K, round(growth * before.proposals))
        if detections is None:
            detections = min(proposals, round(growth * before.detections))
        sizes = {"batch": self.batch, "mask_batch": self.mask_batch}
        counts = {"proposals_per_level": proposals, "proposals": proposals, "detections": detections}
        return {name: value for name, value in sizes.items() if value is not None} | counts


@dataclass(frozen=True, slots=True)
class Draft:
    """A bundle before its graphs are exported."""

    network: Darcnn
    manifest: Manifest
    training: Mapping[str, Any]  # training.json
    licence: str
    sources: Sequence[TileSource]  # images to verify it on

    def reporting(self, min_score: float) -> Draft:
        """Return the draft of a model that reports what scores at least `min_score`.

        Raises:
            UsageError: the graphs report nothing that scores so little, or nothing can score so much.
        """
        least = self.manifest.limits.score_threshold
        if not least <= min_score <= 1:
            raise UsageError(
                f"is {min_score:g}, but objects score {least:g} to 1",
                where="--min-score",
                fix="give a number between these",
            )
        limits = replace(self.manifest.limits, min_score=min_score)
        return replace(self, manifest=replace(self.manifest, limits=limits))


def draft_of_checkpoint(
    folder: Path,
    sizes: Sizes,
    *,
    name: str | None,
    data: Path | None,
    licence: str | None,
    tell: Callable[[str], None],
) -> Draft:
    """Return what becomes of the checkpoint in `folder`; of a whole run, of its most trusted round.

    Raises:
        InputError: there is no checkpoint, or it is damaged.
        UsageError: the sizes do not fit, or there is no image to verify on.
    """
    chosen = checkpoint_in(folder)
    if chosen != folder:
        tell(f"taking the most trusted round, {chosen.name}")
    network, info = load_network(chosen)
    if info.is_source_only:
        network.start_adaptation()
    recipe = info.recipe
    name = name or recipe.name
    sources = images_of(recipe, data)
    target = recipe.target
    if target.mpp is None and not target.finds_diameter:
        target = replace(target, mpp=measure_mpp(learned_images(recipe, data), target.nominal_diameter_px))
        if target.mpp is not None:
            tell(f"the images tell the scale: {target.mpp:g} um per network pixel")
    tile_px = recipe.export.tile_px if sizes.tile_px is None else sizes.tile_px
    given = sizes.given(ExportOptions(channels=target.channels), tile_px)
    manifest = manifest_of_recipe(network, replace(recipe, target=target), name, tile_px, **given)
    terms = make_licence(name, recipe.data_licence) if licence is None else licence
    tell(f"exporting {name}, stage {info.stage}, step {info.step}")
    return Draft(network, manifest, make_training(info), terms, sources)


def draft_of_bundle(
    bundle: Bundle, sizes: Sizes, *, name: str | None, data: Path | None, licence: str | None
) -> Draft:
    """Return what becomes of the network inside `bundle`, in float32; what it knows of images stays.

    Raises:
        InputError: the bundle does not hold the weights of its network.
        UsageError: the sizes do not fit, or there is no image to verify on.
    """
    if data is None:
        raise UsageError(
            "no images to verify on", where="--data", fix="give a folder of images like the model's"
        )
    network = Darcnn(preset_of(bundle))
    load_bundle(network, bundle)
    before = bundle.manifest
    options = options_of(before)
    tile_px = options.tile_px if sizes.tile_px is None else sizes.tile_px
    manifest = make_manifest(
        network.eval(),
        replace(options, tile_px=tile_px, **sizes.given(options, tile_px)),
        name=name or before.name,
        intensity=before.input.intensity,
        nominal_diameter_px=before.input.nominal_diameter_px,
        mpp=before.input.mpp,
        min_score=before.limits.min_score,
        finds_diameter=before.input.finds_diameter,
        found_diameter_px=before.input.found_diameter_px,
        slab=before.input.slab,
        max_diameter_px=before.limits.max_diameter_px,
    )
    terms = bundle.read("LICENSE").decode() if licence is None else licence
    return Draft(network, manifest, _training_of(bundle), terms, images_in(data))


def _training_of(bundle: Bundle) -> dict[str, Any]:
    """Return what training.json says, with a word on weights that were in int8 and are float32 again."""
    training = read_training(bundle)
    if bundle.precision == "int8":
        training["weights_were"] = "int8"
        training.pop("calibration_tiles", None)
        training.pop("has_offsets", None)
    return training


def write_verified(out: Path, draft: Draft) -> Parity:
    """Export the graphs, compare them with the network on real tiles, and write the bundle if they agree.

    Raises:
        InputError: an image cannot be read, or a weight cannot be stored.
        OutputError: the file cannot be written.
    """
    members = make_members(draft.network, options_of(draft.manifest), draft.training, draft.licence)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draft.darcnn"
        write_bundle(path, draft.manifest, members)
        opened = open_bundle(path)
        parity = verify_bundle(opened, draft.network, read_tiles(draft.sources, opened))
    if parity.agrees:
        write_bundle(out, draft.manifest, members)
    return parity
