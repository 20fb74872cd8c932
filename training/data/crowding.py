"""Crowded tiles: copies of a tile's single objects laid against others, to learn what keeps two apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops

from darcnn.runtime.geometry import Region
from darcnn.training.data.source import LabelledTile

__all__ = ["clip_window", "crowd"]

Values = NDArray[np.float32]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.int32]  # (S, S), 0 where there is no object
Window = tuple[slice, slice]

_MARGIN = 0.35  # of an object's diameter: so far its blur is copied with it,
_FADE = 0.4  # and in this outer share of the margin it ebbs away
_SINGLE_SOLIDITY = 0.93  # share of its convex hull that a single object fills
_SINGLE_AREAS = (0.3, 1.6)  # times the tile's median: smaller ones are debris, larger ones may be two
_COPIES = (2, 10)  # a tile; fewer where they find no place
_BESIDE = 0.9  # share of copies that are laid against another object
_OVERLAPPING = 0.5  # share of those that overlap it,
_MAX_OVERLAP = 0.2  # by at most this share of either; the rest touches,
_MAX_GAP_PX = 3.0  # or nearly so
_ALIKE = 0.5  # share of copies that keep their direction: nuclei of an epithelium lie side by side
_DISORDER = 0.2  # radians, how far those are turned
_TURNED = 1.0  # radians, beyond which a copy may be mirrored too
_UNEVENNESS = 0.35  # deviation of the logarithm of a copy's strength
_SIZES = (0.8, 1.2)  # times the object's own
_MIN_INSIDE = 0.4  # share of a copy that lies in the tile
_MIN_VISIBLE = 0.5  # share of that which is the copy's own
_WHITE = 0.995  # share of a bright tile's pixels that are not clipped


@dataclass(frozen=True, slots=True)
class _Single:
    """A single object and its blur: `strength` (h, w, 3) is what it adds to the light of its ground or, if it
    is dark, the share of that light which it lets through."""

    strength: Values
    mask: Mask
    is_bright: bool


def crowd(tile: LabelledTile, rng: np.random.Generator) -> LabelledTile:
    """Return the tile with copies of its single objects laid against others, overlapping or nearly touching.

    Not in the paper. Copy-paste after Ghiasi et al. 2021 (arXiv:2012.07177), in the physics of microscopes:
    light adds up where bright objects overlap, stains absorb one after the other, and blur is copied along,
    so that what is between a copy and its neighbour looks like what is between two real objects. Where two
    overlap, each keeps what lies deeper inside it. A tile without single objects stays as it is.
    """
    owner = np.zeros(tile.image.shape[:2], np.int32)
    for number, mask in enumerate(tile.masks):
        owner[mask] = number + 1
    blocked = np.zeros(owner.shape, bool) if tile.doubtful is None else np.asarray(tile.doubtful.any(axis=0))
    canvas = tile.image.astype(np.float32)
    singles = _find_singles(canvas, owner, blocked)
    if not singles:
        return tile
    n = len(tile.masks)
    for _ in range(int(rng.integers(_COPIES[0], _COPIES[1] + 1))):
        copy = _vary(singles[rng.integers(len(singles))], rng)
        corner = _find_place(copy.mask, owner, rng)
        if corner is not None and _lay(canvas, owner, blocked, copy, corner, n + 1):
            n += 1
    if n == len(tile.masks):
        return tile
    canvas *= 255.0 / max(255.0, float(np.quantile(canvas, _WHITE)))  # as the intensity rule has it
    masks = np.stack([owner == number + 1 for number in range(n)])
    image = np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)
    return LabelledTile(image, masks[masks.any(axis=(1, 2))], tile.doubtful)


def _find_singles(canvas: Values, owner: Numbers, blocked: Mask) -> list[_Single]:
    """Return the objects that stand alone, wholly inside the tile, and look like one."""
    side_y, side_x = owner.shape
    regions = regionprops(owner)  # type: ignore[no-untyped-call]  # scikit-image leaves it untyped
    typical = np.median([region.area for region in regions]) if regions else 0.0
    singles = []
    for region in regions:
        low, high = _SINGLE_AREAS
        if not low * typical <= region.area <= high * typical or region.solidity < _SINGLE_SOLIDITY:
            continue
        margin = max(2, round(_MARGIN * region.equivalent_diameter_area))
        y0, x0, y1, x1 = np.array(region.bbox) + margin * np.array([-1, -1, 1, 1])
        if y0 < 0 or x0 < 0 or y1 > side_y or x1 > side_x:
            continue
        own = owner[y0:y1, x0:x1] == region.label
        away = ndimage.distance_transform_edt(~own)
        others = ((owner[y0:y1, x0:x1] > 0) & ~own) | blocked[y0:y1, x0:x1]
        if not (others & (away <= margin)).any():
            singles.append(_cut_out(canvas[y0:y1, x0:x1], own, away, margin))
    return singles


def _cut_out(window: Values, own: Mask, away: NDArray[np.float64], margin: int) -> _Single:
    """Return the object `own` of the window (h, w, 3); `away` (h, w) px is the distance from it."""
    ground = np.median(window[(away <= margin) & (away > (1.0 - _FADE) * margin)], axis=0)  # (3,)
    is_bright = bool(window[own].mean() > ground.mean())
    fade = np.clip((margin - away) / (_FADE * margin), 0.0, 1.0)[..., None]
    if is_bright:
        strength = fade * (window - ground)
    else:
        strength = (np.maximum(window, 1.0) / np.maximum(ground, 1.0)) ** fade
    return _Single(strength.astype(np.float32), own, is_bright)


def _vary(single: _Single, rng: np.random.Generator) -> _Single:
    """Return it turned, perhaps mirrored, a little larger or smaller, stronger or weaker."""
    angle = rng.normal(0.0, _DISORDER) if rng.random() < _ALIKE else rng.uniform(0.0, 2.0 * math.pi)
    size, power = rng.uniform(*_SIZES), math.exp(rng.normal(0.0, _UNEVENNESS))
    mirror = rng.choice((-1.0, 1.0)) if angle > _TURNED else 1.0
    cos, sin = math.cos(angle) / size, math.sin(angle) / size
    turn = np.array([[cos, mirror * sin], [-sin, mirror * cos]])  # from the copy's pixels to the object's
    height, width = single.mask.shape
    side = math.ceil(size * math.hypot(height, width))
    offset = np.array([height - 1, width - 1]) / 2.0 - turn @ np.full(2, (side - 1) / 2.0)

    def turned(values: Values, beyond: float) -> Values:
        made = ndimage.affine_transform(values, turn, offset, (side, side), order=1, cval=beyond)
        return np.asarray(made, np.float32)

    beyond = 0.0 if single.is_bright else 1.0
    strength = np.dstack([turned(single.strength[..., band], beyond) for band in range(3)])
    varied = strength * power if single.is_bright else np.maximum(strength, 1e-3) ** power
    mask = turned(single.mask.astype(np.float32), 0.0) > 0.5
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:  # a line of pixels is lost between those of the copy
        return single
    room = max(2, round(_MARGIN * 2.0 * math.sqrt(mask.sum() / math.pi)))
    part = tuple(slice(max(0, ends[0] - room), ends[-1] + 1 + room) for ends in (rows, columns))
    return _Single(varied[part].astype(np.float32), mask[part], single.is_bright)


def _find_place(mask: Mask, owner: Numbers, rng: np.random.Generator) -> tuple[int, int] | None:
    """Return y and x of the window's first pixel in the tile; None where there is no place."""
    sides = np.array(owner.shape)
    middle = np.argwhere(mask).mean(axis=0)
    if rng.random() >= _BESIDE:
        corner = _rounded(rng.uniform(0, sides) - middle)
        return corner if _overlap_px(mask, owner, corner) == 0 else None
    beside = rng.choice(np.unique(owner)[1:])
    start, angle = np.argwhere(owner == beside).mean(axis=0), rng.uniform(0.0, 2.0 * math.pi)
    direction = np.array([math.sin(angle), math.cos(angle)])
    most = rng.uniform(0.0, _MAX_OVERLAP) if rng.random() < _OVERLAPPING else 0.0
    gap_px = rng.uniform(0.0, _MAX_GAP_PX) if most == 0.0 else 0.0
    for away in range(2, int(sides.max()), 2):
        corner = _rounded(start + away * direction - middle)
        if _overlap_px(mask, owner, corner) <= most * mask.sum():
            at = start + (away + gap_px) * direction
            return _rounded(at - middle) if ((at >= 0) & (at < sides)).all() else None
    return None


