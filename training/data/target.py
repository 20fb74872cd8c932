"""The unlabelled target: images through the runtime's readers and intensity rule, cropped and scaled."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError, ShapeError
from darcnn.runtime.geometry import Level, Region, choose_level
from darcnn.runtime.intensity import (
    Window,
    apply_window,
    measure_window,
    sees_separate_channels,
    select_channels,
)
from darcnn.runtime.planning import check_square
from darcnn.runtime.readers import Reader, SlideInfo, count_planes, open_source
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.sampling import check_white, join_samples, needs_sample, sample_slide, spread_evenly
from darcnn.runtime.slab import Slab
from darcnn.runtime.volumes.find import plane_reader
from darcnn.runtime.volumes.open import is_volume, open_volume
from darcnn.runtime.volumes.stack import SAMPLED_PLANES, Stack, measure_stack
from darcnn.training.config import Target, TargetSet
from darcnn.training.data.patterns import find_images
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.target_tile import cut_tile

__all__ = ["TargetImage", "TargetImages"]

_LOG = logging.getLogger(__name__)

_CROP_PX = 512  # side of the crops that stand for a large slide: at least so many pixels of level and network
_OPEN_CROP_PX = 1024  # pixels of the level, where the scale is to be found: a crop must show a few objects
_CROPS = 12
_WHOLE_PX = 6_000_000  # a frame of a camera stays whole
_PLAIN = 6.0  # a crop whose grey levels deviate less than this is glass, not tissue
_MIN_SIDE_PX = 64  # network pixels, the smallest tile of a recipe: below it an image would only be blown up

_SAY_WHITE = 'set target.intensity = { kind = "range", low = 0, high = 4095 }, with the white of your camera'


@dataclass(frozen=True, slots=True)
class TargetImage:
    """One unlabelled image: `pixels` (H, W, C) uint8 and `scale`, network pixels per image pixel."""

    name: str
    pixels: NDArray[np.uint8]
    scale: float
    is_scale_open: bool = False  # nobody gave it: 1 until the objects have been measured
    is_crop: bool = False  # of a slide that is too large to hold


@dataclass(frozen=True, slots=True)
class _Plane:
    """One plane of a file as it is loaded: an open reader, what its images' names end in, one level."""

    reader: Reader
    suffix: str
    level: Level
    scale: float  # network pixels per pixel of the level
    is_scale_open: bool


