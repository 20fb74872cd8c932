"""How good is a model on images without labels? It must agree with itself, and tell objects from the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from darcnn.runtime.diameter import choose_diameter
from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.intensity import Window
from darcnn.runtime.metrics import score_labels
from darcnn.runtime.readers import Reader, open_source
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.find import find_diameter, plan_view, plane_reader
from darcnn.runtime.volumes.open import is_volume, open_volume
from darcnn.training import writing
from darcnn.training.data.patterns import images_of_folder

__all__ = ["Trust", "as_table", "judge_folder", "judge_image", "mean_trust", "separation_of", "write_csv"]

# Further looks see the image mirrored, turned and this much smaller or larger: nuclei that were taken for one
# fall apart when enlarged, texture that was taken for nuclei is lost when made smaller.
_OTHER_SCALES = (2.0**0.5, 2.0**-0.5)
_MAX_SIDE_PX = 1024  # network pixels a side: of a larger image the middle is looked at


@dataclass(frozen=True, slots=True)
class Trust:
    """Figures that need no truth, 0 to 1.

    `agreement`: AJI between what is found on an image and on twins of it, mirrored, turned and made smaller
    or larger; mean of both directions and both twins. A finding that hangs on such a thing is none.
    `separation`: how surely the brightness (or the colour that tells best) of a found pixel and of one
    that belongs to nothing differ, 2 AUC - 1. It falls with objects missed and with outlines that stray.
    """

    agreement: float
    separation: float
    n_objects: int

    @property
    def trust(self) -> float:
        """The geometric mean of both: the one figure that ranks models and scales."""
        return float(np.sqrt(self.agreement * self.separation))


def judge_folder(
    folder: Path,
    segmenter: Segmenter,
    *,
    mpp: float | None = None,
    diameter_px: float | Literal["auto"] | None = None,
    pixels: bool = False,
) -> dict[str, Trust]:
    """Return the figures of each image of `folder` (or of `folder`/images), by its place there.

    Of a volume the middle plane is judged, as the model sees it.

    Raises:
        InputError: there is no image, or one does not serve.
    """
    place = folder / "images" if (folder / "images").is_dir() else folder
    paths = images_of_folder(place) if place.is_dir() else []
    if not paths:
        raise InputError("no images", where=place, fix="give a folder with images")
    found = {}
    for path in tqdm(paths, desc=folder.name, unit="image"):
        name = path.relative_to(place).as_posix()
        if is_volume(path):
            if mpp is not None:
                raise UsageError(f"means nothing to {path}, a volume", where="--mpp", fix="pass --diameter")
            found[name] = _judge_volume(segmenter, path, diameter_px, pixels=pixels)
            continue
        with open_source(path) as reader:
            size = choose_diameter(segmenter, reader, diameter_px=diameter_px, mpp=mpp, pixels=pixels)
            plan = segmenter.plan(reader.info, mpp=mpp, diameter_px=size, pixels=pixels)
            nominal = segmenter.manifest.input.nominal_diameter_px
            found[name] = judge_image(segmenter, reader, diameter_px=nominal / plan.scale)
    return found


def _judge_volume(
    segmenter: Segmenter, path: Path, diameter_px: float | Literal["auto"] | None, *, pixels: bool
) -> Trust:
    with TemporaryDirectory() as scratch, open_volume(path, Path(scratch)) as volume:
        size = find_diameter(segmenter, volume, "z", diameter_px=diameter_px, pixels=pixels)
        view = plan_view(segmenter, volume, "z", diameter_px=size, pixels=pixels)
        nominal = segmenter.manifest.input.nominal_diameter_px
        with plane_reader(volume, "z", view.stack.plane(len(view.stack) // 2)) as reader:
            return judge_image(segmenter, reader, diameter_px=nominal / view.plan.scale, window=view.window)


def judge_image(
    segmenter: Segmenter, reader: Reader, *, diameter_px: float, window: Window | None = None
) -> Trust:
    """Return the figures of one image, whose objects are about `diameter_px` level-0 pixels wide.

    `window` holds the raw values that become black and white; None: those of the part that is looked at.
    """
    image = _middle(reader, diameter_px, segmenter.manifest.input.nominal_diameter_px)
    is_rgb = reader.info.is_rgb

    def labels_of(values: NDArray[Any], size: float) -> NDArray[np.int32]:
        with ArrayReader(values, is_rgb=is_rgb) as source:
            plan = segmenter.plan(source.info, diameter_px=size)
            return segmenter.segment(source, plan, window=window).labels()

    labels = labels_of(image, diameter_px)
    # axes swapped: mirrored at the diagonal, which is a quarter turn of a mirror image
    others = [labels_of(image.swapaxes(0, 1), diameter_px * scale).T for scale in _OTHER_SCALES]
    agreement = float(np.mean([_agreement(labels, other) for other in others]))
    return Trust(agreement, separation_of(image, labels > 0), int(np.count_nonzero(np.unique(labels))))


def _agreement(one: NDArray[np.int32], other: NDArray[np.int32]) -> float:
    if not one.any() or not other.any():
        return 0.0
    return (score_labels(one, other).aji + score_labels(other, one).aji) / 2.0


def mean_trust(figures: Sequence[Trust]) -> Trust:
    """Return the means over images; objects are added up."""
    return Trust(
        agreement=float(np.mean([one.agreement for one in figures])),
        separation=float(np.mean([one.separation for one in figures])),
        n_objects=sum(one.n_objects for one in figures),
    )


def as_table(figures: Mapping[str, Trust]) -> dict[str, dict[str, float]]:
    """Return the figures by row: the mean of all images, and each image."""
    rows = {f"all {len(figures)}, mean": mean_trust(list(figures.values())), **figures}
    return {
        row: {"trust": one.trust, "agreement": one.agreement, "separation": one.separation}
        for row, one in rows.items()
    }


def write_csv(figures: Mapping[str, Trust], path: Path) -> None:
    """Write one line an image.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = {
        name: {
            "trust": one.trust,
            "agreement": one.agreement,
            "separation": one.separation,
            "objects": one.n_objects,
        }
        for name, one in figures.items()
    }
    writing.write_csv(rows, path, of="image")


