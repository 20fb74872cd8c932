"""Runs compiled engines with TensorRT or TensorRT-RTX on an NVIDIA GPU.

None of this ever ran on a GPU. What a machine without one allows is tested: the names that are used exist in
the real bindings, and engines of all shipped graphs are built (`darcnn.runtime.engines.tensorrt_build`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.cuda import DeviceBuffer, gpu_capability, gpu_name
from darcnn.runtime.engines.engine_cache import (
    CompiledEngine,
    find_engines,
    needs_target,
    read_engine,
    read_facts,
)
from darcnn.runtime.engines.graphs import (
    OUTPUTS,
    advise_memory,
    check_manifest,
    check_signature,
    check_tiles,
    make_spec,
    run_masks,
)
from darcnn.runtime.engines.offsets import OFFSETS_FIX, OFFSETS_PROBLEM, has_offsets
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.engines.tensorrt_build import load_backend
from darcnn.runtime.engines.tensorrt_graph import REBUILD, LoadedGraph
from darcnn.runtime.engines.uploads import Uploader
from darcnn.runtime.errors import BundleError, DeviceError, UsageError

__all__ = ["TensorRtEngine", "has_engine", "open_engine_in", "open_tensorrt"]


def open_tensorrt(bundle: Bundle, backend: str, *, precision: str | None = None) -> TensorRtEngine:
    """Return an engine on the compiled graphs of `bundle` that lie in the user's cache.

    Args:
        bundle: the model.
        backend: "tensorrt" or "tensorrt-rtx".
        precision: that the layers must compute in; None: that of the newest engine that loads.
    Raises:
        DeviceError: the backend or a GPU is missing, or no engine fits; the message has the command that
            builds one. Nothing is built here: that may take minutes.
        BundleError: the manifest contradicts itself.
    """
    machine = _examine(backend)
    check_manifest(bundle)
    misfits: list[str] = []
    failures: list[DeviceError] = []
    for compiled in _fitting(bundle, machine, precision, misfits):
        try:
            return TensorRtEngine(bundle, compiled)
        except DeviceError as err:
            failures.append(err.with_traceback(None))  # its frames would keep the engine on the GPU
    if failures:
        first = failures[0]
        failures.clear()
        raise first
    raise _nothing_fits(bundle, machine, precision, misfits)


def open_engine_in(folder: Path, bundle: Bundle, backend: str) -> TensorRtEngine:
    """Return an engine on the compiled graphs in `folder`, which must be of `backend` unless that is "auto".

    Raises:
        DeviceError: the backend or a GPU is missing, or the engine does not fit; the message says why.
        UsageError: the engine is of another backend.
        BundleError: the manifest contradicts itself.
    """
    facts = read_facts(folder)
    if backend not in ("auto", facts.backend):
        raise UsageError(
            f"is an engine of {facts.backend}, not of {backend}", where=folder, fix="leave out --backend"
        )
    check_manifest(bundle)
    return TensorRtEngine(bundle, _read(folder, bundle, _examine(facts.backend), None))


def has_engine(bundle: Bundle, backend: str, *, precision: str | None = None) -> bool:
    """Tell whether the user's cache holds an engine of `bundle`, in `precision` if given, that fits this GPU.

    Raises:
        DeviceError: the backend or a GPU is missing.
    """
    return next(_fitting(bundle, _examine(backend), precision, []), None) is not None


@dataclass(frozen=True, slots=True)
class _Machine:
    """What an engine must fit."""

    backend: str
    version: str  # of the backend
    capability: str  # of the GPU
    device: str  # as `gpu_name` has it


def _examine(backend: str) -> _Machine:
    trt, capability = load_backend(backend), gpu_capability()
    if backend == "tensorrt-rtx" and not hasattr(trt.ComputeCapability, capability.upper()):
        raise DeviceError(
            f"TensorRT-RTX {trt.__version__} does not know {capability}, this GPU",
            where=f"--backend {backend}",
            fix="choose another --backend: tensorrt knows data-centre GPUs",
        )
    return _Machine(backend, trt.__version__, capability, gpu_name())


def _fitting(
    bundle: Bundle, machine: _Machine, precision: str | None, misfits: list[str]
) -> Iterator[CompiledEngine]:
    """Yield the engines that fit; why others do not is added to `misfits`."""
    for folder in find_engines(bundle, machine.backend):
        try:
            yield _read(folder, bundle, machine, precision)
        except DeviceError as err:
            misfits.append(f"{err.where}: {err.problem}")


def _read(folder: Path, bundle: Bundle, machine: _Machine, precision: str | None) -> CompiledEngine:
    return read_engine(
        folder,
        bundle,
        version=machine.version,
        capability=machine.capability,
        device=machine.device,
        precision=precision,
    )


def _nothing_fits(
    bundle: Bundle, machine: _Machine, precision: str | None, misfits: list[str]
) -> DeviceError:
    if has_offsets(bundle):
        return DeviceError(OFFSETS_PROBLEM, where=bundle.path, fix=OFFSETS_FIX)
    command = f"darcnn-export engine {bundle.argument} --backend {machine.backend}"
    precision = precision or bundle.precision
    if machine.backend == "tensorrt-rtx" and needs_target(machine.capability):
        command += f" --target {machine.capability}"
        precision = "fp16" if precision == "fp32" else precision  # as Turing needs it
    if precision == "fp16":
        command += " --precision fp16"
    return DeviceError(
        misfits[0] if misfits else f"no {machine.backend} engine of {bundle.manifest.name} has been built",
        where=f"--backend {machine.backend}",
        fix=f"run `{command}`",
    )


class TensorRtEngine:
    """An `Engine` on TensorRT: a context and a stream for each graph, one more for uploads.

    All buffers are made once. The atlas stays on the GPU between `detect` and `masks`. After two runs a graph
    is recorded and launched as one (CUDA graphs). Tiles that are on the GPU already are taken from there;
    `upload` brings the next ones there while it computes.
    """

    def __init__(self, bundle: Bundle, compiled: CompiledEngine) -> None:
        """Load both plans onto the GPU.

        Raises:
            DeviceError: there is no GPU, its memory is full, a plan does not load or is not of this bundle.
        """
        trt = load_backend(compiled.facts.backend)
        self._logger = trt.Logger(trt.Logger.INTERNAL_ERROR)  # it prints to stdout, and errors are raised
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as err:  # so the bindings say that the library has returned nothing
            raise DeviceError(
                f"{compiled.facts.backend} does not start",
                where="GPU",
                fix="check that the NVIDIA driver is new enough, or choose another --backend",
            ) from err
        self._graphs: dict[str, LoadedGraph] = {}
        self._uploader: Uploader | None = None
        facts = compiled.facts
        if facts.is_version_compatible:  # such plans bring code along, which is run only if allowed
            self._runtime.engine_host_code_allowed = True
        name = f"{facts.backend} {facts.version} {facts.precision} {gpu_capability()}"
        self._spec = make_spec(bundle, name)
        advice = advise_memory(self._spec, "free GPU memory, or choose another --backend")
        try:
            self._load(bundle, compiled, advice)
        except BaseException:
            self.close()
            raise

    def _load(self, bundle: Bundle, compiled: CompiledEngine, advice: str) -> None:
        shared: dict[str, DeviceBuffer] = {}  # the atlas, by both graphs
        for graph in OUTPUTS:
            loaded = LoadedGraph(self._runtime, graph, compiled, shared, advice)
            self._graphs[graph] = loaded
            try:
                check_signature(bundle, graph, loaded.signature)
            except BundleError as err:
                raise DeviceError(f"does not fit: {err.problem}", where=compiled.folder, fix=REBUILD) from err
            shared = {"atlas": loaded.buffers["atlas"]}
        self._uploader = Uploader(self._graphs["detect"].buffers["tile"].shape)

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        return self._spec

    def upload(self, tiles: NDArray[np.uint8]) -> Any:
        """Queue a copy of `tiles` to the GPU and return at once what `detect` takes in their place.

        Another thread may compute meanwhile.

        Raises:
            ShapeError: `tiles` has another shape or type.
            DeviceError: the copy failed.
        """
        check_tiles(self._spec, tiles)
        if self._uploader is None:
            raise ValueError("the engine is closed")
        return self._uploader.upload(tiles)

    def detect(self, tiles: Any) -> Detections:
        """Find objects on `tiles`, (B, S, S, C) uint8 with exactly B = spec.batch, on the host or on the GPU.

        Raises:
            ShapeError: `tiles` has another shape or type.
            DeviceError: memory or the device gave out.
        """
        check_tiles(self._spec, tiles)
        found = self._open("detect").run({"tile": tiles})
        return Detections(found["boxes"], found["scores"], found["converged"], atlas=None)

    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return (M, m, m) mask probabilities for `boxes` (M, 4) px of the last `detect`; M is free.

        Raises:
            ShapeError: the arrays do not fit each other, or an index names no tile of the batch.
            DeviceError: memory or the device gave out.
        """
        graph = self._open("mask")
        return run_masks(self._spec, boxes, tile_index, lambda feeds: graph.run(feeds)["masks"])

    def close(self) -> None:
        """Release the GPU's memory; closing twice is allowed."""
        graphs, self._graphs = self._graphs, {}
        uploader, self._uploader = self._uploader, None
        with ExitStack() as releases:  # all of them, whatever becomes of one
            if uploader is not None:
                releases.callback(uploader.close)
            for graph in graphs.values():
                releases.callback(graph.close)

    def _open(self, graph: str) -> LoadedGraph:
        if not self._graphs:
            raise ValueError("the engine is closed")
        return self._graphs[graph]
