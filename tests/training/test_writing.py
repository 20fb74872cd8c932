"""Writing: a name that exists is complete, and a full disk is one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors import SafetensorError

from darcnn.runtime.errors import OutputError
from darcnn.training import checkpoint
from darcnn.training.checkpoint import CheckpointInfo, load_network, save_checkpoint
from darcnn.training.config import Recipe
from darcnn.training.model.network import Darcnn
from darcnn.training.writing import disk_errors, new_file, write_csv

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
REFUSALS = [FULL, SafetensorError("Error while serializing: No space left on device (os error 28)")]


@pytest.fixture(params=REFUSALS, ids=["system", "safetensors"])
def refuse(request: pytest.FixtureRequest) -> Callable[..., NoReturn]:
    """What writes half of a file and then finds the disk full."""

    def write_half(content: object, path: Path, **options: object) -> NoReturn:
        path.write_bytes(b"half")
        raise request.param

    return write_half


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.txt"
    with new_file(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_weights_may_be_read_by_whoever_reads_other_files(
    tmp_path: Path, network: Darcnn, recipe: Recipe
) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    save_checkpoint(tmp_path, network, CheckpointInfo("source", 1, True, recipe))
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {plain.stat().st_mode}


def test_a_csv_has_a_line_a_name(tmp_path: Path) -> None:
    write_csv(
        {"a.mrc": {"aji": 0.5, "hits": 1.0}, "b": {"hits": 0.25, "aji": 0.0}}, tmp_path / "t", of="volume"
    )
    assert (tmp_path / "t").read_text().split() == [
        "volume,aji,hits",
        "a.mrc,0.5000,1.0000",
        "b,0.0000,0.2500",
    ]


def test_what_is_not_finished_leaves_the_old_file(tmp_path: Path, refuse: Callable[..., NoReturn]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OutputError, match="No space left on device") as caught, new_file(path) as temporary:
        refuse("new", temporary)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_interruption_and_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error), new_file(tmp_path / "a.txt"):
            raise error
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_the_checkpoint_before_and_says_so_in_one_line(
    tmp_path: Path,
    network: Darcnn,
    recipe: Recipe,
    refuse: Callable[..., NoReturn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_checkpoint(tmp_path, network, CheckpointInfo("source", 1, False, recipe))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        save_checkpoint(tmp_path, network, CheckpointInfo("source", 2, True, recipe))
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert load_network(tmp_path)[1].step == 1