class TargetImages:
    """All unlabelled images of a recipe, in a fixed order.

    A file is an image; of a slide that is too large to hold, crops; of a volume or a series, planes drawn
    at even steps. All that comes of one file is seen through one intensity window, measured as a run does.
    What has no contrast (or no finite value) is left out with a warning.

    Raises:
        InputError: a pattern matches nothing; a file cannot be read, is too small at the network's scale, or
            has other channels; or no image is left.
    """

    def __init__(self, data: Path, target: Target, seed: int, *, without: Sequence[Path] = ()) -> None:
        """Load the images that patterns of `target` match in `data`, but those in or at `without`."""
        self.target = target
        passed_over = [place.resolve() for place in without]
        self.images: list[TargetImage] = []
        for group in target.sets:
            paths = [
                path
                for path in find_images(data, group.images, key="target.sets.images")
                if not any(path.resolve().is_relative_to(place) for place in passed_over)
            ]
            if not paths:
                raise InputError(
                    "no target images",
                    where=data / group.images,
                    fix="correct target.sets.images in the recipe",
                )
            for path in paths:
                self._add(path, group, seed)
        if not self.images:
            raise InputError(
                "no target image has any contrast", where=data, fix="correct target.intensity in the recipe"
            )
        self.digest = _digest(self.images)  # tells them from other images, and from others of their names

    def _add(self, path: Path, group: TargetSet, seed: int) -> None:
        with ExitStack() as stack:
            planes, window = self._open(path, group, stack)
            rng = np.random.default_rng(seed)
            found = [image for plane in planes for image in self._images(plane, window, rng)]
        kept = [image for image in found if _has_contrast(image.pixels)]
        if len(kept) < len(found):
            which = "no contrast" if len(found) == 1 else f"{len(found) - len(kept)} parts without contrast"
            _LOG.warning("%s: %s; left out of the training", path, which)
        stem, taken = make_slide_name(path), {image.name for image in self.images}
        while any(stem + image.name in taken for image in kept):
            stem += "_"  # the same name in another set
        self.images.extend(replace(image, name=stem + image.name) for image in kept)

    def _open(self, path: Path, group: TargetSet, stack: ExitStack) -> tuple[list[_Plane], Window]:
        """Return the planes of a file that are learned from, open until `stack` ends, and one window."""
        if self.target.slab is not None and is_volume(path):
            return self._open_slabs(path, group, self.target.slab, stack)
        planes = [
            self._plane(stack.enter_context(open_source(path, z=z, t=t)), suffix, path, group)
            for suffix, z, t in _draw_planes(path)
        ]
        return planes, self._window(planes)

    def _open_slabs(
        self, path: Path, group: TargetSet, slab: Slab, stack: ExitStack
    ) -> tuple[list[_Plane], Window]:
        """Return slabs of a volume along z, made as a run makes them."""
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        volume = stack.enter_context(open_volume(path, scratch))

        def reader_of(plane: NDArray[np.float32]) -> Reader:
            return stack.enter_context(plane_reader(volume, "z", plane))

        scale = self._scale(reader_of(np.zeros((1, 1), np.float32)).info, group) or 1.0
        whole = Stack.of(volume, "z", slab, self.target.nominal_diameter_px / scale)
        planes = [
            self._plane(reader_of(whole.plane(z)), f"_z{z:03d}", path, group)
            for z in spread_evenly(range(len(whole)), SAMPLED_PLANES)
        ]
        return planes, measure_stack(whole, self.target.intensity, scale=scale)

    def _plane(self, reader: Reader, suffix: str, path: Path, group: TargetSet) -> _Plane:
        info, channels = reader.info, self.target.channels
        try:
            select_channels(
                np.zeros((1, 1, len(info.channel_names)), info.dtype), is_rgb=info.is_rgb, channels=channels
            )
        except ShapeError as err:
            serving = {1: "one channel or RGB", 3: "RGB, or one or three channels"}
            wanted = serving.get(channels, f"at least {channels} separate channels")
            raise InputError(
                str(err), where=path, fix=f"give images with {wanted}, or correct target.channels"
            ) from err
        given = self._scale(info, group)
        scale0 = 1.0 if given is None else given
        level = choose_level(info.levels, 1.0 / scale0)  # the one that a run reads
        scale = scale0 * level.downsample
        side = min(level.width_px, level.height_px)
        if side * scale < _MIN_SIDE_PX:
            raise InputError(
                f"is too small: its shorter side, {side} px, is {side * scale:.0f} px at the network's scale",
                where=path,
                fix=f"leave out what is below {_MIN_SIDE_PX} px there, or correct target.sets.diameter_px",
            )
        return _Plane(reader, suffix, level, scale, is_scale_open=given is None)

    def _scale(self, info: SlideInfo, group: TargetSet) -> float | None:
        """Return network pixels per level-0 pixel; None where nobody gave the size of objects or pixels."""
        if group.diameter_px is not None:
            return self.target.nominal_diameter_px / group.diameter_px
        if self.target.mpp is not None and info.mpp is not None:
            check_square(info, str(info.path or info.name))
            return info.mpp[0] / self.target.mpp
        return None

    def _window(self, planes: Sequence[_Plane]) -> Window:
        """Return the raw values that become 0 and 255 on all `planes` of a file, as a run measures them."""
        rule, channels = self.target.intensity, self.target.channels
        info = planes[0].reader.info
        sample = np.empty((0, channels), info.dtype)
        if needs_sample(rule, info.dtype):
            parts = [
                sample_slide(plane.reader, scale=plane.scale / plane.level.downsample, channels=channels)
                for plane in planes
            ]
            sample = join_samples(parts)
        if sample.size and sample.min() < sample.max():  # else it is left out, not doubted
            try:
                check_white(sample, rule, info.dtype, info.path, name=info.name)
            except InputError as err:  # its own advice is for a run
                raise InputError(err.problem, where=info.path or info.name, fix=_SAY_WHITE) from err
        by_channel = sees_separate_channels(
            available=len(info.channel_names), is_rgb=info.is_rgb, channels=channels, channel=None
        )
        return measure_window(rule, sample, by_channel=by_channel)

    def _images(self, plane: _Plane, window: Window, rng: np.random.Generator) -> Iterator[TargetImage]:
        """Yield the plane, or crops of one that is too large to hold, named by the end of their name."""
        width, height = plane.level.width_px, plane.level.height_px
        side = _crop_side(plane.scale)
        if plane.is_scale_open and self.target.finds_diameter:
            side = _OPEN_CROP_PX
        if width * height <= max(_WHOLE_PX, _CROPS * _CROP_PX * side):
            pixels = self._read(plane, Region(0, 0, width, height), window)
            yield TargetImage(plane.suffix, pixels, plane.scale, plane.is_scale_open)
            return
        for region, pixels in self._crops(plane, side, window, rng):
            x, y = (round(n * plane.level.downsample) for n in (region.x0, region.y0))
            name = f"{plane.suffix}_x{x}_y{y}"
            yield TargetImage(name, pixels, plane.scale, plane.is_scale_open, is_crop=True)

    def _crops(
        self, plane: _Plane, side: int, window: Window, rng: np.random.Generator
    ) -> list[tuple[Region, NDArray[np.uint8]]]:
        """Return crops at random places, apart from one another, that show more than glass; at least one."""
        width, height = plane.level.width_px, plane.level.height_px
        across, down = min(width, side), min(height, side)
        found: list[tuple[Region, NDArray[np.uint8]]] = []
        for _ in range(50 * _CROPS):
            x, y = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            if all(abs(x - r.x0) >= side or abs(y - r.y0) >= side for r, _ in found):
                region = Region(x, y, x + across, y + down)
                pixels = self._read(plane, region, window)
                if pixels.mean(axis=2).std() > _PLAIN:
                    found.append((region, pixels))
            if len(found) == _CROPS:
                break
        corner = Region(0, 0, across, down)
        return found or [(corner, self._read(plane, corner, window))]

    def _read(self, plane: _Plane, region: Region, window: Window) -> NDArray[np.uint8]:
        pixels = plane.reader.read(region, level=plane.level.index)
        chosen = select_channels(pixels, is_rgb=plane.reader.info.is_rgb, channels=self.target.channels)
        return apply_window(chosen, window)

    def match(self, diameters_px: Mapping[str, float]) -> None:
        """Scale the images named so that objects of these sizes, pixels of the image, become nominal."""
        nominal = self.target.nominal_diameter_px
        self.images = [
            _at_scale(image, nominal / diameters_px[image.name]) if image.name in diameters_px else image
            for image in self.images
        ]

    def tile(
        self,
        rng: np.random.Generator,
        tile_px: int,
        labels: dict[str, NDArray[np.int32]] | None = None,
    ) -> LabelledTile:
        """Return a random crop at the network's scale, jittered.

        With `labels` (pseudo-labels by image name, negative where doubtful), only labelled images are drawn
        and the masks are cropped along.
        """
        images = self.images if labels is None else [i for i in self.images if i.name in labels]
        image = images[rng.integers(len(images))]
        return cut_tile(
            image.pixels,
            None if labels is None else labels[image.name],
            rng,
            tile_px=tile_px,
            scale=image.scale,
            jitter=self.target.jitter,
        )