def _rounded(corner: NDArray[np.float64]) -> tuple[int, int]:
    return round(float(corner[0])), round(float(corner[1]))


def _overlap_px(mask: Mask, owner: Numbers, corner: tuple[int, int]) -> int:
    window, part = clip_window(mask.shape, owner.shape, corner)
    return int((mask[part] & (owner[window] > 0)).sum())


def clip_window(
    shape: tuple[int, ...], within: tuple[int, ...], corner: tuple[int, int]
) -> tuple[Window, Window]:
    """Return where a window with its first pixel at `corner` (y, x) lies in a tile, and which part does."""
    (y, x), (height, width) = corner, shape
    inside = Region(x, y, x + width, y + height).clip(within[1], within[0])
    window = slice(inside.y0, inside.y1), slice(inside.x0, inside.x1)
    return window, (slice(inside.y0 - y, inside.y1 - y), slice(inside.x0 - x, inside.x1 - x))


def _lay(
    canvas: Values, owner: Numbers, blocked: Mask, copy: _Single, corner: tuple[int, int], number: int
) -> bool:
    """Lay the copy onto the tile as object `number`; tell whether it could lie there."""
    window, part = clip_window(copy.mask.shape, owner.shape, corner)
    mask, below = copy.mask[part], owner[window]
    if mask.sum() < _MIN_INSIDE * copy.mask.sum() or (blocked[window] & mask).any():
        return False
    depth = _depth(copy.mask)[part]
    own = mask.copy()
    for other in np.setdiff1d(below[mask], 0):
        theirs = owner == other
        shared = mask & theirs[window]
        if shared.sum() > _MAX_OVERLAP * min(int(mask.sum()), int(theirs.sum())):
            return False
        own &= ~shared | (depth > _depth(theirs[window]))
    if own.sum() < _MIN_VISIBLE * mask.sum():
        return False
    below[own] = number
    if copy.is_bright:
        canvas[window] += copy.strength[part]
    else:
        canvas[window] *= copy.strength[part]
    return True


def _depth(mask: Mask) -> NDArray[np.float64]:
    """Return (h, w) px, how far inside the object a pixel lies; what a window cuts goes on beyond it."""
    deep: NDArray[np.float64] = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))
    return deep[1:-1, 1:-1]
