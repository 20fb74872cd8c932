"""Compiles the two graphs of a bundle with TensorRT, or with TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import gc
import importlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.cuda import gpu_name
from darcnn.runtime.engines.engine_cache import (
    EngineFacts,
    check_place,
    store_engine,
    timing_cache_path,
    write_engine,
)
from darcnn.runtime.engines.graphs import OUTPUTS, Signature, check_manifest, check_signature, first_line
from darcnn.runtime.engines.offsets import OFFSETS_FIX, OFFSETS_PROBLEM, has_offsets
from darcnn.runtime.errors import BundleError, DeviceError, UsageError
from darcnn.runtime.sinks.atomic import atomic_file

__all__ = [
    "BACKENDS",
    "DTYPES",
    "MAX_WORKSPACE_MIB",
    "BuildOptions",
    "build_engine",
    "build_plans",
    "load_backend",
]

BACKENDS: Mapping[str, str] = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}  # name -> its Python module

DTYPES: Mapping[str, str] = {"UINT8": "uint8", "FLOAT": "float32", "INT64": "int64", "BOOL": "bool"}
_MIB = 1 << 20
MAX_WORKSPACE_MIB = 1 << 20  # 1 TiB, more than any GPU has

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a user may choose when engines are built. The precision is that of the graphs."""

    backend: str  # one of BACKENDS
    # "sm86"; none: sm80 and later (TensorRT-RTX), this machine's GPU (TensorRT)
    targets: tuple[str, ...] = ()
    workspace_mib: int | None = None  # the most scratch memory a layer may take; None: what the GPU has
    is_version_compatible: bool = False  # TensorRT only: later versions of the same major run the engine


def load_backend(backend: str) -> Any:
    """Return the Python module of `backend`.

    Raises:
        UsageError: there is no such backend.
        DeviceError: it is not installed.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"no backend {backend!r}", where="--backend", fix=f"use one of {', '.join(BACKENDS)}"
        )
    try:
        return importlib.import_module(BACKENDS[backend])
    except (ImportError, OSError) as err:  # OSError: a library of it is missing
        raise DeviceError(
            f"{backend} is not installed ({first_line(err)})",
            where="--backend",
            fix=f"run `pip install 'darcnn[{backend}]'`",
        ) from err


def build_engine(
    bundle: Bundle,
    options: BuildOptions,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Compile both graphs of `bundle` into the user's cache, or into the folder `out`; return the folder.

    The cache has one engine of a kind, the newest; what is in `out` is replaced with `overwrite` only.

    Raises:
        DeviceError: the backend is not installed, or needs a GPU that is not there.
        UsageError: an option or the bundle is none that the backend compiles.
        BundleError: a graph cannot be compiled, or is not what the manifest says.
        OutputError: the engine cannot be written, or `out` is taken; what was there stays.
        KeyboardInterrupt: Ctrl-C was pressed; nothing is written.
    """
    options = replace(options, targets=tuple(sorted({target.lower() for target in options.targets})))
    if out is not None:  # before the minutes that it takes
        check_place(out, overwrite=overwrite)
    version: str = load_backend(options.backend).__version__
    sizes = bundle.manifest.input
    is_built_on_gpu = options.backend == "tensorrt"
    facts = EngineFacts(
        bundle_name=bundle.manifest.name,
        bundle_sha256=bundle.sha256,
        backend=options.backend,
        version=version,
        targets=options.targets,
        device=gpu_name() if is_built_on_gpu else None,
        batch=sizes.batch,
        tile_px=sizes.tile_px,
        is_version_compatible=options.is_version_compatible,
        precision=bundle.precision,
    )
    timings = timing_cache_path(options.backend, version, facts.device or "")
    known = b""
    with suppress(OSError):
        known = timings.read_bytes() if is_built_on_gpu else b""
    plans, known = build_plans(bundle, options, timing_cache=known, progress=progress)
    if out is None:
        folder = store_engine(facts, plans)
    else:
        folder = out
        write_engine(folder, facts, plans, overwrite=overwrite)
    if is_built_on_gpu:
        with suppress(OSError):  # the next build takes longer without
            timings.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(timings) as file:
                file.write(known)
    return folder


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector away meanwhile.

    TensorRT calls our logger with a lock held. A collection in there may free the builder of a build that
    failed, out of the traceback of its error, and the builder's end waits for that very lock.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """Give what Ctrl-C sets meanwhile, and raise KeyboardInterrupt at the end if it did.

    TensorRT swallows what is raised in the functions that it calls, KeyboardInterrupt too. Only the main
    thread may say what a signal does; elsewhere, and where Ctrl-C is ignored, nothing changes.
    """
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield stop
        return
    signal.signal(signal.SIGINT, lambda number, frame: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
        if stop.is_set():
            raise KeyboardInterrupt


@_without_collection()
def build_plans(
    bundle: Bundle,
    options: BuildOptions,
    *,
    timing_cache: bytes = b"",
    progress: Progress = lambda phase, done, total: None,
) -> tuple[dict[str, bytes], bytes]:
    """Return the compiled plan of each graph, and TensorRT's timing cache to be given next time.

    Shapes are static, so that the one optimisation profile is the graph itself.

    Args:
        bundle: the model.
        options: for what and how.
        timing_cache: what an earlier build with the same version on the same GPU returned; TensorRT-RTX,
            which times nothing, keeps none.
        progress: told how far a graph's compilation is.
    Raises:
        DeviceError: the backend is not installed, or needs a GPU that is not there.
        UsageError: an option or the bundle is none that the backend compiles.
        BundleError: a graph cannot be compiled, or is not what the manifest says.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    trt = load_backend(options.backend)
    check_manifest(bundle)
    if has_offsets(bundle):
        raise UsageError(OFFSETS_PROBLEM, where=bundle.path, fix=OFFSETS_FIX)
    plans: dict[str, bytes] = {}
    with _stopped_by_ctrl_c() as stop:
        for graph in OUTPUTS:
            if stop.is_set():
                break
            build = _Build(trt, bundle, graph, options)
            plans[graph], timing_cache = build.run(timing_cache, _make_monitor(trt, graph, progress, stop))
    return plans, timing_cache


