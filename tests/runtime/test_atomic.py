"""Writing under a name of one's own: processes that write the same target do not meet."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from darcnn.runtime.sinks.atomic import atomic_file, atomic_folder


def test_two_that_write_the_same_target_both_succeed(tmp_path):
    with atomic_file(tmp_path / "a") as one:
        with atomic_file(tmp_path / "a") as other:
            other.write(b"other")
        one.write(b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    with atomic_folder(tmp_path / "b", replaces=True) as first:
        (first / "first").touch()
        with atomic_folder(tmp_path / "b", replaces=True) as second:
            (second / "second").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_drafts_are_named_as_what_cleans_up_expects(tmp_path):
    with atomic_file(tmp_path / "a"), atomic_folder(tmp_path / "b"):
        assert len(list(tmp_path.glob(".*.tmp"))) == 2


def test_the_longest_name_can_be_written(tmp_path):
    for name in ("x" * 255, "細" * 85):
        with atomic_file(tmp_path / name) as file:
            file.write(b"1")
        assert (tmp_path / name).read_bytes() == b"1"


def test_what_a_folder_replaces_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a", replaces=True):
        raise ZeroDivisionError
    with atomic_folder(tmp_path / "a", replaces=True) as draft:
        (draft / "new").touch()
        assert (tmp_path / "a" / "old").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_drafts_that_a_killed_process_left_go_and_others_stay(tmp_path):
    names = (".a.txt.1-ab.tmp", ".a.txt.2-cd.tmp", ".b.txt.3-ef.tmp")
    stale, fresh, other = (tmp_path / name for name in names)
    for draft in (stale, fresh, other):
        draft.write_bytes(b"half")
    for draft in (stale, other):
        os.utime(draft, (1, 1))
    with atomic_file(tmp_path / "a.txt") as file:
        file.write(b"whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.txt", fresh.name, other.name}


def test_what_is_set_aside_is_no_stale_draft(tmp_path, monkeypatch):
    place = tmp_path / "engine"
    place.mkdir()
    (place / "old").touch()
    os.utime(place, (1, 1))
    ages = []
    replace = Path.replace

    def watched(self, target):
        ages.extend(time.time() - draft.stat().st_mtime for draft in tmp_path.glob(".engine.*.tmp"))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with atomic_folder(place, replaces=True) as draft:
        (draft / "new").touch()
    assert max(ages) < 60
    assert [entry.name for entry in place.iterdir()] == ["new"]
