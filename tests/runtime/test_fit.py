"""Whether a model fits: said where sizes or scores are off, not where they are right or too few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.fit import ModelFit, warn_of_kind
from darcnn.runtime.intensity import IntensityRule

FAST = settings(deadline=None, max_examples=50)


def warnings_of(diameters: list[float], scores: list[float], *, nominal: float = 20.0) -> list[str]:
    fit = ModelFit(nominal)
    fit.add(np.pi / 4.0 * np.square(np.array(diameters)), np.array(scores))
    return list(fit.warnings())


def test_what_fits_gives_no_warning() -> None:
    assert warnings_of([15.0, 20.0, 26.0] * 10, [0.99] * 30) == []


@pytest.mark.parametrize(("diameter", "said"), [(33.0, "33 px wide"), (12.0, "12 px wide")])
def test_objects_of_another_size_are_told_with_the_option_to_pass(diameter: float, said: str) -> None:
    (warning,) = warnings_of([diameter] * 30, [0.99] * 30)
    assert said in warning
    assert "looks for 20 px" in warning
    assert f"--diameter {diameter:.0f}" in warning


def test_low_scores_are_told() -> None:
    (warning,) = warnings_of([20.0] * 10, [0.775] * 7 + [0.99] * 3)
    assert "unsure" in warning
    assert "0.78" in warning or "0.77" in warning


@pytest.mark.parametrize(
    ("measured", "score", "n", "is_told"),
    [(6.0, 0.83, 30, True), (6.0, 0.97, 30, False), (6.0, 0.97, 5, True), (12.0, 0.83, 30, False)],
)
def test_objects_as_small_as_noise_are_doubted_where_they_are_few_or_score_low(
    measured: float, score: float, n: int, is_told: bool
) -> None:
    fit = ModelFit(20.0, measured)
    fit.add(np.full(n, np.pi / 4.0 * 20.0**2), np.full(n, score))
    assert any("what noise looks like" in warning for warning in fit.warnings()) == is_told


def test_a_handful_of_objects_tells_nothing() -> None:
    assert warnings_of([100.0] * 9, [0.5] * 9) == []


@FAST
@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0, 1)), min_size=20), st.integers(1, 19))
def test_it_does_not_matter_in_how_many_parts_objects_come(
    objects: list[tuple[float, float]], cut: int
) -> None:
    areas, scores = np.array(objects).T
    whole, parts = ModelFit(20.0), ModelFit(20.0)
    whole.add(areas, scores)
    parts.add(areas[:cut], scores[:cut])
    parts.add(areas[cut:], scores[cut:])
    assert list(whole.warnings()) == list(parts.warnings())


@pytest.mark.parametrize(
    ("channels", "kind", "rule", "words"),
    [
        (1, "percentile", "stain on glass", "looks like stain on glass"),
        (3, "full_range", "bright on dark", "is bright on dark"),
        (3, "percentile", "bright on dark", None),
        (3, "full_range", "stain on glass", None),
        (1, "percentile", "bright on dark", None),
        (1, "percentile", "colours on dark", "--channel"),
        (3, "full_range", "colours on dark", "is bright on dark"),
        (1, "percentile", None, None),
    ],
)
def test_an_image_of_another_kind_is_told(channels, kind, rule, words):
    model = make_oracle_manifest(OracleEngine(tile_px=32), halo_px=8).input
    told = warn_of_kind(replace(model, channels=channels, intensity=IntensityRule(kind)), rule)
    assert (told is None) == (words is None)
    assert words is None or words in told
