"""Pseudo-labels: what the model finds on the clean target images, as label pictures to learn from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from darcnn.runtime.boxes import non_maximum_suppression
from darcnn.runtime.errors import InputError
from darcnn.runtime.instances import Instances
from darcnn.runtime.masks import label_instances
from darcnn.runtime.placement import is_small_enough
from darcnn.runtime.sampling import spread_evenly
from darcnn.runtime.segmenter import Segmenter
from darcnn.training.adapt.fit_masks import contrast_of, fit_masks, stain_of
from darcnn.training.config import Recipe, RefineStage, relevant_part
from darcnn.training.data.target import TargetImage, TargetImages
from darcnn.training.engine import make_segmenter, tile_for_images
from darcnn.training.model.network import Darcnn
from darcnn.training.writing import disk_errors, new_file

__all__ = [
    "drop_unstained",
    "keep_one_polarity",
    "label_images",
    "merge_scales",
    "read_labels",
    "share_of_bright",
    "show_dark_objects",
]

_DOUBTFUL = "doubtful"  # folder of findings that are neither labels nor background
_FAINT = 0.25  # a finding with less than this share of its image's median contrast is dropped
_SCORE_BINS = 20  # of the histogram that is kept
_IMAGES = 16  # looked at to tell dark objects from bright ones
_SAME_IOU = 0.3  # two findings whose boxes overlap more are one object, seen at two scales


def label_images(
    network: Darcnn,
    recipe: Recipe,
    targets: TargetImages,
    folder: Path,
    *,
    resume: bool,
    keeps_doubt: bool = True,
) -> None:
    """Write one 16-bit label picture for each image on which the target branch finds something.

    DARCNN, section 3.3: predictions of the stage-1 model on the clean image whose final score is above
    z become labels. Deviation: images without one are left out rather than taught as empty, and
    masks may be fitted to the image, and weaker findings may be kept apart as doubtful (not in the last
    round: `keeps_doubt`; those that hold little stain in each), and what is far too large left out.
    """
    stage = recipe.refine_stage
    finished = folder / "complete.json"
    depends_on = repr(relevant_part(recipe, "refine"))
    if resume and finished.is_file() and json.loads(finished.read_text())["recipe"] == depends_on:
        return
    shutil.rmtree(folder, ignore_errors=True)  # labels of an earlier try would be learned from
    with disk_errors(folder):
        folder.mkdir(parents=True)
    as_they_are = recipe.target.with_intensity_done()
    least = stage.doubt_score if keeps_doubt and stage.doubt_score is not None else stage.min_score
    with make_segmenter(
        network,
        as_they_are,
        min_score=least,
        tile_px=tile_for_images(recipe.export),
        max_diameters=stage.max_diameters,
    ) as segmenter:
        found = [
            _find(segmenter, image, recipe.target.nominal_diameter_px, stage)
            for image in tqdm(targets.images, desc="pseudo-labels", unit="image")
        ]
    images = [image.pixels for image in targets.images]
    if stage.polarity != "any":
        found = keep_one_polarity(images, found, stage.polarity)
    is_pale = [np.zeros(len(instances), bool) for instances in found]
    if stage.min_stain > 0:
        found, is_pale = drop_unstained(images, found, stage.min_stain)
    sure = [(one.scores >= stage.min_score) & ~pale for one, pale in zip(found, is_pale, strict=True)]
    n_objects = sum(int(is_sure.sum()) for is_sure in sure)
    if n_objects == 0:
        raise InputError(
            "the model found no object on any target image",
            where=folder,
            fix="lower refine_stage.min_score, correct target.sets.diameter_px, or train the source longer",
        )
    for image, instances, is_sure in zip(targets.images, found, sure, strict=True):
        if is_sure.any():
            labels = fit_masks(image.pixels, instances) if stage.fit_masks else instances.labels()
            taught = np.isin(labels, 1 + np.flatnonzero(is_sure))
            _write(labels * taught, folder / f"{image.name}.png")
            if not is_sure.all():
                (folder / _DOUBTFUL).mkdir(exist_ok=True)
                _write(labels * ~taught, folder / _DOUBTFUL / f"{image.name}.png")
    scores = np.concatenate([instances.scores for instances in found])
    histogram, _ = np.histogram(scores, bins=_SCORE_BINS, range=(0.0, 1.0))
    summary = {"objects": n_objects, "scores": histogram.tolist(), "recipe": depends_on}
    with new_file(finished) as temporary:
        temporary.write_text(json.dumps(summary), encoding="utf-8")


def keep_one_polarity(
    images: list[NDArray[np.uint8]],
    found: list[Instances],
    polarity: Literal["one", "bright", "dark"] = "one",
) -> list[Instances]:
    """Return the findings without those of the other polarity (of "one": the rarer) and the faintest.

    Not in the paper, which filters by mean intensity for one target (DARCNN, section 4). Objects of one
    target are all brighter or all darker than what surrounds them; which of the two is decided by the
    contrasts of all findings, weighted by score. What is left between dark nuclei looks like a bright
    object to a network that has seen both. What others surround on all sides is kept.
    """
    contrasts = [contrast_of(image, one) for image, one in zip(images, found, strict=True)]
    is_bright = share_of_bright(contrasts, found) >= 0.5 if polarity == "one" else polarity == "bright"
    sign = 1.0 if is_bright else -1.0
    kept = []
    for contrast, one in zip(contrasts, found, strict=True):
        right = sign * contrast
        kept.append(one.select(~(right <= _FAINT * _typical(right))))  # NaN: no ground to compare with
    return kept


def drop_unstained(
    images: list[NDArray[np.uint8]], found: list[Instances], share: float
) -> tuple[list[Instances], list[NDArray[np.bool_]]]:
    """Return the findings without those that hold no stain, and which of the others, (N,), hold little.

    Not in the paper. Fibres, folds and gaps of tissue have outlines as nuclei have, but not their colour. A
    finding has little stain where it has less than `share` of the median of its image's findings, and none
    where it has less than half of that.
    """
    kept, pale = [], []
    for image, one in zip(images, found, strict=True):
        stain = stain_of(image, one)
        typical = _typical(stain)
        has_any = ~(stain <= 0.5 * share * typical)  # NaN: no ground to compare with
        kept.append(one.select(has_any))
        pale.append(stain[has_any] < share * typical)
    return kept, pale


def _typical(contrasts: NDArray[np.float32]) -> float:
    """Return the median of the contrasts above 0, and 0 where there is none."""
    above = contrasts[contrasts > 0]
    return float(np.median(above)) if len(above) else 0.0


def share_of_bright(contrasts: list[NDArray[np.float32]], found: list[Instances]) -> float:
    """Return which share of the findings, weighted by score, is brighter than its surroundings, 0 to 1.

    Without findings it is one half.
    """
    bright = sum(float(((c > 0) * one.scores).sum()) for c, one in zip(contrasts, found, strict=True))
    dark = sum(float(((c < 0) * one.scores).sum()) for c, one in zip(contrasts, found, strict=True))
    return bright / (bright + dark) if bright + dark > 0 else 0.5


def show_dark_objects(images: Sequence[TargetImage], labels: Mapping[str, NDArray[np.int32]]) -> bool:
    """Tell whether most labelled objects are darker than their surroundings, on up to 16 images.

    Args:
        images: the targets.
        labels: of those that have any, (H, W) by name; what is not above 0 is no object.
    """
    shown = spread_evenly([image for image in images if image.name in labels], _IMAGES)
    found = [label_instances(np.maximum(labels[image.name], 0)) for image in shown]
    contrasts = [contrast_of(image.pixels, one) for image, one in zip(shown, found, strict=True)]
    return share_of_bright(contrasts, found) < 0.5


def read_labels(folder: Path) -> dict[str, NDArray[np.int32]]:
    """Return the pseudo-labels of `folder`, (H, W) int32 by image name; negative numbers are doubtful."""
    labels = {}
    for path in sorted(folder.glob("*.png")):
        labels[path.stem] = _read(path)
        if (doubtful := folder / _DOUBTFUL / path.name).is_file():
            labels[path.stem] -= _read(doubtful)
    return labels


def _read(path: Path) -> NDArray[np.int32]:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.int32)


def merge_scales(parts: list[Instances]) -> Instances:
    """Return the findings of several scales as one: of overlapping ones the better score stays."""
    joint = Instances.concatenate(parts[0].shape, parts)
    return joint.select(non_maximum_suppression(joint.boxes, joint.scores, _SAME_IOU))


def _find(
    segmenter: Segmenter, image: TargetImage, nominal_diameter_px: float, stage: RefineStage
) -> Instances:
    diameter_px = nominal_diameter_px / image.scale
    found = [segmenter(image.pixels, diameter_px=diameter_px / scale) for scale in stage.scales]
    instances = merge_scales(found) if len(found) > 1 else found[0]
    if stage.max_diameters is not None:  # at a smaller scale the segmenter lets larger ones pass
        instances = instances.select(is_small_enough(instances.boxes, stage.max_diameters * diameter_px))
    best = np.argsort(-instances.scores, kind="stable")[: stage.max_objects]
    return instances.select(best)


def _write(labels: NDArray[np.int32], path: Path) -> None:
    with new_file(path) as temporary:
        Image.fromarray(labels.astype(np.uint16)).save(temporary, format="PNG")
