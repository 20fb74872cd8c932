"""The unlabelled target: images through the runtime's readers and intensity rule, cropped and scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darcnn.runtime.errors import InputError, ShapeError
from darcnn.runtime.geometry import Region
from darcnn.runtime.intensity import apply_window, measure_window, select_channels
from darcnn.runtime.readers import Reader, open_source
from darcnn.training.config import Target, TargetSet
from darcnn.training.data.source import LabelledTile

__all__ = ["TargetImage", "TargetImages"]

_CROP_PX = 512  # a slide larger than _WHOLE_PX is represented by crops of this side, level-0 pixels
_WHOLE_PX = 4_000_000
_CROPS = 12
_PLAIN = 6.0  # a crop whose grey levels deviate less than this is glass, not tissue


@dataclass(frozen=True, slots=True)
class TargetImage:
    """One unlabelled image: `pixels` (H, W, C) uint8 and `scale`, network pixels per image pixel."""

    name: str
    pixels: NDArray[np.uint8]
    scale: float


class TargetImages:
    """All unlabelled images of a recipe, in a fixed order."""

    def __init__(self, data: Path, target: Target, seed: int) -> None:
        self.target = target
        self.images: list[TargetImage] = []
        for group in target.sets:
            pattern = group.images.lstrip("/") or "nothing"
            paths = sorted(data.glob(pattern))
            if not paths:
                raise InputError(
                    "no target images",
                    where=data / group.images,
                    fix="correct target.sets.images in the recipe",
                )
            for path in paths:
                self.images.extend(self._load(path, group, seed))

    def _load(self, path: Path, group: TargetSet, seed: int) -> list[TargetImage]:
        with open_source(path) as reader:
            scale = self._scale(reader, group)
            regions = _regions(reader, np.random.default_rng(seed))
            raw = []
            for region in regions:
                pixels = reader.read(region, level=0)
                try:
                    chosen = select_channels(pixels, is_rgb=reader.info.is_rgb, channels=self.target.channels)
                except ShapeError as err:
                    raise InputError(str(err), where=path, fix="give images with one channel or RGB") from err
                raw.append(chosen)
        window = measure_window(self.target.intensity, np.concatenate([r.reshape(-1) for r in raw]))
        stem = path.stem
        while any(image.name == stem or image.name.startswith(stem + "_x") for image in self.images):
            stem += "_"  # the same name in another set
        names = [stem] if len(raw) == 1 else [f"{stem}_x{r.x0}_y{r.y0}" for r in regions]
        return [TargetImage(n, apply_window(r, window), scale) for n, r in zip(names, raw, strict=True)]

    def _scale(self, reader: Reader, group: TargetSet) -> float:
        if group.diameter_px is not None:
            return self.target.nominal_diameter_px / group.diameter_px
        if self.target.mpp is not None and reader.info.mpp is not None:
            return reader.info.mpp[0] / self.target.mpp
        return 1.0

    def tile(
        self,
        rng: np.random.Generator,
        tile_px: int,
        labels: dict[str, NDArray[np.int32]] | None = None,
    ) -> LabelledTile:
        """Return a random crop at the network's scale, jittered; with `labels` (pseudo-labels by image
        name), only labelled images are drawn and the masks are cropped along."""
        images = self.images if labels is None else [i for i in self.images if i.name in labels]
        image = images[rng.integers(len(images))]
        height, width = image.pixels.shape[:2]
        jitter = self.target.jitter
        scale = image.scale * math.exp(rng.uniform(-math.log(jitter), math.log(jitter)))
        scale = max(scale, tile_px / min(height, width))  # a small image is enlarged rather than padded
        side = min(tile_px / scale, width, height)  # the quotient may exceed them by rounding
        x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
        if labels is not None:
            x, y = _towards_object(labels[image.name], side, x, y, rng)
        box = (x, y, x + side, y + side)
        size = (tile_px, tile_px)
        pixels = image.pixels if image.pixels.shape[2] == 3 else np.repeat(image.pixels, 3, axis=2)
        crop = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))
        if labels is None:
            return LabelledTile(crop, np.zeros((0, *size), bool))
        drawn = Image.fromarray(labels[image.name]).resize(size, Image.Resampling.NEAREST, box=box)
        numbers = np.asarray(drawn)
        present, areas = np.unique(numbers[numbers > 0], return_counts=True)
        present = present[areas >= 12]
        return LabelledTile(crop, numbers[None] == present[:, None, None])


def _towards_object(
    labels: NDArray[np.int32], side: float, x: float, y: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the crop's corner, moved so that the crop holds a labelled pixel drawn at random."""
    height, width = labels.shape
    rows, columns = np.nonzero(labels)
    if len(rows) == 0:
        return x, y
    chosen = rng.integers(len(rows))
    x = float(np.clip(columns[chosen] - side * rng.uniform(0.1, 0.9), 0, width - side))
    y = float(np.clip(rows[chosen] - side * rng.uniform(0.1, 0.9), 0, height - side))
    return x, y


def _regions(reader: Reader, rng: np.random.Generator) -> list[Region]:
    """Return the whole image, or crops of a slide that is too large to hold."""
    width, height = reader.info.width_px0, reader.info.height_px0
    if width * height <= _WHOLE_PX:
        return [Region(0, 0, width, height)]
    found: list[Region] = []
    across, down = min(width, _CROP_PX), min(height, _CROP_PX)
    for _ in range(50 * _CROPS):
        x, y = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
        region = Region(x, y, x + across, y + down)
        apart = all(abs(x - r.x0) >= _CROP_PX or abs(y - r.y0) >= _CROP_PX for r in found)
        if apart and reader.read(region, level=0).mean(axis=2).std() > _PLAIN:
            found.append(region)
        if len(found) == _CROPS:
            break
    return found or [Region(0, 0, across, down)]
