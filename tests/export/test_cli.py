"""`darcnn-export`: what it writes, what it refuses, and what it says."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from darcnn.export import parity
from darcnn.runtime.bundle import write_bundle
from darcnn.training.checkpoint import read_info, save_checkpoint


@pytest.mark.parametrize("command", ["bundle", "verify", "info", "engine", "quantise", "triton"])
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: darcnn-export" in out


def test_the_written_bundle_holds_the_name_and_limits_of_the_recipe(bundle):
    manifest = bundle.manifest
    assert (manifest.name, manifest.preset, manifest.input.batch) == ("tiny", "lite", 2)
    assert (manifest.input.tile_px, manifest.input.halo_px, manifest.limits.min_score) == (128, 32, 0.3)


def test_verify_passes_with_the_checkpoint_it_was_made_of(run, bundle_path, checkpoint):
    code, out, _ = run("verify", bundle_path, "--checkpoint", checkpoint)
    assert code == 0
    assert "they agree" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("discs")]
    n_backends = 1 + (importlib.util.find_spec("openvino") is not None)
    assert len(rows) == 8 * n_backends  # of three pictures
    assert sum(int(row[4]) for row in rows) > 50


def test_verify_compares_half_precision_with_pytorch_in_float32(run, bundle_path, checkpoint):
    code, out, _ = run(
        "verify", bundle_path, "--checkpoint", checkpoint, "--precision", "fp16", "--backend", "onnxruntime"
    )
    assert (code, "they agree" in out) == (0, True)
    assert max(float(line.split()[-3]) for line in out.splitlines() if line.startswith("discs")) > 1e-5


def test_the_checkpoint_of_another_preset_is_refused(run, bundle, members, checkpoint, tmp_path):
    path = tmp_path / "other.darcnn"
    write_bundle(path, replace(bundle.manifest, preset="resnet50"), members)
    code, _, err = run("verify", path, "--checkpoint", checkpoint)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "holds preset lite, the bundle resnet50" in err


def test_verify_fails_with_another_checkpoint(run, bundle_path, make_network, make_checkpoint):
    network = make_network()
    with torch.no_grad():
        network.target_heads.box_predictor.cls_score.bias.add_(torch.tensor([0.0, 0.5]))
    code, out, _ = run("verify", bundle_path, "--checkpoint", make_checkpoint(network))
    assert code == 1
    assert "they disagree" in out


def test_verify_passes_with_the_source_stage_that_a_bundle_was_made_of(
    run, make_network, make_checkpoint, tmp_path
):
    network = make_network(seed=3)
    folder = make_checkpoint(network)
    save_checkpoint(
        tmp_path / "source", network, replace(read_info(folder), stage="source", step=5, complete=True)
    )
    code, _, err = run("bundle", tmp_path / "source", "--out", tmp_path / "m.darcnn", "--batch", "2")
    assert code == 0, err
    code, out, err = run("verify", tmp_path / "m.darcnn", "--checkpoint", tmp_path / "source")
    assert code == 0, out + err


@pytest.mark.usefixtures("makes_no_graphs")
def test_nothing_is_written_where_the_graphs_disagree(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(parity.LIMITS["fp32"], "score", 0.0)
    out = tmp_path / "new.darcnn"
    code, _, err = run("bundle", checkpoint, "--out", out, "--batch", "2")
    assert code == 2
    assert "do not agree" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_not_replaced_unasked(run, bundle_path, checkpoint):
    before = bundle_path.read_bytes()
    code, _, err = run("bundle", checkpoint, "--out", bundle_path)
    assert code == 2
    assert "--overwrite" in err
    assert bundle_path.read_bytes() == before


@pytest.mark.usefixtures("makes_no_graphs")
def test_overwrite_replaces_the_bundle(run, bundle, checkpoint, tmp_path):
    out = tmp_path / "old.darcnn"
    out.write_bytes(b"old")
    code, said, _ = run("bundle", checkpoint, "--out", out, "--batch", "2", "--overwrite")
    assert (code, "MB" in said) == (0, True)
    assert out.read_bytes() == bundle.path.read_bytes()


def test_info_says_what_the_bundle_is(run, bundle):
    code, out, _ = run("info", bundle.path)
    assert code == 0
    for word in (
        "tiny: lite",
        bundle.sha256,
        *bundle.manifest.files.values(),
        "full_range",
        "AJI 0.5",
        "CC0",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["info", "nowhere.darcnn"], "nowhere.darcnn"),
        (["bundle", "nowhere", "--out", "new.darcnn"], "nowhere"),
        (["verify", "nowhere.darcnn", "--checkpoint", "nowhere"], "nowhere.darcnn"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--data", "{empty}"], "--data"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--tile", "100"], "--tile"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--tile", "1000000"], "--tile"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--proposals", "3841"], "up to 3840"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--detections", "401"], "chosen from"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--licence", "nowhere.txt"], "nowhere.txt"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--licence", "{long}"], "long.txt: is longer"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--name", "a/b"], "--name: no model may have"),
        (["quantise", "nuclei-he", "--data", "{empty}", "--out", "a\tb.darcnn"], "--out: no model may have"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--tile", "0"], "--tile"),
        (["bundle", "{checkpoint}", "--out", "no/such/new.darcnn"], "folder does not exist"),
        (["bundle", "{checkpoint}", "--out", "new.darcnn", "--data", "nosuch"], "no folder nosuch"),
        (["verify", "nuclei-he"], "--data"),
        (["verify", "nuclei-he", "--data", "nosuch"], "no folder nosuch"),
        (["verify", "nuclei-he", "--data", "{empty}"], "no image"),
        (["verify", "nuclei-he", "--data", "{empty}", "--backend", "onnxruntime"], "name another one"),
        (["verify", "particles-cryoet", "--data", "{empty}"], "int8"),
        (["verify", "nuclei-he", "--data", "{empty}", "--json", "no/such/file"], "folder does not exist"),
        (["quantise", "nuclei-he", "--data", "{empty}", "--out", "new.darcnn"], "--data"),
        (["quantise", "nuclei-he", "--data", "nosuch", "--out", "new.darcnn"], "no folder nosuch"),
        (["quantise", "nuclei-he", "--data", "{empty}", "--out", "no/such/new.darcnn"], "does not exist"),
        (["quantise", "nuclei-he", "--data", "{empty}", "--out", "a" * 300 + ".darcnn"], "too long"),
        (["triton", "nowhere.darcnn", "--out", "repository"], "nowhere.darcnn"),
        (["engine", "nowhere.darcnn", "--precision", "fp16"], "nowhere.darcnn"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, word, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    long = tmp_path / "empty" / "long.txt"
    long.write_bytes(bytes(2**20 + 1))
    code, out, err = run(*(part.format(checkpoint=checkpoint, empty=empty, long=long) for part in arguments))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert word in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_runtimes_are_compared_without_a_checkpoint_and_recorded(run, bundle_path, pictures, tmp_path):
    record = tmp_path / "verdict.json"
    options = ("--precision", "fp16", "--backend", "onnxruntime", "--json", record)
    code, out, _ = run("verify", bundle_path, "--data", pictures, *options)
    assert (code, "they agree" in out) == (0, True)
    told = json.loads(record.read_text())
    assert (told["agrees"], told["precision"], told["limits"]["score"]) == (True, "fp16", 0.02)
    assert {"darcnn", "onnxruntime"} <= set(told["versions"])
    found = told["backends"]["onnxruntime"]
    assert (found["reference"], len(found["tiles"])) == ("float32", 8)
    assert found["objects"] == sum(tile["n_reference"] + tile["n_bundle"] for tile in found["tiles"])
    assert max(tile["score"] for tile in found["tiles"]) > 1e-5


@pytest.mark.usefixtures("makes_no_graphs")
def test_nothing_is_written_where_no_image_shows_an_object(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "STRONG_SCORE", 1.0)  # none counts
    code, _, err = run("bundle", checkpoint, "--out", tmp_path / "new.darcnn", "--batch", "2")
    assert code == 2
    assert "no object on any of the images" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "training", [b"nothing", b"\xff", b"[1]", b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900]
)
def test_a_bundle_with_a_broken_record_is_told_of_in_one_line(run, bundle, members, tmp_path, training):
    path = tmp_path / "odd.darcnn"
    write_bundle(path, bundle.manifest, members | {"training.json": training})
    code, out, err = run("info", path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "training.json is not" in err or "training.json nests too deep" in err


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ([1, 2], "  [1, 2]"),
        ("good", "  good"),
        ({"AJI": 0.123456, "set": {"all": {"F1": 1 / 3}}}, "  AJI 0.123"),
        ({"set": {"all": {"F1": 1 / 3, "n": 7}}}, "  set, all: F1 0.333, n 7"),
    ],
)
def test_info_prints_figures_rounded_whatever_they_are(run, bundle, members, tmp_path, figures, shown):
    path = tmp_path / "odd.darcnn"
    training = json.dumps({"figures": figures}).encode()
    write_bundle(path, bundle.manifest, members | {"training.json": training})
    code, out, _ = run("info", path)
    lines = out.splitlines()
    assert code == 0
    assert shown in lines
    assert lines[lines.index(shown) - 1] == "figures    as measured when it was trained:"


def test_half_precision_needs_onnx_only(bundle_path, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'darcnn[tensorrt-rtx]'")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm', 'onnxscript'))); "
        "from darcnn.export.cli import main; main(sys.argv[1:])"
    )
    out = tmp_path / "engine"
    options = ["--precision", "fp16", "--target", "sm86", "--out", str(out)]
    command = [sys.executable, "-c", code, "engine", str(bundle_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "detect.plan").is_file()


def test_without_torch_the_commands_name_the_extra(run, checkpoint, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    code, _, err = run("bundle", checkpoint, "--out", "new.darcnn")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "pip install 'darcnn[export]'" in err


def test_half_precision_without_onnx_asks_for_onnx_alone(run, bundle_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    code, _, err = run("engine", bundle_path, "--precision", "fp16")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.strip().endswith("run pip install onnx")


def test_the_command_is_imported_without_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None; "
        "from darcnn.export.cli import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bundle" in done.stdout


def test_an_engine_is_built_for_gpus_that_are_not_here(run, bundle_path, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'darcnn[tensorrt-rtx]'")
    out = tmp_path / "engine"
    code, text, _ = run("engine", bundle_path, "--target", "sm86", "--target", "sm89", "--out", out)
    assert code == 0
    assert str(out) in text
    assert {path.name for path in out.iterdir()} == {"detect.plan", "mask.plan", "engine.json"}
    half = tmp_path / "half"
    assert run("engine", bundle_path, "--target", "sm75", "--precision", "fp16", "--out", half)[0] == 0
    assert json.loads((half / "engine.json").read_text())["facts"]["precision"] == "fp16"
    code, _, error = run("engine", bundle_path, "--target", "sm86", "--out", out)
    assert (code, len(error.splitlines()), "--overwrite" in error) == (2, 1, True)
    assert run("engine", bundle_path, "--target", "sm86", "--out", out, "--overwrite")[0] == 0
    assert json.loads((out / "engine.json").read_text())["facts"]["targets"] == ["sm86"]
    assert run("engine", bundle_path, "--workspace", 1 << 21, "--out", tmp_path / "other")[0] == 2
    code, _, error = run("engine", bundle_path, "--target", "sm99", "--out", tmp_path / "other")
    assert code == 2
    assert "no target 'sm99'" in error
    assert not (tmp_path / "other").exists()


def test_a_repository_for_triton_is_written_and_named(run, bundle_path, tmp_path):
    repository = tmp_path / "repository"
    code, out, _ = run("triton", bundle_path, "--out", repository)
    assert (code, out.split()) == (0, [str(repository / f"tiny_{graph}") for graph in ("detect", "mask")])
    assert (repository / "tiny_mask" / "config.pbtxt").is_file()
    code, _, error = run("triton", bundle_path, "--out", repository)
    assert (code, len(error.splitlines())) == (2, 1)
    code, _, error = run("triton", bundle_path, "--out", repository, "--engine", tmp_path, "--overwrite")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "no readable engine" in error


@pytest.mark.usefixtures("makes_no_graphs")
def test_of_a_whole_run_the_most_trusted_round_is_exported(run, checkpoint, tmp_path, pictures):
    for name, trust in (("refine-1", 0.8), ("refine", 0.7)):
        shutil.copytree(checkpoint, tmp_path / "run" / name)
        content = {"agreement": trust, "separation": trust, "n_objects": 5}
        (tmp_path / "run" / name / "trust.json").write_text(json.dumps(content))
    code, _, error = run(
        "bundle", tmp_path / "run", "--out", tmp_path / "a.darcnn", "--data", pictures, "--batch", "2"
    )
    assert code == 0
    assert "taking the most trusted round, refine-1" in error


def test_verify_takes_the_folder_of_a_whole_run(run, bundle_path, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run" / "refine")
    code, out, _ = run("verify", bundle_path, "--checkpoint", tmp_path / "run", "--backend", "onnxruntime")
    assert (code, "they agree" in out) == (0, True)
