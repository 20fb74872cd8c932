"""The waist: pixels in, instances out; no files and no globals."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.ahead import map_ahead
from darcnn.runtime.boxes import non_maximum_suppression
from darcnn.runtime.closing import Closing
from darcnn.runtime.diameter import choose_diameter
from darcnn.runtime.engines.protocol import Detections, Engine, UploadsTiles
from darcnn.runtime.errors import ShapeError
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import Window
from darcnn.runtime.manifest import Manifest
from darcnn.runtime.placement import is_cut, is_small_enough, lies_inside, place, to_slide
from darcnn.runtime.planning import SlidePlan, plan_slide
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.protocol import Reader, SlideInfo
from darcnn.runtime.sampling import SampledTile, TileSampler, measure_slide, read_ahead
from darcnn.runtime.seams import join_tiles
from darcnn.runtime.second_look import look_at_quarters, look_wider
from darcnn.runtime.tiling import SEAM_PX, Tile, owns

if TYPE_CHECKING:
    from darcnn.runtime.pipeline import Progress, RunOptions, RunSummary

__all__ = ["Segmenter", "SlidePlan"]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an engine call saw on its tiles and they report: M objects, in pixels of the tiles."""

    boxes: NDArray[np.float32]  # (M, 4)
    scores: NDArray[np.float32]  # (M,)
    masks: NDArray[np.float32]  # (M, m, m)
    tile_index: NDArray[np.int64]  # (M,) number of the tile in its batch
    is_full: NDArray[np.bool_]  # (B,) as many objects as the model can report, or it did not converge


