"""Labelled sources: what all share, and photographs with COCO annotations, every class collapsed into one."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from darcnn.runtime.errors import InputError
from darcnn.runtime.sampling import spread_evenly
from darcnn.training.config import Source

__all__ = ["Cutout", "LabelledObject", "LabelledSource", "LabelledTile", "PhotographSource"]

Picture = NDArray[np.uint8]  # (H, W, 3)
Mask = NDArray[np.bool_]  # (H, W)

MIN_AREA_PX = 16.0  # smaller objects are left out
MAX_ENLARGEMENT = 3.0  # beyond it an image is nothing but blur
_OUTSIDE = 114  # grey level beyond a photograph that is smaller than its crop
_MIN_DIAMETER_PX = 5.0  # what is smaller after scaling is dropped: no one could outline it
_MIN_VISIBLE = 0.4  # an object of which the crop shows less is dropped
_ROUNDING_PX = 1e-6
_SLACK_PX = 1.0  # by which annotations may leave their image: rounding
_MIN_CUTOUT_PX = 24.0  # cut-outs are at least this large, so that they are scaled down rather than up
_MIN_CUTOUT_FILL = 0.5  # and fill their box, as cells and particles do
_MAX_CUTOUTS = 20_000  # are held in memory, some 0.3 GB of photographs


@dataclass(frozen=True, slots=True)
class LabelledTile:
    """A training example: `image` (S, S, 3) uint8 and `masks` (N, S, S) bool, one an object.

    `doubtful` (K, S, S) bool are what may be objects: neither they nor their background is taught.
    """

    image: Picture
    masks: NDArray[np.bool_]
    doubtful: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Cutout:
    """One object cut out of a photograph: `image` (h, w, 3) and its `mask` (h, w)."""

    image: Picture
    mask: NDArray[np.bool_]

    @property
    def diameter_px(self) -> float:
        """Diameter of the circle of the same area."""
        return 2.0 * math.sqrt(float(self.mask.sum()) / math.pi)


@dataclass(frozen=True, slots=True)
class LabelledObject:
    """One object of an image: its `number` there, its area and the box that encloses it, pixels."""

    number: int
    area_px: float
    x: float
    y: float
    width: float
    height: float

    @property
    def diameter_px(self) -> float:
        """Diameter of the circle of the same area."""
        return 2.0 * math.sqrt(self.area_px / math.pi)


class LabelledSource(ABC):
    """Images whose objects are outlined, cropped and scaled to order.

    `images` numbers those that show an object; `invert` says whether bright becomes dark (None: at random).
    """

    min_cover = 1.0  # an image is at least this share of the tile, its shorter side against the tile's

    def __init__(self, source: Source) -> None:
        self.diameter_px = source.diameter_px
        self.invert = source.invert
        self.images: list[int] = []

    @abstractmethod
    def _objects(self, number: int) -> list[LabelledObject]:
        """Return the objects of image `number`, those of at least MIN_AREA_PX."""

    @abstractmethod
    def _open(self, number: int) -> Image.Image:
        """Return image `number` in RGB."""

    @abstractmethod
    def _masks(self, number: int) -> Callable[[LabelledObject], Mask]:
        """Return what gives the mask (H, W) of each object of image `number`."""

    def tile(self, rng: np.random.Generator, tile_px: int) -> LabelledTile:
        """Return a crop in which one object, drawn at random, has a size drawn from the recipe's range."""
        number = self.images[rng.integers(len(self.images))]
        objects = self._objects(number)
        chosen = objects[rng.integers(len(objects))]
        wanted = math.exp(rng.uniform(*np.log(self.diameter_px)))
        picture = self._open(number)
        smallest = self.min_cover * tile_px / min(picture.size)  # else a stamp on an empty tile
        scale = float(np.clip(wanted / chosen.diameter_px, smallest, MAX_ENLARGEMENT))
        side = tile_px / scale
        # the object lies anywhere in the crop; an image smaller than the crop is shown whole
        left = _window(chosen.x + chosen.width / 2, side, picture.width, rng)
        top = _window(chosen.y + chosen.height / 2, side, picture.height, rng)
        box = (left, top, left + side, top + side)
        return LabelledTile(
            image=_crop(picture, box, tile_px, outside=_OUTSIDE),
            masks=_crop_masks(objects, self._masks(number), box, tile_px),
        )

    def cutouts(self) -> list[Cutout]:
        """Return the compact objects that lie whole inside their image; of a large set some of each part."""
        compact = [
            (number, one)
            for number in self.images
            for one in self._objects(number)
            if one.area_px >= max(_MIN_CUTOUT_PX**2, _MIN_CUTOUT_FILL * one.width * one.height)
        ]
        found = []
        for number, group in itertools.groupby(spread_evenly(compact, _MAX_CUTOUTS), key=lambda one: one[0]):
            picture, mask_of = np.asarray(self._open(number)), self._masks(number)
            for _, one in group:
                height, width = picture.shape[:2]
                x1, y1 = one.x + one.width, one.y + one.height
                if one.x > 1 and one.y > 1 and x1 < width - 1 and y1 < height - 1:
                    rows = slice(math.floor(one.y), math.ceil(y1))
                    columns = slice(math.floor(one.x), math.ceil(x1))
                    found.append(Cutout(picture[rows, columns].copy(), mask_of(one)[rows, columns].copy()))
        return found


