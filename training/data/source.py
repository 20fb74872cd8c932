"""The labelled source: COCO photographs, every class collapsed into one, cropped and scaled to order."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from darcnn.runtime.errors import InputError
from darcnn.training.config import Source

__all__ = ["Cutout", "LabelledTile", "PhotographSource"]

Picture = NDArray[np.uint8]  # (H, W, 3)

_OUTSIDE = 114  # grey level beyond a photograph that is smaller than its crop
_MIN_DIAMETER_PX = 5.0  # what is smaller after scaling is dropped: no one could outline it
_MIN_COVER = 0.8  # a photograph is at least this share of the tile, its shorter side against the tile's
_MIN_VISIBLE = 0.4  # an object of which the crop shows less is dropped
_MIN_CUTOUT_PX = 24.0  # cut-outs are at least this large, so that they are scaled down rather than up
_MIN_CUTOUT_FILL = 0.5  # and fill their box, as cells and particles do


@dataclass(frozen=True, slots=True)
class LabelledTile:
    """A training example: `image` (S, S, 3) uint8 and `masks` (N, S, S) bool, one an object."""

    image: Picture
    masks: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Cutout:
    """One object cut out of a photograph: `image` (h, w, 3) and its `mask` (h, w)."""

    image: Picture
    mask: NDArray[np.bool_]

    @property
    def diameter_px(self) -> float:
        """Diameter of the circle of the same area."""
        return 2.0 * math.sqrt(float(self.mask.sum()) / math.pi)


class PhotographSource:
    """COCO images and their instances; crowd regions and boxes without area are dropped."""

    def __init__(self, data: Path, source: Source) -> None:
        self.folder = data / source.images
        self.diameter_px = source.diameter_px
        path = data / source.annotations
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
                self.coco = COCO(str(path))
            self.images = [number for number in sorted(self.coco.imgs) if self._annotations(number)]
        except (OSError, ValueError, KeyError, AssertionError) as err:
            raise InputError(
                f"no COCO annotations ({err})", where=path, fix="give a COCO instances JSON"
            ) from err
        if not self.images:
            raise InputError(
                "no image with instances", where=path, fix="give a COCO instances JSON with masks"
            )

    @property
    def n_images(self) -> int:
        """Photographs with objects."""
        return len(self.images)

    def _annotations(self, number: int) -> list[dict[str, Any]]:
        return [a for a in self.coco.imgToAnns[number] if not a.get("iscrowd") and a["area"] >= 16.0]

    def _open(self, number: int) -> Image.Image:
        path = self.folder / self.coco.imgs[number]["file_name"]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except OSError as err:
            raise InputError(f"cannot be read ({err})", where=path, fix="restore the file") from err

    def _mask(self, annotation: dict[str, Any]) -> NDArray[np.bool_]:
        return np.asarray(self.coco.annToMask(annotation), dtype=bool)

    def tile(self, rng: np.random.Generator, tile_px: int) -> LabelledTile:
        """Return a crop in which one object, drawn at random, has a size drawn from the recipe's range."""
        number = self.images[rng.integers(len(self.images))]
        annotations = self._annotations(number)
        chosen = annotations[rng.integers(len(annotations))]
        wanted = math.exp(rng.uniform(*np.log(self.diameter_px)))
        photograph = self._open(number)
        smallest = _MIN_COVER * tile_px / min(photograph.size)  # else a stamp on an empty tile
        scale = float(np.clip(wanted / (2.0 * math.sqrt(chosen["area"] / math.pi)), smallest, 3.0))
        x, y, w, h = chosen["bbox"]
        side = tile_px / scale
        # the object lies anywhere in the crop; a photograph smaller than the crop is shown whole
        left = _window(x + w / 2, side, photograph.width, rng)
        top = _window(y + h / 2, side, photograph.height, rng)
        box = (left, top, left + side, top + side)
        return LabelledTile(
            image=_crop(photograph, box, tile_px, outside=_OUTSIDE),
            masks=self._crop_masks(annotations, box, tile_px, scale),
        )

    def _crop_masks(
        self,
        annotations: list[dict[str, Any]],
        box: tuple[float, float, float, float],
        tile_px: int,
        scale: float,
    ) -> NDArray[np.bool_]:
        masks = []
        for annotation in annotations:
            x, y, w, h = annotation["bbox"]
            if x + w <= box[0] or x >= box[2] or y + h <= box[1] or y >= box[3]:
                continue
            whole = Image.fromarray(self._mask(annotation).view(np.uint8) * 255)
            mask = _crop(whole, box, tile_px, outside=0) > 127
            area = float(mask.sum())
            if (
                area < math.pi * (_MIN_DIAMETER_PX / 2) ** 2
                or area < _MIN_VISIBLE * annotation["area"] * scale**2
            ):
                continue
            masks.append(mask)
        return np.stack(masks) if masks else np.zeros((0, tile_px, tile_px), bool)

    def cutouts(self) -> list[Cutout]:
        """Return the compact objects that lie whole inside their photograph."""
        found = []
        for number in self.images:
            photograph: NDArray[np.uint8] | None = None
            for annotation in self._annotations(number):
                x, y, w, h = annotation["bbox"]
                info = self.coco.imgs[number]
                inside = x > 1 and y > 1 and x + w < info["width"] - 1 and y + h < info["height"] - 1
                if not inside or annotation["area"] < max(_MIN_CUTOUT_PX**2, _MIN_CUTOUT_FILL * w * h):
                    continue
                if photograph is None:
                    photograph = np.asarray(self._open(number))
                x0, y0 = math.floor(x), math.floor(y)
                x1, y1 = math.ceil(x + w), math.ceil(y + h)
                mask = self._mask(annotation)[y0:y1, x0:x1]
                found.append(Cutout(photograph[y0:y1, x0:x1].copy(), mask.copy()))
        return found


def _window(centre: float, side: float, length: int, rng: np.random.Generator) -> float:
    """Return where a window of `side` begins so that it holds `centre` and stays inside if it can."""
    if side >= length:
        return (length - side) / 2.0
    begin = centre - side * rng.uniform(0.2, 0.8)
    return float(np.clip(begin, 0.0, length - side))


def _crop(
    image: Image.Image, box: tuple[float, float, float, float], tile_px: int, *, outside: int
) -> NDArray[np.uint8]:
    """Return `box` of the image at tile_px x tile_px; what lies outside has the grey level `outside`."""
    size = (math.ceil(box[2] - box[0]) + 2, math.ceil(box[3] - box[1]) + 2)
    left, top = math.floor(box[0]), math.floor(box[1])
    canvas = Image.new(image.mode, size, (outside,) * len(image.getbands()))
    canvas.paste(image, (-left, -top))
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return np.asarray(canvas.resize((tile_px, tile_px), Image.Resampling.BILINEAR, box=inner))
