"""Levels on level 0: a size that was rounded changes no pixel."""

from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.geometry import Level, span_px0

SIDES = st.integers(130, 4000)  # of fewer pixels several factors may explain a rounded size


@given(SIDES, SIDES, st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_pixels_of_a_level_of_rounded_size_show_whole_pixels(width, height, factor, rounds_up):
    reduced = [-(-side // factor) if rounds_up else side // factor for side in (width, height)]
    level = Level(1, *reduced, float(factor))
    assert span_px0(level, Level(0, width, height, 1.0)) == (reduced[0] * factor, reduced[1] * factor)


@given(SIDES, SIDES)
def test_a_level_that_no_whole_factor_explains_shows_all(width, height):
    level = Level(1, width * 2 // 5, height * 2 // 5, 2.5)
    assert span_px0(level, Level(0, width, height, 1.0)) == (width, height)
