"""Tiles of real images, as a run reads them: to verify a bundle on, or to calibrate it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.diameter import choose_diameter
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.errors import UsageError
from darcnn.runtime.intensity import sees_separate_channels
from darcnn.runtime.readers import Reader, SlideInfo, count_planes, open_source
from darcnn.runtime.readers.ome_zarr import is_ome_zarr
from darcnn.runtime.readers.open import is_readable
from darcnn.runtime.sampling import spread_evenly
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.find import plan_view, plane_reader
from darcnn.runtime.volumes.open import open_volume
from darcnn.training.config import Recipe
from darcnn.training.data.patterns import expand_images, find_images, is_left_behind

__all__ = ["TileSource", "images_in", "images_of", "learned_images", "measure_mpp", "read_tiles"]

_RECORD = "run.json"  # in the folder of a result
_MEASURED = 8  # images whose pixel size is read
_ALIKE = 1.25  # ratio of the scales of images that are still of one kind


@dataclass(frozen=True, slots=True)
class TileSource:
    """An image; `diameter_px` of its typical object where known, level-0 px."""

    path: Path
    diameter_px: float | None = None


def images_of(recipe: Recipe, folder: Path | None = None) -> list[TileSource]:
    """Return the images that the recipe adapts to, in `folder` or in the recipe's own.

    In a folder where the recipe's patterns match nothing, all images are taken.

    Raises:
        UsageError: there is none.
    """
    if folder is not None:
        _check_folder(folder)
    found = _named_in(recipe, Path(recipe.data) if folder is None else folder)
    if found:
        return found
    if folder is None:
        raise _no_image(recipe.data)
    return images_in(folder)


def _named_in(recipe: Recipe, folder: Path) -> list[TileSource]:
    return [
        TileSource(path, group.diameter_px)
        for group in recipe.target.sets
        for path in find_images(folder, group.images, key="target.sets.images")
    ]


def learned_images(recipe: Recipe, folder: Path | None = None) -> list[TileSource]:
    """Return the images that were learned from: the recipe's own, or what has their names in `folder`."""
    return _named_in(recipe, Path(recipe.data)) or ([] if folder is None else _named_in(recipe, folder))


def measure_mpp(sources: Sequence[TileSource], nominal_diameter_px: float) -> float | None:
    """Return the micrometres per network pixel at which images were learned from, by what they tell.

    A model that was told the diameter of its objects in pixels knows no scale. Where the images tell how
    large a pixel is, it follows: an image is scaled so that its objects are nominal. None where an image does
    not tell, where no diameter was given, or where the images differ by more than a quarter.

    Args:
        sources: the images.
        nominal_diameter_px: of a typical object, network pixels.
    """
    found = []
    for source in spread_evenly(sources, _MEASURED):
        mpp = _mpp_of(source.path)
        if mpp is None or source.diameter_px is None:
            return None
        found.append(mpp * source.diameter_px / nominal_diameter_px)
    if not found or max(found) > _ALIKE * min(found):
        return None
    return float(f"{np.median(found):.4g}")


def _mpp_of(path: Path) -> float | None:
    planes = count_planes(path)
    z, t = (0 if n > 1 else None for n in (planes.n_z, planes.n_t))
    with open_source(path, z=z, t=t) as reader:
        return None if reader.info.mpp is None else reader.info.mpp[0]


def images_in(folder: Path, diameter_px: float | None = None) -> list[TileSource]:
    """Return all images below `folder`; `diameter_px` of their typical object where known, level-0 px.

    Raises:
        UsageError: there is none.
    """
    _check_folder(folder)
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if is_readable(path)
        and not (is_left_behind(path) or _is_result(path, folder) or _is_in_zarr(path, folder))
    )
    found = [TileSource(image, diameter_px) for image in expand_images(files)]
    if not found:
        raise _no_image(folder)
    return found


def _is_in_zarr(path: Path, folder: Path) -> bool:
    """Tell whether a path lies inside an OME-Zarr below `folder`, which stands for all that is in it."""
    above = path.parents[: len(path.relative_to(folder).parts) - 1]
    return any(is_ome_zarr(place) for place in above)


def _is_result(path: Path, folder: Path) -> bool:
    """Tell whether a file lies among the results of a run, somewhere below `folder`."""
    above = path.parents[: len(path.relative_to(folder).parts)]
    return any((place / _RECORD).is_file() for place in above)


def read_tiles(
    sources: Sequence[TileSource], bundle: Bundle, *, limit: int = 8
) -> dict[str, NDArray[np.uint8]]:
    """Return up to `limit` tiles (S, S, C), spread evenly over the images and over each image.

    A volume is represented by its middle plane, at the middle of its time; where the model sees slabs, by the
    middle slab.
    Pixels come as in a run: same scale, same intensity rule, same reflection at the edges.

    Raises:
        InputError: an image cannot be read.
        UsageError: there is no image.
    """
    if not sources:
        raise UsageError(
            "no image to verify on", where="--data", fix="give a folder of images like the model's"
        )
    chosen = spread_evenly(sources, limit)
    tiles: dict[str, NDArray[np.uint8]] = {}
    with Segmenter(open_engine(bundle, device="cpu"), bundle.manifest) as segmenter:
        for number, source in enumerate(chosen):
            n_tiles = limit * (number + 1) // len(chosen) - limit * number // len(chosen)
            with ExitStack() as stack:
                reader = _open_middle(source, segmenter, stack)
                facts = reader.info
                channel = _channel_for(bundle.manifest.input.channels, facts)
                size = choose_diameter(segmenter, reader, diameter_px=source.diameter_px, channel=channel)
                plan = segmenter.plan(facts, diameter_px=size, pixels=facts.mpp is None, channel=channel)
                sampler = segmenter.sampler(reader, plan, segmenter.measure(reader, plan))
                for tile in spread_evenly(plan.tiles, n_tiles):
                    name = f"{facts.name} {tile.index}"
                    if name in tiles:  # images of one name may lie in several folders
                        name = f"{number + 1} {name}"
                    tiles[name] = sampler.read(tile)
    return tiles


def _open_middle(source: TileSource, segmenter: Segmenter, stack: ExitStack) -> Reader:
    """Return the middle plane or slab of an image, open until `stack` ends."""
    planes = count_planes(source.path)
    z, t = (n // 2 if n > 1 else None for n in (planes.n_z, planes.n_t))
    if z is None or segmenter.manifest.input.slab is None:
        return stack.enter_context(open_source(source.path, z=z, t=t))
    scratch = Path(stack.enter_context(TemporaryDirectory()))
    volume = stack.enter_context(open_volume(source.path, scratch, t=t, channel=0))
    pixels = volume.info.voxel_nm is None
    view = plan_view(segmenter, volume, "z", diameter_px=source.diameter_px, pixels=pixels)
    return stack.enter_context(plane_reader(volume, "z", view.stack.plane(z)))


def _channel_for(channels: int, facts: SlideInfo) -> int | None:
    """Return the first channel for a model that sees one of several, None where nothing is to be chosen."""
    available = len(facts.channel_names)
    if facts.is_rgb or available == 1 or channels not in (1, 3):
        return None
    sees_all = sees_separate_channels(available=available, is_rgb=False, channels=channels, channel=None)
    return None if sees_all else 0


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}", where="--data", fix="check the path; it is a folder of images"
        )


def _no_image(folder: object) -> UsageError:
    return UsageError(
        f"no image in {folder}", where="--data", fix="give a folder of images like those of the training"
    )