class Segmenter(Closing):
    """Finds the objects of images and slides with one engine; one thread at a time.

    Owns the engine: closing the segmenter closes it.
    """

    def __init__(self, engine: Engine, manifest: Manifest, *, min_score: float | None = None) -> None:
        """Join an engine and the manifest of its model; `min_score` None takes the manifest's.

        Raises:
            ShapeError: the engine was made for tiles of another size.
        """
        spec, wants = engine.spec, manifest.input
        if (spec.tile_px, spec.channels) != (wants.tile_px, wants.channels):
            raise ShapeError(f"engine {spec} does not fit the manifest's input {wants}")
        self._engine = engine
        self._lock = threading.Lock()
        self._manifest = manifest
        self._min_score = manifest.limits.min_score if min_score is None else min_score

    @property
    def manifest(self) -> Manifest:
        """What the model says of itself."""
        return self._manifest

    @property
    def engine(self) -> Engine:
        """What runs the graphs."""
        return self._engine

    @property
    def min_score(self) -> float:
        """Objects below this score are not reported."""
        return self._min_score

    def __call__(
        self,
        image: NDArray[Any] | Reader,
        *,
        mpp: float | None = None,
        diameter_px: float | Literal["auto"] | None = None,
        pixels: bool = False,
        channel: int | None = None,
        window: Window | None = None,
    ) -> Instances:
        """Return the objects of a whole image.

        An array is taken to be at the model's pixel size already, unless `mpp` (micrometres per
        pixel) or `diameter_px` (of a typical object) says otherwise; a reader's own pixel size counts.
        A model whose manifest says `finds_diameter` estimates the diameter where nothing is given.

        Args:
            image: (H, W) or (H, W, C), any type, or an open reader, which stays open.
            mpp: micrometres per pixel of the image.
            diameter_px: of a typical object, pixels of the image; "auto" estimates it.
            pixels: take the pixels as they are.
            channel: which of several channels.
            window: raw values that become black and white; None for those of the model's rule. Of a camera of
                12 bits in uint16, `Window(0, 4095)`.
        Raises:
            InputError: the pixel size or the channels do not serve.
        """
        is_reader = isinstance(image, Reader)
        opened: AbstractContextManager[Reader] = (
            nullcontext(image) if isinstance(image, Reader) else ArrayReader(image)
        )
        with opened as reader:
            size = choose_diameter(
                self, reader, diameter_px=diameter_px, mpp=mpp, pixels=pixels, channel=channel, window=window
            )
            as_is = pixels if is_reader else mpp is None
            plan = self.plan(reader.info, mpp=mpp, diameter_px=size, pixels=as_is, channel=channel)
            return self.segment(reader, plan, window=window)

    def plan(
        self,
        info: SlideInfo,
        *,
        mpp: float | None = None,
        diameter_px: float | None = None,
        pixels: bool = False,
        channel: int | None = None,
    ) -> SlidePlan:
        """Return how this model reads a slide: level, scale, tiles, channel. Nothing is read.

        Args:
            info: facts about the slide.
            mpp: micrometres per level-0 pixel, in place of what the file says.
            diameter_px: of a typical object, level-0 pixels; decides the scale alone.
            pixels: take the level-0 pixels as they are.
            channel: which of several channels.
        Raises:
            InputError: no pixel size, not square, or far from the model's; several channels, none chosen.
            UsageError: an option is out of range.
        """
        return plan_slide(
            self._manifest.input, info, mpp=mpp, diameter_px=diameter_px, pixels=pixels, channel=channel
        )

    def run(
        self,
        reader: Reader,
        out_dir: Path,
        *,
        options: RunOptions | None = None,
        progress: Progress | None = None,
    ) -> RunSummary:
        """Find the objects of a slide and write them to files: `darcnn.runtime.pipeline.run_slide`."""
        from darcnn.runtime.pipeline import run_slide  # here: the waist itself knows no files

        return run_slide(self, reader, out_dir, options=options, progress=progress)

    def measure(self, reader: Reader, plan: SlidePlan) -> Window:
        """Return the raw values that become 0 and 255 on this slide; read only if the rule asks for it."""
        model = self._manifest.input
        return measure_slide(reader, plan, model.intensity, channels=model.channels)

    def sampler(self, reader: Reader, plan: SlidePlan, window: Window) -> TileSampler:
        """Return what reads tiles as this model eats them; its `read` may run in several threads."""
        return TileSampler(reader, plan, window, channels=self._manifest.input.channels)

    def stream(
        self,
        reader: Reader,
        plan: SlidePlan | None = None,
        *,
        tiles: Sequence[Tile] | None = None,
        window: Window | None = None,
        skips_damaged: bool = False,
    ) -> Iterator[tuple[Tile, Instances]]:
        """Yield each tile with the objects that it reports, in the order given.

        An object on the seam of two tiles may come with both: `darcnn.runtime.seams.drop_twins` keeps one.
        Four batches of tiles are held at most: threads read the next ones while one is computed in a thread
        of its own, and what was found on the one before is put in its place by the caller's. What a tile
        yields depends on neither the batch size nor the other tiles asked for.

        Args:
            reader: the open slide; stays open.
            plan: from `plan`, None for `plan(reader.info)`.
            tiles: some of the plan's tiles, None for all.
            window: from `measure`, None to measure now.
            skips_damaged: leave out tiles whose pixels are damaged, instead of raising.
        Raises:
            DamagedPixelsError: a tile is damaged.
            InputError: the slide cannot be read.
        """
        plan = self.plan(reader.info) if plan is None else plan
        window = self.measure(reader, plan) if window is None else window
        sampler = self.sampler(reader, plan, window)
        shape = (reader.info.height_px0, reader.info.width_px0)
        chosen = plan.tiles if tiles is None else tiles
        batches = read_ahead(sampler, chosen, batch=self._engine.spec.batch, skips_damaged=skips_damaged)
        sampled = (
            [SampledTile(plan, shape, *pair, sampler) for pair in zip(*batch, strict=True)]
            for batch in batches
        )
        uploaded = ((batch, self._upload(batch)) for batch in sampled)
        for (batch, _), seen in map_ahead(lambda pair: self._compute(*pair), uploaded, name="darcnn-engine"):
            yield from zip([one.tile for one in batch], self._finish(batch, seen), strict=True)

    def segment_batch(
        self,
        plan: SlidePlan,
        shape: tuple[int, int],
        tiles: Sequence[Tile],
        pixels: Sequence[NDArray[np.uint8]],
        sampler: TileSampler | None = None,
    ) -> list[Instances]:
        """Return the objects that each of up to `engine.spec.batch` tiles reports, level-0 pixels.

        Args:
            plan: of the slide.
            shape: (H, W) of level 0.
            tiles: B of the plan's tiles.
            pixels: B arrays (S, S, C) of `TileSampler.read`.
            sampler: reads around a tile that cuts an object; without it the object stays as it is cut.
        """
        pairs = zip(tiles, pixels, strict=True)
        return self.segment_tiles([SampledTile(plan, shape, *pair, sampler) for pair in pairs])

    def segment_tiles(self, batch: Sequence[SampledTile]) -> list[Instances]:
        """Return what each of up to `engine.spec.batch` tiles, of any slides, reports; level-0 pixels.

        A tile with as many objects as the model can report, or more proposals than its suppression gets
        through, is looked at again in quarters, one that cuts an object in a tile twice as large.

        Raises:
            InputError: the slide cannot be read any more.
        """
        return self._finish(batch, self._compute(batch, self._stack(batch)))

    def _finish(self, batch: Sequence[SampledTile], seen: _Seen) -> list[Instances]:
        """Put what was seen on each tile in its place, and look again where that is called for."""
        return [
            self._look_again(sampled, found)
            for sampled, found in zip(batch, _place_all(batch, seen), strict=True)
        ]

    def _look_again(self, sampled: SampledTile, found: Instances) -> Instances:
        if found.is_saturated:
            halo_px, batch = self._manifest.input.halo_px, self._engine.spec.batch
            found = look_at_quarters(self._look, sampled, halo_px=halo_px, batch=batch)
        if found.truncated.any() and sampled.sampler is not None:
            limit_px = self._manifest.limits.max_diameter_px
            found = look_wider(self._look, sampled, found, max_diameter_px=limit_px)
        return found

    def _look(self, batch: Sequence[SampledTile]) -> list[Instances]:
        """Return what each tile of an engine call reports, as it is seen there."""
        return _place_all(batch, self._compute(batch, self._stack(batch)))

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        """Run the first graph alone on (B, S, S, C); of several threads one after another."""
        with self._lock:
            return self._engine.detect(tiles)

    def _stack(self, batch: Sequence[SampledTile]) -> NDArray[np.uint8]:
        """Return (B, S, S, C), the pixels of up to `engine.spec.batch` tiles."""
        spec = self._engine.spec
        pixels = np.zeros((spec.batch, spec.tile_px, spec.tile_px, spec.channels), np.uint8)
        pixels[: len(batch)] = np.stack([sampled.pixels for sampled in batch])
        return pixels

    def _upload(self, batch: Sequence[SampledTile]) -> Any:
        """Return the pixels as `detect` takes them, on their way to the device if the engine is on one."""
        pixels = self._stack(batch)
        return self._engine.upload(pixels) if isinstance(self._engine, UploadsTiles) else pixels

    def _compute(self, batch: Sequence[SampledTile], pixels: Any) -> _Seen:
        """Run both graphs on what `_upload` or `_stack` returned; of several threads one after another."""
        spec = self._engine.spec
        with self._lock:  # masks are made of what the last `detect` left in the engine
            detections = self._engine.detect(pixels)
            slots = [self._reported(detections, n, sampled) for n, sampled in enumerate(batch)]
            tile_index = np.repeat(np.arange(len(batch)), [len(slot) for slot in slots])
            boxes = detections.boxes[tile_index, np.concatenate(slots)]
            masks = np.zeros((0, spec.mask_px, spec.mask_px), np.float32)
            if len(boxes):
                masks = self._engine.masks(detections, boxes, tile_index)
        # The least of the slots is good enough to be reported: there may have been more. So there may where
        # suppression did not end: of proposals it kept too many, which took the places of others.
        least = detections.scores.min(axis=1)
        return _Seen(
            boxes=boxes,
            scores=detections.scores[tile_index, np.concatenate(slots)],
            masks=masks,
            tile_index=tile_index,
            is_full=~detections.converged | ((least > 0) & (least >= self._min_score)),
        )

    def segment(self, reader: Reader, plan: SlidePlan, *, window: Window | None = None) -> Instances:
        """Return the objects of the whole slide as `plan` reads it; for images that fit in memory."""
        shape = (reader.info.height_px0, reader.info.width_px0)
        return join_tiles(plan, shape, list(self.stream(reader, plan, window=window)))

    def _reported(self, detections: Detections, index: int, sampled: SampledTile) -> NDArray[np.int64]:
        """Return the slots of tile number `index` whose objects are good enough and its to report."""
        tile, plan, limits = sampled.tile, sampled.plan, self._manifest.limits
        scores = detections.scores[index]
        slots = np.flatnonzero((scores > 0) & (scores >= self._min_score))
        if not detections.converged[index]:
            # After an even number of rounds the graph keeps all boxes that greedy suppression keeps, and
            # more; of these it keeps the same. Objects below min_score never suppress better ones.
            kept = non_maximum_suppression(
                detections.boxes[index, slots], scores[slots], limits.nms_threshold
            )
            slots = slots[kept]
        seen = detections.boxes[index, slots] * sampled.zoom  # network pixels
        if sampled.zoom == 1:  # a second look must know of larger ones, to drop what it saw of them before
            fitting = is_small_enough(seen, limits.max_diameter_px)
            slots, seen = slots[fitting], seen[fitting]
        boxes = to_slide(seen, tile)
        inside = lies_inside(boxes, plan.width, plan.height)
        clipped = np.clip(boxes, 0, [plan.width, plan.height, plan.width, plan.height])
        centres = (clipped[:, :2] + clipped[:, 2:]) / 2
        # beyond its core a tile reports only what it sees whole: half an object has its centre elsewhere
        near = owns(tile, centres, margin_px=SEAM_PX) & ~is_cut(seen, tile, plan)
        reported: NDArray[np.int64] = slots[inside & (owns(tile, centres) | near)]
        return reported

    def close(self) -> None:
        """Close the engine; closing twice is allowed."""
        self._engine.close()


def _place_all(batch: Sequence[SampledTile], seen: _Seen) -> list[Instances]:
    """Return what each tile of a batch reports, level-0 pixels."""
    return [
        place(
            sampled.plan,
            sampled.shape,
            sampled.tile,
            seen.boxes[rows] * sampled.zoom,
            seen.scores[rows],
            seen.masks[rows],
            is_saturated=bool(seen.is_full[n]),
        )
        for n, sampled in enumerate(batch)
        for rows in [np.flatnonzero(seen.tile_index == n)]
    ]
