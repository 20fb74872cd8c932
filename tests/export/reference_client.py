"""A client as docs/export.md tells it step by step, in NumPy and Pillow: nothing of darcnn is imported."""

from collections import namedtuple
from itertools import chain, pairwise, product
from math import ceil

import numpy as np
from PIL import Image

# What one `detect` sees: its corner, end and core (vectors x y) in network pixels, and (S, S, C) bytes.
Tile = namedtuple("Tile", "start stop core_low core_high pixels")
Found = namedtuple("Found", "score tile is_near_seam pixels")  # pixels: a set of (y, x) of the image


class Client:
    def __init__(self, manifest, detect, mask):
        self.input, self.limits = manifest["input"], manifest["limits"]
        self.detect, self.mask = detect, mask  # functions that call the two graphs

    def __call__(self, image, scale):
        """Return what is found on `image` (H, W, C); `scale` is its network pixels per pixel."""
        pixels = resampled(as_bytes(chosen(image, self.input["channels"]), self.input["intensity"]), scale)
        self.shape, self.extent = np.array(image.shape[:2]), np.array(pixels.shape[1::-1])
        side, halo, found = self.input["tile_px"], self.input["halo_px"], []
        lattice = product(spans(self.extent[1], side, halo), spans(self.extent[0], side, halo))
        for number, ((top, y0, y1), (left, x0, x1)) in enumerate(lattice):
            at = np.ix_(mirrored(top, side, self.extent[1]), mirrored(left, side, self.extent[0]))
            start = np.array([left, top])
            tile = Tile(start, start + side, np.array([x0, y0]), np.array([x1, y1]), pixels[at])
            found += self.look(tile, number)
        return without_twins(found)

    def look(self, tile, number, again=True):
        boxes, scores, atlas, converged = self.detect(np.repeat(tile.pixels[None], self.input["batch"], 0))
        boxes, scores, size = boxes[0], scores[0], self.limits["mask_batch"]
        is_full = scores.min() > 0 and scores.min() >= self.limits["min_score"]
        if again and (is_full or not converged[0]):
            quarters = [self.look(one, n, again=False) for n, one in enumerate(self.quarters(tile))]
            kept = without_covered(without_twins(list(chain.from_iterable(quarters))))
            return [one._replace(tile=number, is_near_seam=True) for one in kept]
        rows = np.flatnonzero((scores > 0) & (scores >= self.limits["min_score"]))
        rows = rows if converged[0] else suppressed(boxes, scores, rows, self.limits["nms_threshold"])
        places = {row: boxes[row].astype(float).reshape(2, 2) + tile.start for row in rows}
        rows = [row for row in rows if self.is_reported(*places[row], tile)]
        found = []
        for some in (rows[n : n + size] for n in range(0, len(rows), size)):
            filled = np.zeros((size, 4), np.float32)
            filled[: len(some)] = boxes[some]
            masks = self.mask(atlas, filled, np.zeros(size, np.int64))
            for row, cells in zip(some, masks[: len(some)], strict=True):
                low, high = places[row]
                near = (tile.core_low > 0) & (low <= tile.core_low + 8)
                near |= (tile.core_high < self.extent) & (high >= tile.core_high - 8)
                drawn = draw(cells, places[row] * self.shape[::-1] / self.extent, self.shape)
                found.append(Found(scores[row], number, near.any(), drawn))
        return without_covered(found)

    def is_reported(self, low, high, tile):
        inside, size = np.minimum(high, self.extent) - np.maximum(low, 0), high - low
        if (inside <= 0).any() or (inside < np.minimum(size, self.extent) / 3).any():
            return False
        if size.prod() ** 0.5 > (self.limits["max_diameter_px"] or np.inf):
            return False
        is_cut = (low <= tile.start + 1) & (tile.start > 0)
        is_cut |= (high >= tile.stop - 1) & (tile.stop < self.extent)
        centre = (np.clip(low, 0, self.extent) + np.clip(high, 0, self.extent)) / 2
        margin = 0 if is_cut.any() else 4
        return ((tile.core_low - margin <= centre) & (centre < tile.core_high + margin)).all()

    def quarters(self, tile):
        low, high, halo = tile.core_low, tile.core_high, self.input["halo_px"]
        (xs, ys) = zip(low, (low + high) // 2, high, strict=True)
        for (y0, y1), (x0, x1) in product(pairwise(ys), pairwise(xs)):
            core = np.array([[x0, y0], [x1, y1]])
            start, stop = np.maximum(core[0] - halo, tile.start), np.minimum(core[1] + halo, tile.stop)
            (x, y), (width, height) = start - tile.start, stop - start
            crop, pixels = tile.pixels[y : y + height, x : x + width], np.empty_like(tile.pixels)
            pixels[:] = np.median(crop, axis=(0, 1)).astype(np.uint8)
            pixels[:height, :width] = crop
            yield Tile(start, stop, *core, pixels)


def chosen(image, channels):
    if image.shape[2] == 3 and channels == 1:
        return np.rint(image.mean(axis=2, keepdims=True, dtype=np.float32)).astype(image.dtype)
    return np.repeat(image, channels, axis=2) if image.shape[2] == 1 else image[..., :channels]


def as_bytes(image, rule):
    low, high = rule["low"], rule["high"]
    if rule["kind"] == "full_range":
        ends = np.iinfo(image.dtype) if image.dtype.kind in "iu" else None
        low, high = (ends.min, ends.max) if ends else (0, 1)
    elif rule["kind"] == "percentile":
        low, high = np.percentile(image, (low, high))
        high = high if high > low else low + 1
    return np.rint(np.clip(255 * (image.astype(float) - low) / (high - low), 0, 255)).astype(np.uint8)


def resampled(image, scale):
    if abs(scale - 1) < 0.02:
        return image
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    bands = [Image.fromarray(image[..., n]).resize(size, Image.BILINEAR) for n in range(image.shape[2])]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def spans(size, side, halo):
    """Return for each tile along an axis where it starts, and where its core starts and ends."""
    step = side - 2 * halo
    n = max(1, ceil((size - 2 * halo) / step))
    inner = [i * step + halo for i in range(1, n)]
    return [(i * step, *core) for i, core in enumerate(zip([0, *inner], [*inner, size], strict=True))]


def mirrored(start, side, size):
    at = np.arange(start, start + side) % max(2 * (size - 1), 1)
    return np.minimum(at, 2 * (size - 1) - at)


def suppressed(boxes, scores, rows, threshold):
    rows, kept = rows[np.argsort(-scores[rows], kind="stable")], []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    while len(rows):
        best, rows = rows[0], rows[1:]
        kept.append(best)
        low, high = np.maximum(boxes[rows, :2], boxes[best, :2]), np.minimum(boxes[rows, 2:], boxes[best, 2:])
        common = np.maximum(high - low, 0).prod(axis=1)
        rows = rows[common <= threshold * (areas[rows] + areas[best] - common)]
    return kept


def draw(cells, box, shape):
    """Return the pixels whose centre lies in `box` and has a probability above 0.5 there."""
    inside = []
    for (low, high), size in zip(box.T[::-1], shape, strict=True):  # along y, then along x
        at = np.arange(max(ceil(low - 0.5), 0), min(ceil(high - 0.5), size))
        position = np.clip((at + 0.5 - low) / (high - low) * len(cells) - 0.5, 0, len(cells) - 1)
        below = np.minimum(position.astype(int), len(cells) - 2)
        weight = (position - below)[:, None]
        cells = (cells[below] * (1 - weight) + cells[below + 1] * weight).T  # the other axis comes first
        inside.append(at)
    return {(inside[0][y], inside[1][x]) for y, x in np.argwhere(cells > 0.5)}


def without_covered(found):
    """Return what does not lie for more than half in better ones together."""
    kept, taken = [], set()
    for one in sorted(found, key=lambda one: -one.score):
        if len(one.pixels & taken) * 2 <= len(one.pixels) > 0:
            kept.append(one)
            taken |= one.pixels
    return kept


def without_twins(found):
    """Return what does not lie for more than half in a better one of another tile, both near a seam."""
    kept = []
    for one in sorted(found, key=lambda one: (-one.score, one.tile)):
        rivals = (o for o in kept if one.is_near_seam and o.is_near_seam and o.tile != one.tile)
        if not any(2 * len(o.pixels & one.pixels) > len(one.pixels) for o in rivals):
            kept.append(one)
    return kept