class _Build:
    """The compilation of one graph: what it takes, from the parsed network on."""

    def __init__(self, trt: Any, bundle: Bundle, graph: str, options: BuildOptions) -> None:
        self._trt, self._bundle, self._graph, self._options = trt, bundle, graph, options
        self._logger = _make_logger(trt)
        try:
            self._builder = builder = trt.Builder(self._logger)
        except TypeError as err:  # so the bindings say that the library has returned nothing
            raise DeviceError(
                f"{options.backend} does not start ({self._logger.last})",
                where="--backend",
                fix="build on a machine with an NVIDIA GPU and driver, or pass --backend tensorrt-rtx",
            ) from err
        self._network = network = builder.create_network(
            1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        self._parser = parser = trt.OnnxParser(network, self._logger)  # the network's weights are its own
        if not parser.parse(bundle.read(f"{graph}.onnx")):
            raise self._refused(parser.get_error(0).desc() if parser.num_errors else self._logger.last)
        check_signature(bundle, graph, _signature_of(network))

    def run(self, timing_cache: bytes, monitor: Any) -> tuple[bytes, bytes]:
        """Return the plan, and the timing cache for the next."""
        config = self._builder.create_builder_config()
        _configure(self._trt, config, self._options)
        cache = None
        if self._options.backend == "tensorrt":
            cache = config.create_timing_cache(timing_cache)
            config.set_timing_cache(cache, ignore_mismatch=False)
        config.progress_monitor = monitor
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise self._refused(self._logger.last)
        return bytes(plan), timing_cache if cache is None else bytes(cache.serialize())

    def _refused(self, reason: str) -> BundleError:
        return BundleError(
            f"{self._trt.__name__} {self._trt.__version__} cannot compile {self._graph}.onnx "
            f"({first_line(reason)})",
            where=self._bundle.path,
            fix=f"{_advice(self._bundle, self._options)}, or run the model with --backend onnxruntime",
        )


def _advice(bundle: Bundle, options: BuildOptions) -> str:
    """Return what of a build that failed may be done otherwise."""
    hints = []
    if options.workspace_mib is not None:
        hints.append("raise --workspace or leave it out")
    if bundle.precision != "fp16" and "sm75" in map(str.lower, options.targets):
        hints.append("pass --precision fp16 to `darcnn-export engine`, as sm75 needs it")
    return ", or ".join(hints or ["try another version of it"])


def _signature_of(network: Any) -> Signature:
    """Return the inputs and outputs of a parsed graph."""
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    tensors += [network.get_output(index) for index in range(network.num_outputs)]
    return {
        tensor.name: (DTYPES.get(tensor.dtype.name, "unknown"), tuple(int(side) for side in tensor.shape))
        for tensor in tensors
    }


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)  # it has the digits of half precision; float32 is what was asked
    if options.workspace_mib is not None:
        if not 1 <= options.workspace_mib <= MAX_WORKSPACE_MIB:
            raise UsageError(
                f"{options.workspace_mib} MiB is not between 1 and {MAX_WORKSPACE_MIB}",
                where="--workspace",
                fix="give the scratch memory of a layer in MiB, or leave it out",
            )
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if options.is_version_compatible:
        if options.backend != "tensorrt":
            raise UsageError(
                "engines of TensorRT-RTX fit the version that built them only",
                where="--version-compatible",
                fix="leave it out",
            )
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if not options.targets:
        return
    if options.backend != "tensorrt-rtx":
        raise UsageError(
            "TensorRT compiles for the GPU in this machine",
            where="--target",
            fix="leave it out, or pass --backend tensorrt-rtx",
        )
    config.num_compute_capabilities = len(options.targets)
    for index, target in enumerate(options.targets):
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        if capability is None or not target.lower().startswith("sm"):
            known = (name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
            raise UsageError(f"no target {target!r}", where="--target", fix=f"use some of {', '.join(known)}")
        config.set_compute_capability(capability, index)


def _make_logger(trt: Any) -> Any:
    """Return a logger that prints nothing and remembers the last error, for our one line."""

    class _Logger(trt.ILogger):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:  # the lower, the worse
                self.last = first_line(message)

    return _Logger()


def _make_monitor(trt: Any, graph: str, progress: Progress, stop: threading.Event) -> Any:
    """Return what TensorRT tells of its progress; only whole phases at the top are passed on."""

    class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.totals:
                progress(f"{graph}: {phase_name}", step + 1, self.totals[phase_name])
            return not stop.is_set()  # true: go on

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return _Monitor()
