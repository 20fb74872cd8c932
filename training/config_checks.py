"""What no run could make sense of in a recipe, each with the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.load import names_bundle, shipped_models
from darcnn.runtime.tiling import halo_for
from darcnn.training.model.presets import PRESETS, is_detectron2_file

if TYPE_CHECKING:
    from darcnn.training.config import Recipe, Source, Target

__all__ = ["problems_of"]

_COLOURS = 3  # channels
_MAX_LABEL = 65535  # pseudo-labels are 16-bit pictures


def problems_of(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what no run could make sense of, each with the fix."""
    target, refine = recipe.target, recipe.refine_stage
    yield from _start_problems(recipe)
    if recipe.source is not None:
        yield from _source_problems(recipe.source)
    if recipe.preset not in PRESETS:
        yield f"preset = {recipe.preset!r} is unknown", f"use one of {', '.join(PRESETS)}"
    if recipe.weights not in ("imagenet", "coco") and not (
        is_detectron2_file(recipe.weights) or names_bundle(recipe.weights)
    ):
        yield (
            f"weights = {recipe.weights!r} is unknown",
            f"use imagenet, coco, {', '.join(shipped_models())} or the path of a .darcnn, .pkl or .pth",
        )
    elif is_detectron2_file(recipe.weights) and recipe.preset != "resnet50":
        yield f"weights = {recipe.weights!r} does not fit preset {recipe.preset}", "use preset resnet50"
    if not target.sets:
        yield "no target images", "give at least one [[target.sets]]"
    if not refine.scales or not all(0 < scale < math.inf for scale in refine.scales):
        yield "refine_stage.scales are not above 0 and finite", "use [1.0], say"
    yield from _target_problems(target)
    yield from _tile_problems(recipe)
    if not 0 <= recipe.seed < 2**63:
        yield f"seed = {recipe.seed} is not from 0 to 2^63 - 1", "use 1, say"
    for name in ("source_every", "synthetic_every"):
        if (every := getattr(refine, name)) < 0 or every == 1:
            yield (
                f"refine_stage.{name} = {every} leaves no batch to the pseudo-labels",
                "give 2 or more, or 0 for none of these batches",
            )
    for name in ("alpha", "beta", "gamma"):
        if not 0.0 <= (weight := getattr(recipe.adapt_stage, name)) < math.inf:
            yield f"adapt_stage.{name} = {weight} is no weight", "give a number from 0 on; 0 leaves it out"
    if refine.source_every and refine.synthetic_every and refine.synthetic_every % refine.source_every == 0:
        yield (
            "refine_stage.synthetic_every would never act: photographs go first where both fall on one step",
            "give a number that is no multiple of refine_stage.source_every",
        )
    if recipe.tile_px < 64 or recipe.tile_px % 64:
        yield "tile_px is no multiple of 64", "use 256, say"
    if not 1 <= refine.max_objects <= _MAX_LABEL:
        yield f"refine_stage.max_objects is not from 1 to {_MAX_LABEL}", "use 300, say"
    sizes = {f"target.sets[{i}].diameter_px": one.diameter_px for i, one in enumerate(target.sets)}
    positive = {
        "target.nominal_diameter_px": target.nominal_diameter_px,
        "target.mpp": target.mpp,
        "refine_stage.max_diameters": refine.max_diameters,
        "export.max_diameters": recipe.export.max_diameters,
        "export.found_diameter_px": recipe.export.found_diameter_px,
        "target.jitter": target.jitter,
        "ablation.diameter_px": recipe.ablation.diameter_px if recipe.ablation else None,
        "source_stage.accumulate": recipe.source_stage.accumulate,
        "adapt_stage.accumulate": recipe.adapt_stage.accumulate,
        "adapt_stage.patience": recipe.adapt_stage.patience,
        "refine_stage.accumulate": refine.accumulate,
        "source_stage.batch": recipe.source_stage.batch,
        "adapt_stage.source_batch": recipe.adapt_stage.source_batch,
        "adapt_stage.target_batch": recipe.adapt_stage.target_batch,
        "refine_stage.batch": refine.batch,
        "refine_stage.rounds": refine.rounds,
        "refine_stage.steps": refine.steps,
        "source_stage.learning_rate": recipe.source_stage.learning_rate,
        "adapt_stage.learning_rate": recipe.adapt_stage.learning_rate,
        "refine_stage.learning_rate": refine.learning_rate,
        **sizes,
        "target.slab.depth": target.slab.depth if target.slab else None,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            yield f"{name} = {value} is not above 0 and finite", "give a number above 0"
    if refine.doubt_score is not None and not 0.0 <= refine.doubt_score <= refine.min_score:
        yield (
            "refine_stage.doubt_score is not from 0 to refine_stage.min_score",
            "use 0.2, say, or leave it out",
        )
    shares = ("crowding", 0.7, "crowded tiles"), ("glass", 0.5, "glass"), ("min_stain", 0.5, "stain")
    for name, usual, what in shares:
        if not 0.0 <= (share := getattr(refine, name)) <= 1.0:
            yield (
                f"refine_stage.{name} = {share} is no share",
                f"give a number from 0 to 1: {usual}, say, or 0 for no {what}",
            )
    if not 0.0 <= refine.vary_stains < 1.0:
        yield (
            f"refine_stage.vary_stains = {refine.vary_stains} is not from 0 to below 1",
            "use 0.2 for stained tissue, or 0",
        )
    for name in ("vary_stains", "glass", "min_stain"):
        if getattr(refine, name) > 0 and target.channels != _COLOURS:
            yield (
                f"refine_stage.{name} is for colours, and target.channels is {target.channels}",
                "leave it out",
            )
    if refine.extra_noise < 0:
        yield (
            f"refine_stage.extra_noise = {refine.extra_noise} is below 0",
            "use 1.7 to double the noise, or 0",
        )
    if target.slab is not None and not 0.0 <= target.slab.smoothing <= 1.0:
        yield "target.slab.smoothing is not from 0 to 1", "use 0.1 diameters, say"
    for name in ("heads_average", "encoder_average"):
        if not 0.0 <= getattr(recipe.adapt_stage, name) <= 1.0:
            yield f"adapt_stage.{name} is not from 0 to 1", "use 0.99, say, or 1 to follow nothing"
    if not 0.0 <= recipe.adapt_stage.target_encoder_rate <= 1.0:
        yield "adapt_stage.target_encoder_rate is not from 0 to 1", "use 0.1, say, or 1 as in the paper"
    for name, score in (("refine_stage", refine.min_score), ("export", recipe.export.min_score)):
        if not 0.0 <= score <= 1.0:
            yield f"{name}.min_score = {score} is no score", "give a number from 0 to 1"


def _start_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield why the stages that need labelled images cannot run, or cannot be left out."""
    stages = {"source_stage": recipe.source_stage.steps, "adapt_stage": recipe.adapt_stage.steps}
    for name, steps in stages.items():
        if steps < 0:
            yield f"{name}.steps = {steps} is below 0", "give 0 to leave the stage out"
        elif steps > 0 and recipe.source is None:
            yield (
                f"{name} needs labelled images, and the recipe has no [source]",
                f"add [source] or {name}.steps = 0",
            )
    if recipe.refine_stage.source_every and recipe.source is None:
        yield (
            "refine_stage.source_every needs labelled images, and the recipe has no [source]",
            "leave it out",
        )
    if recipe.source_stage.steps > 0 and names_bundle(recipe.weights):
        yield (
            f"weights = {recipe.weights!r} has been through all stages",
            "give source_stage.steps = 0, or leave [source_stage] out",
        )
    if recipe.source_stage.steps == 0 and recipe.weights == "imagenet":
        yield (
            'weights = "imagenet" knows no objects yet',
            'give source_stage.steps above 0, or weights = "coco"',
        )


def _source_problems(source: Source) -> Iterator[tuple[str, str]]:
    yield from _intensity_problems("source.intensity", source.intensity)
    if source.annotations is None and source.labels is None:
        yield "lacks the key source.annotations or source.labels", "add one of them"
    if source.annotations is not None and source.labels is not None:
        yield "source.annotations and source.labels are both given", "remove one of them"
    if source.labels is None and source.intensity.kind != "full_range":
        yield "source.intensity is for images with label maps", "remove it, or give source.labels"
    if not 0.0 < source.diameter_px[0] <= source.diameter_px[1] < math.inf:
        yield f"source.diameter_px = {source.diameter_px} is no range", "give two numbers above 0, in order"
    for name in ("scene_fraction", "grey_fraction", "synthetic_fraction"):
        if not 0.0 <= getattr(source, name) <= 1.0:
            yield f"source.{name} = {getattr(source, name)} is no share", "give a number from 0 to 1"


def _target_problems(target: Target) -> Iterator[tuple[str, str]]:
    if not 1 <= target.channels <= 4:
        yield "target.channels is not from 1 to 4", "use 1 (grey), 3 (colour), or 2 or 4 (separate channels)"
    yield from _intensity_problems("target.intensity", target.intensity)
    if not target.jitter >= 1.0:
        yield f"target.jitter = {target.jitter:g} is below 1", "use 1.4, say, or 1 for no jitter"


def _tile_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield why the tiles of a run would not serve."""
    nominal, tile_px = recipe.target.nominal_diameter_px, recipe.export.tile_px
    if recipe.preset not in PRESETS or not 0 < nominal < math.inf:
        return
    stride = max(PRESETS[recipe.preset].strides_px)
    least = 2 * halo_for(nominal, stride) + stride
    if tile_px % stride or tile_px < least:
        yield (
            f"export.tile_px = {tile_px} does not serve objects of {nominal:g} px",
            f"give a multiple of {stride} from {stride * math.ceil(least / stride)} on",
        )


def _intensity_problems(key: str, rule: IntensityRule) -> Iterator[tuple[str, str]]:
    if rule.kind == "percentile" and not 0.0 <= rule.low < rule.high <= 100.0:
        yield (
            f"{key}: percentiles {rule.low:g} and {rule.high:g} are not in order",
            "use low = 0.5 and high = 99.5, say",
        )
    if rule.kind == "range" and not (math.isfinite(rule.high - rule.low) and rule.low < rule.high):
        yield (
            f"{key}: the range from {rule.low:g} to {rule.high:g} is empty",
            "give the raw values that become black (low) and white (high)",
        )
