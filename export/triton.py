"""A model repository for NVIDIA's Triton Inference Server, made of a bundle: both graphs, as they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.engine_cache import CompiledEngine
from darcnn.runtime.engines.graphs import INPUTS, OUTPUTS, expected_signatures
from darcnn.runtime.errors import OutputError, UsageError
from darcnn.runtime.sinks.atomic import translated

__all__ = ["ServedGraph", "plan_repository", "write_repository"]

_VERSION = "1"  # Triton serves numbered versions
# Triton's names of types: `DataType` in its model_config.proto.
_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}


@dataclass(frozen=True, slots=True)
class ServedGraph:
    """One folder of the repository."""

    name: str  # of the folder, and of the model that clients ask for
    config: str  # config.pbtxt
    file: str  # the name under which the backend looks for the graph
    content: bytes


def plan_repository(bundle: Bundle, engine: CompiledEngine | None = None) -> list[ServedGraph]:
    """Return the models that serve `bundle`: NAME_detect and NAME_mask.

    Batches are static (`max_batch_size: 0`): dimensions are whole, the batch included. What a client needs to
    know beside tensors, the bundle's manifest, is a parameter of both models, which the server tells.

    Args:
        bundle: its graphs are served by Triton's ONNX Runtime backend,
        engine: or the plans of this engine by its TensorRT backend.
    Raises:
        UsageError: the engine is of TensorRT-RTX, which Triton has no backend for.
    """
    if engine is not None and engine.facts.backend != "tensorrt":
        raise UsageError(
            f"is an engine of {engine.facts.backend}, which Triton does not run",
            where=engine.folder,
            fix="build one with `darcnn-export engine --backend tensorrt`, or leave --engine out",
        )
    stem = re.sub(r"[^\w.-]+", "_", bundle.manifest.name)
    if engine is not None:
        backend, file = "tensorrt", "model.plan"
        contents = dict(engine.plans)
    else:
        backend, file = "onnxruntime", "model.onnx"
        contents = {graph: bundle.read(f"{graph}.onnx") for graph in OUTPUTS}
    return [
        ServedGraph(
            f"{stem}_{graph}",
            "\n".join(_config(bundle, graph, f"{stem}_{graph}", backend)) + "\n",
            file,
            contents[graph],
        )
        for graph in OUTPUTS
    ]


def write_repository(folder: Path, graphs: list[ServedGraph], *, overwrite: bool = False) -> None:
    """Write `graphs` into the repository `folder`, beside what is there; each appears whole or not at all.

    Drafts, and what is replaced until the new is in, lie in a folder of their own beside the repository: a
    server that watches the repository takes every folder in it for a model.

    Raises:
        OutputError: one is there already and `overwrite` is false, something else than a folder has its name,
            or it cannot be written. What was there stays.
    """
    if os.path.ismount(folder):
        raise OutputError(
            "is a disk of its own, where models cannot be put in whole",
            where=folder,
            fix="name a folder in it, and let Triton serve that",
        )
    with translated(folder):
        for graph in graphs:
            _check_place(folder / graph.name, overwrite)
        beside = folder.resolve().parent
        beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".darcnn-triton-", dir=beside, ignore_cleanup_errors=True) as scratch:
            drafts, replaced = Path(scratch) / "drafts", Path(scratch) / "replaced"
            replaced.mkdir()
            for graph in graphs:
                _write_graph(drafts / graph.name, graph)
            folder.mkdir(exist_ok=True)
            with ExitStack() as undo:
                for graph in graphs:
                    place, old = folder / graph.name, replaced / graph.name
                    if place.exists():
                        place.replace(old)
                        undo.callback(old.replace, place)
                    (drafts / graph.name).replace(place)
                    undo.callback(place.replace, drafts / graph.name)
                undo.pop_all()  # all are in


def _check_place(place: Path, overwrite: bool) -> None:
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise OutputError(
            "is a link or a file, which is not replaced",
            where=place,
            fix="remove it, or choose another repository",
        )
    if place.exists() and not overwrite:
        raise OutputError("exists already", where=place, fix="pass --overwrite, or choose another repository")


def _write_graph(folder: Path, graph: ServedGraph) -> None:
    (folder / _VERSION).mkdir(parents=True)
    (folder / _VERSION / graph.file).write_bytes(graph.content)
    (folder / "config.pbtxt").write_text(graph.config, encoding="utf-8")


def _config(bundle: Bundle, graph: str, name: str, backend: str) -> Iterator[str]:
    """Yield the lines of config.pbtxt, a `ModelConfig` of Triton as protobuf text."""
    signature = expected_signatures(bundle)[graph]
    yield f"name: {_quoted(name)}"
    yield f"backend: {_quoted(backend)}"
    yield "max_batch_size: 0"
    yield from _tensors("input", {tensor: signature[tensor] for tensor in INPUTS[graph]})
    yield from _tensors("output", {tensor: signature[tensor] for tensor in OUTPUTS[graph]})
    yield "instance_group [ { count: 1 kind: KIND_AUTO } ]"
    for key, value in (("manifest", _manifest(bundle)), ("sha256", bundle.sha256)):
        yield f"parameters {{ key: {_quoted(key)} value: {{ string_value: {_quoted(value)} }} }}"


def _tensors(kind: str, signature: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    yield f"{kind} ["
    lines = [
        f"  {{ name: {_quoted(name)} data_type: {_TYPES[dtype]} dims: {list(shape)} }}"
        for name, (dtype, shape) in signature.items()
    ]
    yield ",\n".join(lines)
    yield "]"


def _manifest(bundle: Bundle) -> str:
    """Return manifest.json in one line."""
    return json.dumps(json.loads(bundle.read("manifest.json")), separators=(",", ":"))


def _quoted(text: str) -> str:
    """Return `text` as a string of protobuf's text format; JSON's escapes of ASCII are among its own."""
    return json.dumps(text)
