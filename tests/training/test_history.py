"""History: every step once, whatever was interrupted, the same for TensorBoard and as CSV."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from darcnn.runtime.errors import OutputError
from darcnn.training import history
from darcnn.training.history import HISTORY_FILE, History, read_history, sheets_of
from darcnn.training.model.network import Darcnn

RED = (200, 0, 0)


def note(folder: Path, steps: range, *, first: int = 0, end: bool = True) -> None:
    """Note made-up values of `steps`; without an `end` as a process that was killed after a checkpoint."""
    noted = History(folder, "source", first)
    for step in steps:
        noted.add(step, {"total": 10.0 / (step + 1), "rpn_box": step / 3})
    noted.flush()
    if end:
        noted.__exit__(None, None, None)


def red_sheet(network: Darcnn) -> Image.Image:
    assert not network.training
    return Image.new("RGB", (8, 6), RED)


def test_what_was_noted_is_read_back(tmp_path: Path) -> None:
    note(tmp_path, range(50))
    rows = read_history(tmp_path)
    assert [row["step"] for row in rows] == list(range(50))
    assert rows[7] == {"step": 7, "total": 10.0 / 8, "rpn_box": 7 / 3}


def test_a_folder_without_history_has_none(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    assert sheets_of(tmp_path) == []


def test_a_resumed_stage_has_every_step_once_and_the_file_of_one_that_never_stopped(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    note(whole, range(70))
    note(parts, range(47), end=False)  # killed; the checkpoint is of step 30
    note(parts, range(30, 70), first=30)
    assert (parts / HISTORY_FILE).read_bytes() == (whole / HISTORY_FILE).read_bytes()
    events = EventAccumulator(str(parts / "scalars"))
    events.Reload()
    scalars = events.Scalars("source/total")
    assert [event.step for event in scalars] == list(range(70))
    assert [event.value for event in scalars] == pytest.approx([10.0 / (step + 1) for step in range(70)])


def test_a_line_cut_short_does_not_count(tmp_path: Path) -> None:
    note(tmp_path, range(20))
    with (tmp_path / HISTORY_FILE).open("a", newline="") as file:
        file.write("1")  # the beginning of 19, say
    note(tmp_path, range(20, 21), first=20)
    assert [row["step"] for row in read_history(tmp_path)] == list(range(21))


def test_a_stage_that_begins_anew_forgets_what_an_earlier_try_left(tmp_path: Path, network: Darcnn) -> None:
    with History(tmp_path, "source", 0) as noted:
        noted.add(0, {"total": 1.0})
        noted.show(9, red_sheet, network)
    with History(tmp_path, "source", 0):
        pass
    assert read_history(tmp_path) == []
    assert sheets_of(tmp_path) == []


def test_a_sheet_is_a_picture_and_an_image_of_tensorboard(tmp_path: Path, network: Darcnn) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with History(tmp_path, "adapt", 0) as noted:
        noted.show(120, red_sheet, network)
    ((step, path),) = sheets_of(tmp_path)
    assert step == 120
    with Image.open(path) as picture:
        assert picture.size == (8, 6)
        assert picture.getpixel((0, 0)) == RED
    events = EventAccumulator(str(tmp_path / "scalars"))
    events.Reload()
    (image,) = events.Images("adapt/findings")
    assert (image.step, image.width, image.height) == (120, 8, 6)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_shown_in_evaluation_and_keeps_its_mode(
    tmp_path: Path, network: Darcnn, training: bool
) -> None:
    network.train(training)
    with History(tmp_path, "adapt", 0) as noted:
        noted.show(1, red_sheet, network)
    assert all(part.training == training for part in network.modules())


def test_processes_other_than_the_first_write_nothing(
    tmp_path: Path, network: Darcnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "is_first", lambda: False)
    with History(tmp_path, "adapt", 0) as noted:
        noted.add(0, {"total": 1.0})
        noted.show(1, red_sheet, network)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        History(tmp_path / "file", "source", 0)
