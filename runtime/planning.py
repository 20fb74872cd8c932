"""How one slide goes through one model: which level is read, at which scale, in which tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.geometry import Level, Region, choose_level, span_px0
from darcnn.runtime.intensity import sees_separate_channels
from darcnn.runtime.manifest import ModelInput
from darcnn.runtime.readers.protocol import SlideInfo
from darcnn.runtime.tiling import Tile, plan_tiles

__all__ = ["SlidePlan", "check_square", "find_channel", "plan_slide", "to_level0"]

SNAP = 0.02  # a scale within 2 % of a level's own is that level's: no resampling
MIN_SCALE, MAX_SCALE = 1 / 64, 16.0  # beyond them the pixel size is a mistake
_NAMED = 12  # channels that a message names
MAX_ANISOTROPY = 0.01  # pixels whose sides differ by more are not square


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """How one slide goes through one model. Network pixels lie on one lattice over the whole slide."""

    level: Level  # read from here
    scale: float  # network pixels per level-0 pixel
    width: int  # of the slide, network pixels
    height: int
    span_px0: tuple[int, int]  # level-0 pixels (width, height) that the level shows: nearly all
    tiles: tuple[Tile, ...]
    channel: int | None  # the chosen one; None: colours or the only one
    mpp: float | None  # micrometres per level-0 pixel, where known
    mpp_source: str | None

    @property
    def factor(self) -> tuple[float, float]:
        """Level-0 pixels per network pixel along x and y: the one way from the lattice to the slide."""
        return self.span_px0[0] / self.width, self.span_px0[1] / self.height


def plan_slide(
    model: ModelInput,
    info: SlideInfo,
    *,
    mpp: float | None,
    diameter_px: float | None,
    pixels: bool,
    channel: int | None,
) -> SlidePlan:
    """Return how a model reads a slide; `Segmenter.plan` says what the arguments mean and what is raised."""
    where = info.name if info.path is None else str(info.path)
    channel = _choose_channel(model, info, channel, where)
    for option, value in (("--mpp", mpp), ("--diameter", diameter_px)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{value} is not a size", where=option, fix="give a number above 0")
    known_mpp, mpp_source = mpp, "--mpp"
    if mpp is None:
        known_mpp = None if info.mpp is None else math.sqrt(info.mpp[0] * info.mpp[1])
    if diameter_px is not None:
        scale = model.nominal_diameter_px / diameter_px
    elif model.mpp is None or pixels:
        scale = 1.0
    else:
        if mpp is None:
            check_square(info, where)
        if known_mpp is None:
            raise InputError(
                "no pixel size in the file",
                where=where,
                fix="pass --mpp (micrometres per pixel), --diameter, "
                "or --pixels to take the pixels as they are",
            )
        scale = known_mpp / model.mpp
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise InputError(
            f"its pixels would have to be scaled by {scale:.4g} to fit the model",
            where=where,
            fix="check the pixel size, or pass the right one (--mpp, of volumes --voxel-size) or --diameter",
        )
    level = choose_level(info.levels, 1 / scale)
    span = span_px0(level, info.levels[0])
    if abs(scale * level.downsample - 1) < SNAP:
        scale = 1 / level.downsample
        width, height = level.width_px, level.height_px
    else:
        width, height = (max(1, round(n * scale)) for n in span)
    return SlidePlan(
        level=level,
        scale=scale,
        width=width,
        height=height,
        span_px0=span,
        tiles=plan_tiles(width, height, tile_px=model.tile_px, halo_px=model.halo_px),
        channel=channel,
        mpp=known_mpp,
        mpp_source=mpp_source if mpp is not None else info.mpp_source,
    )


def to_level0(region: Region, plan: SlidePlan, info: SlideInfo, *, reach_px: float = 0.0) -> Region:
    """Return the level-0 pixels of a region in network pixels, grown by `reach_px` of them, on the slide."""
    factor_x, factor_y = plan.factor
    return Region(
        math.floor((region.x0 - reach_px) * factor_x),
        math.floor((region.y0 - reach_px) * factor_y),
        math.ceil((region.x1 + reach_px) * factor_x),
        math.ceil((region.y1 + reach_px) * factor_y),
    ).clip(info.width_px0, info.height_px0)


def _choose_channel(model: ModelInput, info: SlideInfo, channel: int | None, where: str) -> int | None:
    n_channels = len(info.channel_names)
    if sees_separate_channels(
        available=n_channels, is_rgb=info.is_rgb, channels=model.channels, channel=channel
    ):
        return None
    if model.channels not in (1, 3):  # it is made for several: neither colours nor one of them will do
        if channel is not None:
            raise UsageError(
                f"the model sees {model.channels} channels at once", where="--channel", fix="leave it out"
            )
        kind = "colours" if info.is_rgb else f"{n_channels} channel{'' if n_channels == 1 else 's'}"
        raise InputError(
            f"has {kind}, the model sees {model.channels} separate channels",
            where=where,
            fix=f"give an image with {model.channels} channels, or choose another model",
        )
    if channel is not None and not 0 <= channel < n_channels:
        raise UsageError(
            f"no channel {channel} in {where}", where="--channel", fix=f"choose from 0 to {n_channels - 1}"
        )
    if channel is None and n_channels > 1 and not info.is_rgb:
        names = ", ".join(f"{index} {name}" for index, name in enumerate(info.channel_names[:_NAMED]))
        names += ", ..." if n_channels > _NAMED else ""
        option = "channel= (they come last)" if info.path is None else "--channel"
        doubts = info.doubts
        if info.path is None and model.channels == 3 and n_channels == 4:
            doubts = ("of red, green, blue and alpha pass array[..., :3]",)
        fix = "; ".join((f"choose one with {option}: {names}", *doubts))
        raise InputError("several channels", where=where, fix=fix)
    return channel


def check_square(info: SlideInfo, where: str) -> None:
    """Raise an InputError where the sides of a pixel, if known, differ by more than MAX_ANISOTROPY."""
    if info.mpp is not None and abs(info.mpp[0] / info.mpp[1] - 1) > MAX_ANISOTROPY:
        raise InputError(
            f"its pixels are not square: {info.mpp[0]:.4g} x {info.mpp[1]:.4g} um",
            where=where,
            fix="resample it to square pixels, or pass --mpp if the file is wrong",
        )


def find_channel(info: SlideInfo, channel: int | str | None) -> int | None:
    """Return the number of the channel that the user named; the case of letters counts only among several.

    A number may be a name (of a wavelength, say): names go first.

    Raises:
        UsageError: there is no channel of that name, or more than one.
    """
    if not isinstance(channel, str):
        return channel
    folded = [name.casefold() for name in info.channel_names]
    for known, wanted in ((list(info.channel_names), channel), (folded, channel.casefold())):
        if known.count(wanted) == 1:
            return known.index(wanted)
    if channel.isascii() and channel.isdecimal():
        return int(channel)
    names = ", ".join(f"{index} {name}" for index, name in enumerate(info.channel_names))
    where = info.path or info.name
    raise UsageError(f"no channel {channel} in {where}", where="--channel", fix=f"choose from {names}")
