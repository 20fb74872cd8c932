"""The result type: what was found on an image, in pixels of its level 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError

__all__ = ["Instances"]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Instances:
    """N objects of one image; compared by identity.

    Coordinates are level-0 pixels, x to the right and y down; the pixel in column i covers
    `[i, i + 1)`. Mask n is a boolean crop whose first pixel lies at `origins[n]` (x, y). Boxes are those that
    the network saw; masks and outlines may reach a little less far, or further.
    """

    shape: tuple[int, int]  # (H, W) of the image at level 0
    boxes: NDArray[np.float32]  # (N, 4) x0 y0 x1 y1
    scores: NDArray[np.float32]  # (N,)
    origins: NDArray[np.int64]  # (N, 2) x y of each mask's first pixel
    masks: tuple[NDArray[np.bool_], ...]  # N crops (h, w)
    outlines: tuple[NDArray[np.float64], ...]  # N closed rings (K, 2) x y, first point repeated
    truncated: NDArray[np.bool_]  # (N,) the object goes on where the tile ended
    is_saturated: bool = False  # as many objects as the model can report on a tile: some may be missing

    def __post_init__(self) -> None:
        n = len(self.scores)
        lengths = (
            len(self.boxes),
            len(self.origins),
            len(self.masks),
            len(self.outlines),
            len(self.truncated),
        )
        if any(length != n for length in lengths):
            raise ShapeError(f"fields of Instances differ in length: scores {n}, others {lengths}")
        if (self.origins < 0).any() or (self.ends > self.shape[::-1]).any():
            raise ShapeError(f"an object lies beyond the image of {self.shape[1]} x {self.shape[0]} px")

    @property
    def ends(self) -> NDArray[np.int64]:
        """Return (N, 2) x y of the first pixel beyond each mask's crop."""
        sizes = np.array([mask.shape[::-1] for mask in self.masks], np.int64).reshape(-1, 2)
        return self.origins + sizes

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"<Instances: {len(self)} on {self.shape[1]} x {self.shape[0]} px>"

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Instances:
        """Return no objects on an image of `shape` (H, W)."""
        return cls(
            shape=shape,
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            origins=np.zeros((0, 2), np.int64),
            masks=(),
            outlines=(),
            truncated=np.zeros(0, np.bool_),
        )

    @classmethod
    def concatenate(cls, shape: tuple[int, int], parts: Sequence[Instances]) -> Instances:
        """Return the objects of `parts` one after another, as objects of an image of `shape`."""
        if not parts:
            return cls.empty(shape)
        return cls(
            shape=shape,
            boxes=np.concatenate([part.boxes for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            origins=np.concatenate([part.origins for part in parts]),
            masks=tuple(mask for part in parts for mask in part.masks),
            outlines=tuple(ring for part in parts for ring in part.outlines),
            truncated=np.concatenate([part.truncated for part in parts]),
            is_saturated=any(part.is_saturated for part in parts),
        )

    def select(self, keep: NDArray[Any] | Sequence[bool] | Sequence[int] | slice) -> Instances:
        """Return the objects that `keep` names: booleans (N,), indices or a slice.

        Raises:
            ShapeError: a mask of another length, or what is neither.
        """
        chosen = np.arange(len(self))[keep] if isinstance(keep, slice) else np.asarray(keep)
        if chosen.dtype == np.bool_ and chosen.shape == (len(self),):
            rows = np.flatnonzero(chosen)
        elif chosen.ndim == 1 and (chosen.dtype.kind in "iu" or not chosen.size):
            rows = chosen.astype(np.int64)
        else:
            raise ShapeError(f"{chosen.dtype} of shape {chosen.shape} chooses none of {len(self)} objects")
        return Instances(
            shape=self.shape,
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            origins=self.origins[rows],
            masks=tuple(self.masks[row] for row in rows),
            outlines=tuple(self.outlines[row] for row in rows),
            truncated=self.truncated[rows],
            is_saturated=self.is_saturated,
        )

    def labels(self) -> NDArray[np.int32]:
        """Return the (H, W) label image: 0 background, n + 1 for object n.

        Where two objects overlap, the higher score wins, and of equal ones the earlier object.
        """
        image = np.zeros(self.shape, np.int32)
        for row in np.lexsort((-np.arange(len(self)), self.scores)):  # ascending: the best is drawn last
            x, y = self.origins[row]
            mask = self.masks[row]
            image[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = row + 1
        return image

    def polygons(self) -> NDArray[np.object_]:
        """Return the outlines as an array of N shapely polygons."""
        if not len(self):
            return np.zeros(0, np.object_)
        owner = np.repeat(np.arange(len(self)), [len(ring) for ring in self.outlines])
        rings = shapely.linearrings(np.concatenate(self.outlines), indices=owner)
        polygons: Any = shapely.polygons(rings)
        return np.asarray(polygons, np.object_)
