"""An engine on the disk: nothing of the user's is lost for it, and what is there is whole or refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from darcnn.runtime.engines import engine_cache
from darcnn.runtime.engines.engine_cache import (
    engine_folder,
    find_engines,
    read_engine,
    store_engine,
    write_engine,
)
from darcnn.runtime.errors import DeviceError, OutputError

PLANS = {"detect": b"one", "mask": b"two"}
NEW_PLANS = {"detect": b"new", "mask": b"newer"}


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path, facts):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"no engine, such as thesis\.doc; name another --out"):
            write_engine(tmp_path / "mine", facts, PLANS, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.doc"]


def test_an_engine_is_replaced_only_when_asked(tmp_path, bundle, facts):
    folder = tmp_path / "mine"
    folder.mkdir()  # an empty one is free
    write_engine(folder, facts, PLANS)
    with pytest.raises(OutputError, match="holds an engine already; name another --out or pass --overwrite"):
        write_engine(folder, facts, NEW_PLANS)
    assert read_engine(folder, bundle).plans == PLANS
    write_engine(folder, facts, NEW_PLANS, overwrite=True)
    assert read_engine(folder, bundle).plans == NEW_PLANS
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_in_place_of_the_folder_is_said(tmp_path, facts):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="stands where a folder is needed"):
        write_engine(tmp_path / "mine", facts, PLANS, overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_engine(tmp_path, bundle, facts, monkeypatch):
    write_engine(tmp_path / "mine", facts, PLANS)

    def refuse(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(OutputError, match="no space left"):
            write_engine(tmp_path / "mine", facts, NEW_PLANS, overwrite=True)
    assert read_engine(tmp_path / "mine", bundle).plans == PLANS


def test_a_move_that_fails_leaves_the_earlier_engine(tmp_path, bundle, facts, monkeypatch):
    write_engine(tmp_path / "mine", facts, PLANS)
    replace_path, calls = Path.replace, []

    def fail_second(self, target):
        calls.append(target)
        if len(calls) == 2:  # the earlier one is aside
            raise OSError(errno.EIO, "Input/output error")
        return replace_path(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail_second)
        with pytest.raises(OutputError, match="Input/output error"):
            write_engine(tmp_path / "mine", facts, NEW_PLANS, overwrite=True)
    assert read_engine(tmp_path / "mine", bundle).plans == PLANS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tiny.darcnn"]


@pytest.mark.parametrize("is_same", [True, False])
def test_an_engine_that_another_process_wrote_meanwhile_is_as_good(
    tmp_path, bundle, facts, monkeypatch, is_same
):
    folder, theirs = engine_folder(facts, tmp_path), facts if is_same else replace(facts, batch=9)
    replace_path = Path.replace

    def be_late(self, target):
        if target == folder:
            monkeypatch.undo()
            write_engine(folder, theirs, PLANS)
        return replace_path(self, target)

    monkeypatch.setattr(Path, "replace", be_late)
    if is_same:
        assert store_engine(facts, NEW_PLANS, tmp_path) == folder
        assert read_engine(folder, bundle).plans == PLANS
    else:
        with pytest.raises(OutputError):
            store_engine(facts, NEW_PLANS, tmp_path)


def test_an_engine_goes_where_a_link_points(tmp_path, bundle, facts):
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "disk", target_is_directory=True)
    for plans in (PLANS, NEW_PLANS):
        write_engine(tmp_path / "mine", facts, plans, overwrite=True)
    assert read_engine(tmp_path / "disk", bundle).plans == NEW_PLANS
    assert (tmp_path / "mine").is_symlink()


def test_old_drafts_go_when_the_cache_is_written(tmp_path, facts):
    old, young, old_file = (tmp_path / f".{name}.1-ab.tmp" for name in ("old", "young", "file"))
    for draft in (old, young):
        draft.mkdir()
    (old / "detect.plan").touch()
    old_file.touch()
    for path in (old, old_file):
        os.utime(path, (time.time() - 4000,) * 2)
    folder = store_engine(facts, PLANS, tmp_path)
    assert {path for path in tmp_path.iterdir() if path.suffix != ".darcnn"} == {folder, young}


@pytest.mark.parametrize("name", ["/tmp/x", "../../x", "a\0b", "x" * 300, "...", "細胞" * 60])
def test_the_key_is_one_name_whatever_the_model_is_called(tmp_path, bundle, facts, name):
    named = replace(bundle, manifest=replace(bundle.manifest, name=name))
    folder = store_engine(replace(facts, bundle_name=name), PLANS, tmp_path)
    assert folder.parent == tmp_path
    assert not folder.name.startswith(".")
    assert list(find_engines(named, "tensorrt-rtx", tmp_path)) == [folder]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["plans"].pop("mask"),
        lambda content: content["plans"].update({"../detect": ""}),
        lambda content: content.update(plans=["detect", "mask"]),
        lambda content: content["facts"].update(version=5),
        lambda content: content["facts"].update(batch="2"),
        lambda content: content["facts"].update(targets=None),
    ],
)
def test_facts_that_are_none_are_refused(tmp_path, bundle, facts, change):
    write_engine(tmp_path / "mine", facts, PLANS)
    path = tmp_path / "mine" / "engine.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DeviceError, match="no readable engine"):
        read_engine(tmp_path / "mine", bundle, version="1.7.1", capability="sm86")


@pytest.mark.parametrize(
    ("change", "asked", "words"),
    [
        ({"precision": "fp16"}, {"precision": "fp32"}, "computes in fp16, not in fp32"),
        ({"targets": ()}, {"capability": "sm75"}, "for sm80 and later, this GPU is sm75"),
        (
            {"backend": "tensorrt", "targets": (), "device": "NVIDIA A100 sm80 driver 1"},
            {"capability": "sm89", "device": "NVIDIA L4 sm89 driver 1"},
            "built on NVIDIA A100 sm80 driver 1, this GPU is NVIDIA L4 sm89",
        ),
        (
            {"backend": "tensorrt", "targets": (), "device": None},
            {"device": "NVIDIA L4 sm89 driver 1"},
            "built on None",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, bundle, facts, change, asked, words):
    write_engine(tmp_path / "mine", replace(facts, **change), PLANS)
    with pytest.raises(DeviceError, match=words):
        read_engine(tmp_path / "mine", bundle, **asked)


def test_an_engine_that_vanishes_while_engines_are_looked_for_is_none(tmp_path, bundle, facts, monkeypatch):
    folder = store_engine(facts, PLANS, tmp_path)
    stat = Path.stat

    def vanish(self, **options):
        shutil.rmtree(folder, ignore_errors=True)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", vanish)
    assert list(engine_cache.find_engines(bundle, "tensorrt-rtx", tmp_path)) == []
