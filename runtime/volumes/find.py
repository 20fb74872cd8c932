"""From planes to sections: the model looks at each plane of a stack as at a slide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.diameter import is_size_measured, look_for_sizes, settle_diameter
from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import Window
from darcnn.runtime.manifest import ModelInput
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sampling import spread_evenly
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.options import AxisOption
from darcnn.runtime.volumes.sections import Section, sections_of, to_table
from darcnn.runtime.volumes.stack import Stack, measure_stack
from darcnn.runtime.volumes.volume import AXES, Axis, Volume

__all__ = [
    "Block",
    "BlockRunner",
    "FoundBlock",
    "View",
    "estimate_in_volume",
    "find_block",
    "find_blocks_here",
    "find_diameter",
    "find_planes",
    "plan_blocks",
    "plan_view",
    "plan_views",
    "plane_reader",
]

_UM_PER_NM = 1e-3
_LOOKED_AT = 4  # planes whose objects' size is estimated
_DEEP = 3.0  # typical objects; what is less deep shows few of them whole from its sides
# Planes across x lie scattered over the whole file: it must fit into the memory that a system keeps files in.
_MOST_BYTES = 2**32
_BLOCK = 8  # planes that go to one part file: what a kill costs at most


@dataclass(frozen=True, slots=True)
class View:
    """How a model looks at a volume along one axis; a function of the volume, model and options alone."""

    stack: Stack
    plan: SlidePlan  # of each plane
    window: Window


@dataclass(frozen=True, slots=True)
class Block:
    """Some planes of a view: the unit of work, the same for one process and for many."""

    number: int  # over all views
    view: View
    start: int
    stop: int  # the last plane + 1

    def for_others(self) -> Block:
        """Return the block for another process (`Volume.for_others`)."""
        volume = self.view.stack.volume.for_others()
        return replace(self, view=replace(self.view, stack=replace(self.view.stack, volume=volume)))


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """What was found on the planes of a block: the part of `darcnn.runtime.volumes.sections`."""

    number: int
    table: pa.Table
    full_planes: tuple[int, ...] = ()  # with tiles that hold as many objects as the model can report


class BlockRunner(Protocol):
    """Finds the sections of blocks, here or elsewhere, in any order."""

    def __call__(
        self, segmenter: Segmenter, blocks: Sequence[Block], advance: Callable[[int, int], None]
    ) -> Iterator[FoundBlock]:
        """Yield each of `blocks` once, found; `advance` is told of planes done and sections found."""
        ...


def plan_view(
    segmenter: Segmenter,
    volume: Volume,
    axis: Axis,
    *,
    diameter_px: float | None = None,
    pixels: bool = False,
    n_joined: int | None = None,
    window: Window | None = None,
) -> View:
    """Return how `segmenter` looks at `volume` along `axis`; some planes are read to measure brightness.

    Args:
        segmenter: the model.
        volume: open; stays open.
        axis: whose planes are looked at.
        diameter_px: of a typical object, voxels; decides the scale alone. None: the voxel size does.
        pixels: take the voxels as they are.
        n_joined: planes that a slab joins, an odd number; None: as many as the model's rule says.
        window: raw values that become black and white; None: as the model's rule says.
    Raises:
        InputError: no voxel size, none given, or planes of voxels that are not square.
        UsageError: `n_joined` is even.
    """
    model = segmenter.manifest.input
    if n_joined is not None and n_joined % 2 == 0:
        raise UsageError(
            f"a slab of {n_joined} planes has none in its middle", where="--slab", fix="give an odd number"
        )
    has_scale = diameter_px is not None or pixels or volume.info.pixel_nm(axis) is not None
    if model.mpp is not None and not has_scale:
        raise InputError(
            "no voxel size in the file",
            where=volume.info.path,
            fix="pass --voxel-size (13.5A, say), --diameter, or --pixels to take the voxels as they are",
        )
    with plane_reader(volume, axis, np.zeros(volume.info.plane_shape(axis), np.float32)) as reader:
        plan = segmenter.plan(reader.info, diameter_px=diameter_px, pixels=pixels)
    stack = Stack.of(volume, axis, model.slab, model.nominal_diameter_px / plan.scale)
    if n_joined is not None:
        stack = Stack(volume, axis, n_joined, stack.sigma_px)
    return View(stack, plan, window or measure_stack(stack, model.intensity, scale=plan.scale))


def plan_views(
    segmenter: Segmenter,
    volume: Volume,
    axis: AxisOption,
    *,
    diameter_px: float | None = None,
    pixels: bool = False,
    n_joined: int | None = None,
    window: Window | None = None,
) -> list[View]:
    """Return how `segmenter` looks at `volume` along each of the axes that are asked for (`plan_view`).

    "auto" looks along all three where a model of noisy volumes (one with a slab) meets voxels that are cubes,
    at least three typical objects in depth each way and at most 4 GiB of them: there, three looks find more
    than one and agree on little else. Anything else is looked at along z.
    """

    def view_along(one: Axis) -> View:
        return plan_view(
            segmenter,
            volume,
            one,
            diameter_px=diameter_px,
            pixels=pixels,
            n_joined=n_joined,
            window=window,
        )

    if axis != "auto" and axis != "all":
        return [view_along(axis)]
    first, others = view_along(AXES[0]), AXES[1:]
    if axis == "auto" and not _serves_all_axes(segmenter.manifest.input, first):
        others = ()
    return [first, *(view_along(one) for one in others)]


def _serves_all_axes(model: ModelInput, view: View) -> bool:
    info = view.stack.volume.info
    deep_px = _DEEP * model.nominal_diameter_px / view.plan.scale
    n_bytes = math.prod(info.shape) * info.dtype.itemsize
    return (
        model.slab is not None
        and not info.is_series
        and info.is_cubic is not False  # tomograms whose header knows no size have cubes as well
        and min(info.shape) >= deep_px
        and n_bytes <= _MOST_BYTES
    )


def find_diameter(
    segmenter: Segmenter,
    volume: Volume,
    axis: Axis,
    *,
    diameter_px: float | Literal["auto"] | None,
    pixels: bool,
    window: Window | None = None,
) -> float | None:
    """Return the diameter to plan with, voxels; None leaves the scale to the voxel size.

    Args:
        segmenter: the model.
        volume: open; stays open.
        axis: whose planes are looked at.
        diameter_px: what the user gave; "auto" asks for an estimate, and a model that is made for it
            estimates unasked (`darcnn.runtime.diameter.choose_diameter`).
        pixels: take the voxels as they are.
        window: raw values that become black and white; None: as the model's rule says.
    """
    model = segmenter.manifest.input
    if diameter_px is not None and diameter_px != "auto":
        return diameter_px
    has_pixel_size = volume.info.pixel_nm(axis) is not None
    if not is_size_measured(model, diameter_px, pixels=pixels, has_pixel_size=has_pixel_size):
        return None
    found = estimate_in_volume(segmenter, volume, axis, window)
    is_unasked = is_size_measured(model, None, pixels=pixels, has_pixel_size=has_pixel_size)
    if found is None and is_unasked and model.mpp is not None:  # nothing else tells its scale
        return model.nominal_diameter_px
    return found


def estimate_in_volume(
    segmenter: Segmenter, volume: Volume, axis: Axis, window: Window | None = None
) -> float | None:
    """Return the diameter of a typical object in voxels, as four planes tell it; None: not found.

    `darcnn.runtime.diameter.estimate_diameter` says how. A model that sees slabs sees those for the size
    that is looked for.
    """
    model = segmenter.manifest.input

    @cache  # without slabs it is the same stack at every scale
    def window_of(stack: Stack) -> Window:
        if window is not None:
            return window
        return measure_stack(stack, model.intensity, scale=1.0)  # planes have one level, whatever the scale

    def look(scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        stack = Stack.of(volume, axis, model.slab, model.nominal_diameter_px / scale)
        seen = []
        for index in spread_evenly(range(len(stack)), _LOOKED_AT):
            with plane_reader(volume, axis, stack.plane(index)) as reader:
                seen.append(look_for_sizes(segmenter, reader, scale, window=window_of(stack)))
        sizes, weights = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        return sizes, weights

    return settle_diameter(model, look)


def plan_blocks(views: Sequence[View]) -> tuple[Block, ...]:
    """Return the blocks of all planes, view by view."""
    spans = [
        (view, start, min(start + _BLOCK, len(view.stack)))
        for view in views
        for start in range(0, len(view.stack), _BLOCK)
    ]
    return tuple(Block(number, *span) for number, span in enumerate(spans))


def find_block(
    segmenter: Segmenter, block: Block, advance: Callable[[int, int], None] = lambda planes, sections: None
) -> FoundBlock:
    """Return the sections on the planes of a block, plane by plane."""
    found: list[Section] = []
    full: list[int] = []
    planes = find_planes(segmenter, block.view, block.start, block.stop)
    for plane, instances in enumerate(planes, start=block.start):
        found.extend(sections_of(instances, plane))
        full += [plane] * instances.is_saturated
        advance(1, len(instances))
    return FoundBlock(block.number, to_table(found), tuple(full))


def find_blocks_here(
    segmenter: Segmenter, blocks: Sequence[Block], advance: Callable[[int, int], None]
) -> Iterator[FoundBlock]:
    """Find blocks in this process, one after another: the `BlockRunner` of a single machine."""
    for block in blocks:
        yield find_block(segmenter, block, advance)


def find_planes(segmenter: Segmenter, view: View, start: int, stop: int) -> Iterator[Instances]:
    """Yield the objects on planes `start` to `stop` - 1; a thread makes the next plane meanwhile."""
    stack = view.stack
    for plane in stack.read_ahead(start, stop):
        with plane_reader(stack.volume, stack.axis, plane) as reader:
            yield segmenter.segment(reader, view.plan, window=view.window)


def plane_reader(volume: Volume, axis: Axis, plane: NDArray[np.float32]) -> ArrayReader:
    """Return a plane as a source of pixels, with the size of its voxels where they are square."""
    pixel_nm = volume.info.pixel_nm(axis)
    mpp = None if pixel_nm is None else pixel_nm * _UM_PER_NM
    return ArrayReader(plane, name=f"{volume.info.name}, plane across {axis}", mpp=mpp)
