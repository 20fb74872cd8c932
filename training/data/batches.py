"""Batches as a pure function of seed, stage and step, made one ahead in a thread."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darcnn.runtime.errors import InputError
from darcnn.training.data.augment import randomise_source
from darcnn.training.data.scenes import make_scene
from darcnn.training.data.source import Cutout, LabelledSource, LabelledTile
from darcnn.training.model.targets import Target

T = TypeVar("T")

_TRIES = 200  # of them some show an object, unless none can

__all__ = ["Batch", "BatchKey", "collate", "make_batch", "make_source_tile", "prefetch", "random_generator"]


@dataclass(frozen=True, slots=True)
class Batch:
    """`images` (B, 3, S, S) float32 in 0..255 and one target an image."""

    images: Tensor
    targets: list[Target]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[2], self.images.shape[3]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        targets = [{name: tensor.to(device) for name, tensor in target.items()} for target in self.targets]
        return Batch(self.images.to(device, non_blocking=True), targets)


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Which batch of a run: what its random choices are a function of."""

    seed: int
    stage: str
    step: int


def random_generator(seed: int, stage: str, step: int, index: int) -> np.random.Generator:
    """Return the generator of one image: the same whatever ran before, so a resumed run goes on exactly."""
    return np.random.default_rng((seed, zlib.crc32(stage.encode()), step, index))


def make_batch(draw: Callable[[np.random.Generator], LabelledTile], key: BatchKey, indices: range) -> Batch:
    """Return the images `indices` of the batch `key`, each drawn with a generator of its own."""
    generators = [random_generator(key.seed, key.stage, key.step, index) for index in indices]
    tiles = [draw(generator) for generator in generators]
    return collate(tiles, [int(generator.integers(2**31)) for generator in generators])


def make_source_tile(
    source: LabelledSource,
    cutouts: list[Cutout],
    rng: np.random.Generator,
    tile_px: int,
    *,
    scene_fraction: float,
    grey_fraction: float,
) -> LabelledTile:
    """Return a labelled image's crop or a scene, randomised; one with at least one object.

    Raises:
        InputError: crops turn out empty again and again.
    """
    for _ in range(_TRIES):
        if rng.random() < scene_fraction:
            tile = make_scene(cutouts, rng, tile_px, source.diameter_px)
        else:
            tile = source.tile(rng, tile_px)
        if len(tile.masks):
            return randomise_source(tile, rng, grey_fraction, source.invert)
    raise InputError(
        f"no object in {_TRIES} crops of the labelled images",
        where="source.diameter_px",
        fix="raise it in the recipe: objects that come to less than 5 px are dropped",
    )


def collate(tiles: Sequence[LabelledTile], seeds: Sequence[int]) -> Batch:
    """Return the tiles as tensors; boxes enclose the masks, x1 and y1 exclusive.

    `seeds`, one an image, decide which anchors and regions the losses draw of it.
    """
    images = torch.from_numpy(np.stack([tile.image for tile in tiles])).permute(0, 3, 1, 2).float()
    # channels last in memory: depthwise convolutions run backward two to four times as fast on a CPU
    return Batch(
        images.contiguous(memory_format=torch.channels_last),
        [_target(tile, seed) for tile, seed in zip(tiles, seeds, strict=True)],
    )


def _target(tile: LabelledTile, seed: int) -> Target:
    return {
        "boxes": torch.from_numpy(_boxes_of(tile.masks)),
        "labels": torch.ones(len(tile.masks), dtype=torch.int64),
        "masks": torch.from_numpy(tile.masks.astype(np.uint8)),
        "doubtful": torch.from_numpy(_boxes_of(tile.masks[:0] if tile.doubtful is None else tile.doubtful)),
        "seed": torch.tensor(seed, dtype=torch.int64),
    }


def _boxes_of(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the boxes (N, 4) that enclose `masks` (N, S, S)."""
    rows = np.asarray(masks.any(axis=2))  # (N, S)
    columns = np.asarray(masks.any(axis=1))
    size = masks.shape[1]
    boxes = np.stack(
        [
            columns.argmax(axis=1),
            rows.argmax(axis=1),
            size - columns[:, ::-1].argmax(axis=1),
            size - rows[:, ::-1].argmax(axis=1),
        ],
        axis=1,
    ).astype(np.float32)
    return boxes.reshape(-1, 4)


def prefetch(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """Yield `make(step)` for each step, the next one being made while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting = None
        for step in steps:
            following = pool.submit(make, step)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
