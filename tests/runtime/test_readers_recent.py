"""Pixels that were just read are not read again, and are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from darcnn.runtime.errors import DamagedPixelsError, InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers import ArrayReader
from darcnn.runtime.readers.recent import RecentReader

IMAGE = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
WHOLE = Region(0, 0, 80, 60)


class CountingReader(ArrayReader):
    """Keeps the regions that it was asked for; those beyond a column are damaged."""

    def __init__(self, image: np.ndarray, *, damaged_from: int = 10**6) -> None:
        super().__init__(image)
        self.asked: list[Region] = []
        self._damaged_from = damaged_from

    def read(self, region: Region, *, level: int) -> np.ndarray:
        self.asked.append(region)
        if region.x1 > self._damaged_from:
            raise DamagedPixelsError("is damaged", where="an array", fix="none")
        return super().read(region, level=level)


def test_a_part_of_what_was_read_is_at_hand() -> None:
    source = CountingReader(IMAGE)
    with RecentReader(source) as reader:
        assert reader.info is source.info
        assert np.array_equal(reader.read(Region(10, 5, 50, 45), level=0), IMAGE[5:45, 10:50])
        assert np.array_equal(reader.read(Region(10, 6, 50, 45), level=0), IMAGE[6:45, 10:50])
        assert np.array_equal(reader.read(Region(20, 10, 31, 12), level=0), IMAGE[10:12, 20:31])
        assert source.asked == [Region(10, 5, 50, 45)]
        for beyond in (Region(9, 5, 50, 45), Region(10, 5, 51, 45), Region(20, 44, 30, 46)):
            x0, y0, x1, y1 = beyond.x0, beyond.y0, beyond.x1, beyond.y1
            assert np.array_equal(reader.read(beyond, level=0), IMAGE[y0:y1, x0:x1])
        assert len(source.asked) == 4


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    source = CountingReader(IMAGE)
    tile = 20 * 20 * 3
    with RecentReader(source, max_bytes=2 * tile) as reader:
        tiles = [Region(x, 0, x + 20, 20) for x in (0, 20, 40)]
        for region in tiles:
            reader.read(region, level=0)
        reader.read(tiles[1], level=0)
        reader.read(tiles[2], level=0)
        assert len(source.asked) == 3
        reader.read(tiles[0], level=0)
        assert len(source.asked) == 4
        assert reader.read(WHOLE, level=0).shape == IMAGE.shape  # more than may be kept
        reader.read(WHOLE, level=0)
        assert len(source.asked) == 6


def test_nobody_changes_what_another_will_read() -> None:
    with RecentReader(CountingReader(IMAGE)) as reader:
        for _ in range(2):
            pixels = reader.read(WHOLE, level=0)
            assert np.array_equal(pixels, IMAGE)
            pixels[:] = 0


def test_where_parts_are_not_what_is_read_of_them_nothing_is_kept() -> None:
    source = CountingReader(IMAGE)
    levels = (Level(0, 80, 60, 1.0), Level(1, 26, 20, 3.001))
    source._info = replace(source.info, levels=levels)
    part = Region(4, 4, 8, 8)
    with RecentReader(source) as reader:
        for level in (1, 0):
            reader.read(Region(0, 0, 20, 20), level=level)
            reader.read(part, level=level)
    assert [region == part for region in source.asked] == [False, True, False]


def test_damage_is_not_kept_and_closing_closes() -> None:
    source = CountingReader(IMAGE, damaged_from=40)
    reader = RecentReader(source)
    for _ in range(2):
        with pytest.raises(DamagedPixelsError):
            reader.read(WHOLE, level=0)
    reader.read(Region(0, 0, 40, 60), level=0)
    reader.close()
    reader.close()
    with pytest.raises(InputError, match="closed"):
        reader.read(Region(0, 0, 40, 60), level=0)
