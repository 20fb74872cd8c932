"""A labelled source of images with label maps, and the door to all labelled sources."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from darcnn.runtime.errors import InputError, ShapeError
from darcnn.runtime.intensity import Window, apply_window, measure_window, select_channels
from darcnn.runtime.readers import open_source
from darcnn.runtime.readers.image_places import split_image, stem_of
from darcnn.runtime.readers.open import SUFFIXES
from darcnn.training.config import Source
from darcnn.training.data.patterns import find_images, images_of_folder
from darcnn.training.data.source import (
    MAX_ENLARGEMENT,
    MIN_AREA_PX,
    LabelledObject,
    LabelledSource,
    PhotographSource,
)

__all__ = ["LabelMapSource", "open_labelled_source", "read_label_map"]

_GREY_MODES = {"1", "L", "I", "I;16", "I;16L", "I;16B"}  # Pillow's names of one channel of whole numbers


@dataclass(frozen=True, slots=True)
class _Labelled:
    """One image and its objects; `window` is what its intensity rule measured."""

    image: Path
    label_map: Path
    window: Window
    objects: list[LabelledObject]


def open_labelled_source(data: Path, source: Source, *, tile_px: int) -> LabelledSource:
    """Return the labelled images of a recipe, all of them checked, for tiles of `tile_px`.

    Raises:
        InputError: images or labels are missing, damaged, too small, or do not fit each other.
    """
    if source.labels is None:
        return PhotographSource(data, source)
    return LabelMapSource(data, source, min_side_px=math.ceil(tile_px / MAX_ENLARGEMENT))


class LabelMapSource(LabelledSource):
    """Images and label maps of the same names, all classes one; objects under 16 pixels are dropped."""

    def __init__(self, data: Path, source: Source, *, min_side_px: int = 1) -> None:
        super().__init__(source)
        self.intensity = source.intensity
        self.min_side_px = min_side_px
        labels = data / (source.labels or "")
        self._all = [
            self._examine(path, labels / f"{stem_of(path)}.png") for path in _image_paths(data, source.images)
        ]
        self.images = [number for number, one in enumerate(self._all) if one.objects]
        if not self.images:
            raise InputError("no object in any label map", where=labels, fix="give label maps with objects")

    def _examine(self, path: Path, label_map: Path) -> _Labelled:
        """Return the image and its objects; whatever is wrong with either is said before training begins."""
        raw = _read_raw(path)
        height, width = raw.shape[:2]
        if min(height, width) < self.min_side_px:
            raise InputError(
                f"is too small with {width} x {height} px for the recipe's tiles",
                where=path,
                fix=f"give images of at least {self.min_side_px} px a side, or lower tile_px",
            )
        labels = read_label_map(label_map)
        if labels.shape != (height, width):
            raise InputError(
                f"has {labels.shape[1]} x {labels.shape[0]} px, its image {path.name} {width} x {height}",
                where=label_map,
                fix="give label maps of the size of their images",
            )
        return _Labelled(path, label_map, measure_window(self.intensity, raw), _objects_of(labels))

    def _objects(self, number: int) -> list[LabelledObject]:
        return self._all[number].objects

    def _open(self, number: int) -> Image.Image:
        one = self._all[number]
        return Image.fromarray(apply_window(_read_raw(one.image), one.window))

    def _masks(self, number: int) -> Callable[[LabelledObject], NDArray[np.bool_]]:
        labels = read_label_map(self._all[number].label_map)
        return lambda one: np.asarray(labels == one.number)


def read_label_map(path: Path) -> NDArray[np.int32]:
    """Return the label map (H, W) in a grey PNG: 0 background, one number an object.

    Raises:
        InputError: it is missing, damaged, or has colours.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode in _GREY_MODES:
                return np.asarray(picture).astype(np.int32)
            mode = picture.mode
    except FileNotFoundError as err:
        raise InputError(
            "no such label map", where=path, fix="give each image a 16-bit PNG of the same name"
        ) from err
    except (OSError, SyntaxError) as err:
        raise InputError(f"cannot be read ({err})", where=path, fix="give a 16-bit grey PNG") from err
    raise InputError(f"is no label map but a picture of mode {mode}", where=path, fix="give a grey PNG")


def _image_paths(data: Path, images: str) -> list[Path]:
    folder = data / images
    found = images_of_folder(folder) if folder.is_dir() else find_images(data, images, key="source.images")
    paths = sorted(path for path in found if split_image(path)[0].suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError("no labelled images", where=folder, fix="correct source.images in the recipe")
    return paths


def _read_raw(path: Path) -> NDArray[Any]:
    """Return the image as (H, W, 3), in its own type."""
    with open_source(path) as reader:
        pixels = reader.read(reader.info.whole, level=0)
        try:
            return select_channels(pixels, is_rgb=reader.info.is_rgb, channels=3)
        except ShapeError as err:
            raise InputError(str(err), where=path, fix="give images with one channel or RGB") from err


def _objects_of(labels: NDArray[np.int32]) -> list[LabelledObject]:
    areas = np.bincount(labels.reshape(-1))
    found = []
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is not None and areas[number] >= MIN_AREA_PX:
            rows, columns = place
            found.append(
                LabelledObject(
                    number=number,
                    area_px=float(areas[number]),
                    x=float(columns.start),
                    y=float(rows.start),
                    width=float(columns.stop - columns.start),
                    height=float(rows.stop - rows.start),
                )
            )
    return found
