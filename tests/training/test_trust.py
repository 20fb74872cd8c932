"""Which round of a run is trusted most."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.protocol import Reader
from darcnn.runtime.segmenter import Segmenter
from darcnn.training.checkpoint import CheckpointInfo, save_checkpoint
from darcnn.training.config import Recipe
from darcnn.training.data.target import TargetImages
from darcnn.training.model.network import Darcnn
from darcnn.training.trust import TRUST_FILE, most_trusted_round, note_trust, read_trust
from darcnn.training.unlabelled import Trust


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe, network: Darcnn) -> Path:
    for name in ("refine-2", "refine-10", "refine"):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name, network, CheckpointInfo("refine", 1, True, recipe))
    return tmp_path


def note(run: Path, **trust: float) -> None:
    for name, value in trust.items():
        content = {"agreement": value, "separation": value, "n_objects": 5}
        (run / name.replace("_", "-") / TRUST_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("trust", "wanted"),
    [
        ({"refine_2": 0.5, "refine_10": 0.7, "refine": 0.6}, "refine-10"),
        ({"refine_2": 0.5, "refine_10": 0.7, "refine": 0.7}, "refine"),
        ({"refine_2": 0.8, "refine_10": 0.8, "refine": 0.7}, "refine-10"),
        ({"refine": 0.1}, "refine"),
        ({}, "refine"),
    ],
)
def test_the_most_trusted_round_is_taken_of_equal_ones_the_last(
    run: Path, trust: dict[str, float], wanted: str
) -> None:
    note(run, **trust)
    assert most_trusted_round(run).name == wanted


def test_a_run_that_is_not_finished_has_none(run: Path, recipe: Recipe, network: Darcnn) -> None:
    info = CheckpointInfo("refine", 1, False, recipe)
    save_checkpoint(run / "refine", network, replace(info, complete=False))
    with pytest.raises(InputError, match="no finished run"):
        most_trusted_round(run)
    with pytest.raises(InputError, match="no finished run"):
        most_trusted_round(run / "nowhere")


def test_a_stage_is_judged_again_only_where_it_would_be_exported_otherwise(
    tmp_path: Path, recipe: Recipe, network: Darcnn, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def judge(segmenter: Segmenter, reader: Reader, *, diameter_px: float) -> Trust:
        looks.append(segmenter.min_score)
        return Trust(0.5, segmenter.min_score, 1)

    monkeypatch.setattr("darcnn.training.trust.judge_image", judge)
    targets = TargetImages(data, recipe.target, 0)
    for min_score in (0.7, 0.7, 0.3):
        exported = replace(recipe, export=replace(recipe.export, min_score=min_score))
        note_trust(network, exported, targets, tmp_path)
        trust = read_trust(tmp_path)
        assert trust is not None
        assert trust.separation == pytest.approx(min_score)
    n_images = len(targets.images)
    assert looks == [0.7] * n_images + [0.3] * n_images