def _crop_side(scale: float) -> int:
    """Return the side of a slide's crop, pixels of its level, that comes to `scale` network pixels each."""
    return max(_CROP_PX, math.ceil(_CROP_PX / scale))


def _at_scale(image: TargetImage, scale: float) -> TargetImage:
    """Return the image at the scale that was found; of a crop no more than one has whose scale was given."""
    pixels = image.pixels
    if image.is_crop:
        height, width = pixels.shape[:2]
        side = _crop_side(scale)
        x, y = max(0, width - side) // 2, max(0, height - side) // 2
        pixels = np.ascontiguousarray(pixels[y : y + side, x : x + side])
    return replace(image, pixels=pixels, scale=scale)


def _draw_planes(path: Path) -> list[tuple[str, int | None, int | None]]:
    """Return which planes of a file are loaded: end of the name, z and t (None where there is one only)."""
    planes = count_planes(path)
    n_t = min(planes.n_t, SAMPLED_PLANES // min(planes.n_z, round(math.sqrt(SAMPLED_PLANES))))
    drawn: list[tuple[str, int | None, int | None]] = []
    for t in spread_evenly(range(planes.n_t), n_t):
        for z in spread_evenly(range(planes.n_z), SAMPLED_PLANES // n_t):
            ends = (f"_t{t:03d}" if planes.n_t > 1 else "") + (f"_z{z:03d}" if planes.n_z > 1 else "")
            drawn.append((ends, z if planes.n_z > 1 else None, t if planes.n_t > 1 else None))
    return drawn


def _digest(images: Sequence[TargetImage]) -> str:
    """Return the sha256 of names, scales and pixels."""
    found = hashlib.sha256()
    for image in images:
        found.update(repr((image.name, image.pixels.shape, image.scale, image.is_scale_open)).encode())
        found.update(image.pixels.tobytes())
    return found.hexdigest()


def _has_contrast(pixels: NDArray[np.uint8]) -> bool:
    """Tell whether any channel of (H, W, C) has more than one value."""
    return bool((pixels.max(axis=(0, 1)) > pixels.min(axis=(0, 1))).any())
