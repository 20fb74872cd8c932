"""How good a model is on labelled images: the paper's figures, on the path that ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from darcnn.runtime.errors import InputError
from darcnn.runtime.instances import Instances
from darcnn.runtime.metrics import Scores, aggregate_scores, mean_scores, score_labels
from darcnn.runtime.readers import Reader, open_source
from darcnn.runtime.readers.image_places import stem_of
from darcnn.training.data.patterns import images_of_folder

__all__ = [
    "Evaluation",
    "as_rows",
    "by_image",
    "evaluate_folder",
    "kinds",
    "labelled_images",
    "read_label_image",
    "refuse_shared_labels",
]

_FIGURES = ("aji", "pixel_f1", "object_f1", "max_iou")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one folder: of each image, their mean (the paper's), and of all images pooled."""

    names: tuple[str, ...]
    scores: tuple[Scores, ...]

    @property
    def mean(self) -> Scores:
        """Mean over images."""
        return mean_scores(list(self.scores))

    @property
    def pooled(self) -> Scores:
        """All images counted as one."""
        return aggregate_scores(list(self.scores))

    def of_kind(self, prefix: str) -> Evaluation:
        """Return the figures of the images whose name begins with `prefix`."""
        rows = [i for i, name in enumerate(self.names) if name.startswith(prefix)]
        return Evaluation(tuple(self.names[i] for i in rows), tuple(self.scores[i] for i in rows))


def labelled_images(folder: Path) -> list[tuple[Path, Path]]:
    """Return the pairs of `folder`/images and `folder`/labels, same stem, labels as 16-bit PNG.

    Of several images in a file `plate.tif` the labels are `plate-0.png` and so on.

    Raises:
        InputError: there is none, an image has no labels, or two have the same.
    """
    place = folder / "images"
    pairs: list[tuple[Path, Path]] = []
    images = images_of_folder(place) if place.is_dir() else []
    refuse_shared_labels([stem_of(image) for image in images], images)
    for image in images:
        label = folder / "labels" / f"{stem_of(image)}.png"
        if not label.is_file():
            raise InputError(
                "no label image", where=label, fix="give each image a 16-bit PNG of the same name"
            )
        pairs.append((image, label))
    if not pairs:
        raise InputError("no images", where=place, fix="give a folder with images/ and labels/")
    return pairs


def refuse_shared_labels(names: Sequence[str], images: Sequence[Path]) -> None:
    """Raise where two images have one name, and would be compared with the same labels.

    Raises:
        InputError: two have.
    """
    first: dict[str, Path] = {}
    for name, image in zip(names, images, strict=True):
        if name in first:
            raise InputError(
                f"has the same name as {first[name].name}, and so the same labels",
                where=image,
                fix="rename one of them, and its labels",
            )
        first[name] = image


def evaluate_folder(folder: Path, segment: Callable[[Reader], Instances], *, every: int = 1) -> Evaluation:
    """Return the figures of `segment` on the labelled images of `folder`.

    Args:
        folder: holds images/ and labels/.
        segment: an open image -> its objects, level-0 pixels.
        every: take every n-th image.
    """
    names, scores = [], []
    for image, label in tqdm(labelled_images(folder)[::every], desc=folder.name, unit="image"):
        with open_source(image) as reader:
            prediction = segment(reader).labels()
        truth = read_label_image(label)
        if truth.shape != prediction.shape:
            raise InputError(
                f"is {truth.shape}, its image {prediction.shape}", where=label, fix="match the sizes"
            )
        names.append(stem_of(image))
        scores.append(score_labels(truth, prediction))
    return Evaluation(tuple(names), tuple(scores))


def kinds(names: tuple[str, ...]) -> Iterator[str]:
    """Yield the prefixes ("u2os_") by which the names of a mixed folder are grouped, if there are several."""
    prefixes = sorted({name.split("_")[0] + "_" for name in names if "_" in name})
    if len(prefixes) > 1:
        yield from prefixes


def as_rows(result: Evaluation) -> dict[str, dict[str, float]]:
    """Return figures by row: all images, each kind of a mixed folder, and all pooled."""
    rows = {f"all {len(result.names)}, mean": result.mean}
    for kind in kinds(result.names):
        part = result.of_kind(kind)
        rows[f"{len(part.names)} {kind}, mean"] = part.mean
    rows["all, pooled"] = result.pooled
    return {row: _row(scores) for row, scores in rows.items()}


def by_image(result: Evaluation) -> dict[str, dict[str, float]]:
    """Return the figures of each image."""
    return {name: _row(scores) for name, scores in zip(result.names, result.scores, strict=True)}


def _row(scores: Scores) -> dict[str, float]:
    return {figure: getattr(scores, figure) for figure in _FIGURES}


def read_label_image(path: Path) -> NDArray[np.int32]:
    """Return the (H, W) labels in `path`, 0 background.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture).astype(np.int32)
    except (OSError, SyntaxError) as err:  # SyntaxError: Pillow's word for a damaged PNG
        raise InputError(f"cannot be read ({err})", where=path, fix="give a 16-bit PNG") from err