class PhotographSource(LabelledSource):
    """COCO images and their instances; crowd regions and boxes without area are dropped."""

    min_cover = 0.8

    def __init__(self, data: Path, source: Source) -> None:
        super().__init__(source)
        self.folder = data / source.images
        path = data / (source.annotations or "")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
                self.coco = COCO(str(path))
            self.images = [number for number in sorted(self.coco.imgs) if self._objects(number)]
            misfits = [text for number in self.images for text in self._misfits(number)]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as err:
            raise InputError(
                f"no COCO annotations ({err})", where=path, fix="give a COCO instances JSON"
            ) from err
        if not self.images:
            raise InputError(
                "no image with instances", where=path, fix="give a COCO instances JSON with masks"
            )
        if misfits:
            raise InputError(misfits[0], where=path, fix="correct or remove it")
        for number in self.images:
            self._check_size(number)

    def _objects(self, number: int) -> list[LabelledObject]:
        return [
            LabelledObject(index, float(a["area"]), *(float(value) for value in a["bbox"]))
            for index, a in enumerate(self.coco.imgToAnns[number])
            if not a.get("iscrowd") and a["area"] >= MIN_AREA_PX
        ]

    def _misfits(self, number: int) -> list[str]:
        """Return what is wrong with the annotations of image `number`, one text each."""
        image = self.coco.imgs[number]
        width, height, name = image["width"], image["height"], image["file_name"]
        found = []
        for one in self._objects(number):
            annotation = self.coco.imgToAnns[number][one.number]
            outlines: Any = annotation["segmentation"]
            right, bottom = one.x + one.width, one.y + one.height
            if isinstance(outlines, dict):
                fits = list(outlines["size"]) == [height, width]
            else:
                fits = len(outlines) > 0
                right = max(right, *(max(outline[0::2]) for outline in outlines)) if fits else right
                bottom = max(bottom, *(max(outline[1::2]) for outline in outlines)) if fits else bottom
            if not fits or min(one.x, one.y) < -_SLACK_PX or max(right - width, bottom - height) > _SLACK_PX:
                found.append(
                    f"annotation {annotation.get('id')} does not fit its image {name}, {width} x {height} px"
                )
        return found

    def _check_size(self, number: int) -> None:
        image = self.coco.imgs[number]
        with self._reading(number) as picture:
            if picture.mode[0] in "IF":  # Pillow would clip them to white
                raise InputError(
                    "has more than 8 bits, and COCO annotations are for photographs",
                    where=self.folder / image["file_name"],
                    fix="save the images with 8 bits, or give label maps: source.labels and source.intensity",
                )
            if picture.size != (image["width"], image["height"]):
                raise InputError(
                    f"is {picture.width} x {picture.height} px, its annotations are for "
                    f"{image['width']} x {image['height']} px",
                    where=self.folder / image["file_name"],
                    fix="give the images that were annotated",
                )

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[Image.Image]:
        path = self.folder / self.coco.imgs[number]["file_name"]
        try:
            with Image.open(path) as picture:
                yield picture
        except OSError as err:
            raise InputError(f"cannot be read ({err})", where=path, fix="restore the file") from err

    def _open(self, number: int) -> Image.Image:
        with self._reading(number) as picture:
            return picture.convert("RGB")

    def _masks(self, number: int) -> Callable[[LabelledObject], Mask]:
        annotations = self.coco.imgToAnns[number]
        return lambda one: np.asarray(self.coco.annToMask(annotations[one.number]), dtype=bool)


def _crop_masks(
    objects: list[LabelledObject],
    mask_of: Callable[[LabelledObject], Mask],
    box: tuple[float, float, float, float],
    tile_px: int,
) -> NDArray[np.bool_]:
    """Return (N, S, S): the objects of which `box` (x0 y0 x1 y1) shows enough."""
    scale = tile_px / (box[2] - box[0])
    masks = []
    for one in objects:
        beside = one.x + one.width <= box[0] or one.x >= box[2]
        if beside or one.y + one.height <= box[1] or one.y >= box[3]:
            continue
        whole = Image.fromarray(mask_of(one).view(np.uint8) * 255)
        mask = _crop(whole, box, tile_px, outside=0) > 127
        area = float(mask.sum())
        if area >= math.pi * (_MIN_DIAMETER_PX / 2) ** 2 and area >= _MIN_VISIBLE * one.area_px * scale**2:
            masks.append(mask)
    return np.stack(masks) if masks else np.zeros((0, tile_px, tile_px), bool)


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
    x0, y0, x1, y1 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], image.width), min(box[3], image.height)
    if max(x0 - box[0], y0 - box[1], box[2] - x1, box[3] - y1) < _ROUNDING_PX:  # else grey would seep in
        whole = (x0, y0, x1, y1)
        return np.asarray(image.resize((tile_px, tile_px), Image.Resampling.BILINEAR, box=whole))
    size = (math.ceil(box[2] - box[0]) + 2, math.ceil(box[3] - box[1]) + 2)
    left, top = math.floor(box[0]), math.floor(box[1])
    canvas = Image.new(image.mode, size, (outside,) * len(image.getbands()))
    canvas.paste(image, (-left, -top))
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return np.asarray(canvas.resize((tile_px, tile_px), Image.Resampling.BILINEAR, box=inner))
