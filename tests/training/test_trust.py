"""Which round of a run is trusted most."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from darcnn.runtime.errors import InputError
from darcnn.training.checkpoint import CheckpointInfo, save_checkpoint
from darcnn.training.config import Recipe
from darcnn.training.model.network import Darcnn
from darcnn.training.trust import TRUST_FILE, most_trusted_round


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe, network: Darcnn) -> Path:
    for name in ("refine-1", "refine-2", "refine"):
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
        ({"refine_1": 0.5, "refine_2": 0.7, "refine": 0.6}, "refine-2"),
        ({"refine_1": 0.5, "refine_2": 0.7, "refine": 0.7}, "refine"),
        ({"refine_1": 0.8, "refine_2": 0.8, "refine": 0.7}, "refine-2"),
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
