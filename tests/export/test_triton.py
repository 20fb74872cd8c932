"""The Triton repository: its configurations are those of the graphs, and two calls are all a client needs."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from darcnn.export.triton import plan_repository, write_repository
from darcnn.runtime.boxes import non_maximum_suppression
from darcnn.runtime.engines.engine_cache import CompiledEngine, EngineFacts
from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine
from darcnn.runtime.errors import OutputError, UsageError

TYPES = {
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_BOOL": "tensor(bool)",
}
TENSOR = re.compile(r'\{ name: "(\w+)" data_type: (\w+) dims: \[([\d, ]+)\] \}')
STRING = r'"(?:[^"\\]|\\.)*"'


@pytest.fixture(scope="session")
def repository(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(folder, plan_repository(bundle))
    return folder


def tensors(config, kind):
    """Return (name, type in ONNX Runtime's words, shape) of all inputs or outputs that a config states."""
    block = re.search(rf"^{kind} \[\n(.*?)\n\]$", config, re.MULTILINE | re.DOTALL)[1]
    found = TENSOR.findall(block)
    assert len(found) == len(block.splitlines())
    return [(name, TYPES[dtype], [int(n) for n in dims.split(",")]) for name, dtype, dims in found]


def parameter(config, key):
    return json.loads(re.search(rf'key: "{key}" value: {{ string_value: ({STRING}) }}', config)[1])


def test_the_repository_has_the_layout_that_triton_reads(repository):
    files = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    assert files == {
        f"tiny_{graph}/{file}" for graph in ("detect", "mask") for file in ("config.pbtxt", "1/model.onnx")
    }


@pytest.mark.parametrize("graph", ["detect", "mask"])
def test_a_configuration_states_the_tensors_of_its_graph(repository, bundle, graph):
    folder = repository / f"tiny_{graph}"
    config = (folder / "config.pbtxt").read_text()
    assert f'name: "tiny_{graph}"\nbackend: "onnxruntime"\nmax_batch_size: 0\n' in config
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for kind, found in (("input", session.get_inputs()), ("output", session.get_outputs())):
        assert tensors(config, kind) == [(tensor.name, tensor.type, tensor.shape) for tensor in found]
    assert (folder / "1" / "model.onnx").read_bytes() == bundle.read(f"{graph}.onnx")
    assert parameter(config, "sha256") == bundle.sha256
    assert json.loads(parameter(config, "manifest")) == json.loads(bundle.read("manifest.json"))


@pytest.mark.parametrize("graph", ["detect", "mask"])
def test_a_configuration_is_a_model_config_of_triton(repository, graph):
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed, which has Triton's own definition of a configuration")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (repository / f"tiny_{graph}" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (f"tiny_{graph}", "onnxruntime", 0)
    assert [list(t.dims) for t in config.input] == [shape for _, _, shape in tensors(text, "input")]


def test_a_client_that_knows_only_the_repository_finds_what_the_runtime_finds(repository, bundle, real_tile):
    config = (repository / "tiny_detect" / "config.pbtxt").read_text()
    limits = json.loads(parameter(config, "manifest"))["limits"]
    detect, mask = (
        onnxruntime.InferenceSession(
            repository / f"tiny_{graph}" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        for graph in ("detect", "mask")
    )
    boxes, scores, atlas, converged = detect.run(None, {"tile": np.stack([real_tile, real_tile[::-1]])})
    rows = np.flatnonzero(scores[1] >= limits["min_score"])
    if not converged[1]:
        rows = rows[non_maximum_suppression(boxes[1, rows], scores[1, rows], limits["nms_threshold"])]
    rows = rows[: limits["mask_batch"]]
    padded = np.zeros((limits["mask_batch"], 4), np.float32)
    padded[: len(rows)] = boxes[1, rows]
    feeds = {"atlas": atlas, "boxes": padded, "tile_index": np.full(len(padded), 1)}
    (masks,) = mask.run(None, feeds)
    assert len(rows) >= 20
    with closing(OnnxRuntimeEngine(bundle, device="cpu")) as engine:
        found = engine.detect(np.stack([real_tile, real_tile[::-1]]))
        expected = engine.masks(found, boxes[1, rows], np.ones(len(rows), np.int64))
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_allclose(masks[: len(rows)], expected, atol=1e-6)


def engine_of(bundle, backend, folder):
    facts = EngineFacts("tiny", bundle.sha256, backend, "11.4", (), None, 2, 128)
    return CompiledEngine(folder, facts, {"detect": b"one", "mask": b"two"})


def test_plans_of_tensorrt_are_served_in_place_of_the_graphs(bundle, tmp_path):
    write_repository(tmp_path, plan_repository(bundle, engine_of(bundle, "tensorrt", tmp_path)))
    assert (tmp_path / "tiny_mask" / "1" / "model.plan").read_bytes() == b"two"
    assert 'backend: "tensorrt"' in (tmp_path / "tiny_mask" / "config.pbtxt").read_text()


def test_engines_of_tensorrt_rtx_are_refused(bundle, tmp_path):
    with pytest.raises(UsageError, match="Triton does not run"):
        plan_repository(bundle, engine_of(bundle, "tensorrt-rtx", tmp_path))


def test_names_that_no_folder_can_have_are_mended(bundle):
    named = replace(bundle, manifest=replace(bundle.manifest, name='a/b "c"'))
    assert [graph.name for graph in plan_repository(named)] == ["a_b_c__detect", "a_b_c__mask"]


def test_a_repository_keeps_its_other_models_and_is_not_overwritten_unasked(bundle, tmp_path):
    (tmp_path / "other").mkdir()
    graphs = plan_repository(bundle)
    write_repository(tmp_path, graphs)
    with pytest.raises(OutputError, match="--overwrite"):
        write_repository(tmp_path, graphs)
    changed = [replace(graph, content=b"new") for graph in graphs]
    write_repository(tmp_path, changed, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "tiny_detect", "tiny_mask"}
    assert (tmp_path / "tiny_mask" / "1" / "model.onnx").read_bytes() == b"new"


def test_a_repository_that_cannot_be_written_leaves_nothing(bundle, tmp_path):
    graphs = plan_repository(bundle)
    broken = [graphs[0], replace(graphs[1], file="no/such/folder")]
    with pytest.raises(OutputError):
        write_repository(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_cannot_be_replaced_is_told_of_before_anything_is_deleted(bundle, tmp_path):
    graphs, repository = plan_repository(bundle), tmp_path / "repository"
    write_repository(repository, graphs)
    (repository / "tiny_mask").rename(tmp_path / "elsewhere")
    (repository / "tiny_mask").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="link or a file"):
        write_repository(repository, graphs, overwrite=True)
    assert contents(tmp_path) == before
    (repository / "tiny_mask").unlink()
    (repository / "tiny_mask").write_text("a file")
    with pytest.raises(OutputError, match="link or a file"):
        write_repository(repository, graphs, overwrite=True)
    assert (repository / "tiny_detect" / "1" / "model.onnx").is_file()


@pytest.mark.parametrize("failing", range(4))
def test_what_was_there_stays_until_the_new_is_in(bundle, tmp_path, monkeypatch, failing):
    graphs, repository = plan_repository(bundle), tmp_path / "repository"
    write_repository(repository, graphs)
    before, replace_, calls = contents(tmp_path), Path.replace, []

    def fail_once(self, target):
        calls.append(self)
        if len(calls) == failing + 1:
            raise OSError("the disk went away")
        return replace_(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(OutputError, match="disk went away"):
        write_repository(repository, [replace(g, content=b"new") for g in graphs], overwrite=True)
    assert contents(tmp_path) == before


def test_drafts_never_lie_in_the_repository(bundle, tmp_path, monkeypatch):
    repository, seen, write = tmp_path / "repository", [], Path.write_bytes
    write_repository(repository, plan_repository(bundle))

    def watch(self, content):
        seen.append({path.name for path in repository.iterdir()})
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", watch)
    write_repository(repository, plan_repository(bundle), overwrite=True)
    assert seen == [{"tiny_detect", "tiny_mask"}] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_a_name_that_no_disk_takes_is_one_line(bundle, tmp_path):
    named = replace(bundle, manifest=replace(bundle.manifest, name="n" * 300))
    with pytest.raises(OutputError, match="too long"):
        write_repository(tmp_path / "repository", plan_repository(named))
    assert list(tmp_path.iterdir()) == []