def separation_of(image: NDArray[Any], is_object: NDArray[np.bool_]) -> float:
    """Return |2 AUC - 1| of telling pixels inside from pixels outside by their value, 0 to 1.

    AUC is that of Mann and Whitney (1947): the chance that a pixel inside is brighter than one outside,
    ties half. Colours and channels are first joined as Fisher's discriminant joins them. Pixels without a
    value (NaN, of stitched images) take no part.

    Args:
        image: (H, W, C), any real type.
        is_object: (H, W).

    >>> image = np.array([[[1.0], [1.0], [5.0], [9.0]]])
    >>> separation_of(image, np.array([[False, False, True, True]]))
    1.0
    """
    known = np.isfinite(image).all(axis=2)
    inside, outside = (image[known & part].astype(np.float64) for part in (is_object, ~is_object))  # (N, C)
    if not len(inside) or not len(outside):
        return 0.0
    spread = sum(np.atleast_2d(np.cov(part.T, bias=True)) for part in (inside, outside))  # (C, C)
    spread = spread + 1e-6 * (1.0 + np.trace(spread)) * np.eye(image.shape[2])
    direction = np.linalg.solve(spread, inside.mean(axis=0) - outside.mean(axis=0))
    ours, theirs = inside @ direction, np.sort(outside @ direction)
    below = np.searchsorted(theirs, ours, "left") + np.searchsorted(theirs, ours, "right")
    return float(abs(below.mean() / len(theirs) - 1.0))


def _middle(reader: Reader, diameter_px: float, nominal_diameter_px: float) -> NDArray[Any]:
    """Return (h, w, C) level-0 pixels: the middle of the image, at most 1024 network pixels a side."""
    side = max(1, round(_MAX_SIDE_PX * diameter_px / nominal_diameter_px))
    width, height = reader.info.width_px0, reader.info.height_px0
    w, h = min(side, width), min(side, height)
    x0, y0 = (width - w) // 2, (height - h) // 2
    return reader.read(Region(x0, y0, x0 + w, y0 + h), level=0)
