"""Runs the two graphs of a bundle with ONNX Runtime, on a CPU or an NVIDIA GPU.

The CUDA path of the ONNX Runtime backend never ran on a GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoModel,
    NotImplemented,
    RuntimeException,
)

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.cores import core_limit
from darcnn.runtime.engines.graphs import (
    OUTPUTS,
    Signature,
    advise_memory,
    check_signature,
    check_tiles,
    first_line,
    make_spec,
    run_masks,
)
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import BundleError, DeviceError, UsageError

__all__ = ["DEVICES", "OnnxRuntimeEngine"]

DEVICES = ("auto", "cpu", "cuda")

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"

# ONNX Runtime's exceptions share no base class of their own.
_LOAD_ERRORS = (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoModel,
    NotImplemented,
    RuntimeException,
    UnicodeDecodeError,  # it fails to decode the name of what it rejects
)
_RUN_ERRORS = (EPFail, Fail, RuntimeException)  # memory and devices; InvalidArgument would be a bug of ours

_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntimeEngine:
    """An `Engine` on ONNX Runtime; all results are the caller's, the atlas lies on the host."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        threads: int | None = None,
        tell: Callable[[str], None] = lambda words: None,
    ) -> None:
        """Load both graphs.

        Args:
            bundle: the model; not needed afterwards.
            device: "cpu", "cuda", or "auto": CUDA where ONNX Runtime offers it and the model loads
                there, else the CPU.
            threads: that compute on the CPU; None: one a core that this process may use.
            tell: is told why "auto" does not take CUDA.
        Raises:
            UsageError: no such device.
            DeviceError: "cuda" was asked for and does not serve.
            BundleError: ONNX Runtime cannot load a graph, or its tensors are not those of the manifest.
        """
        if device not in DEVICES:
            raise UsageError(
                f"no device {device!r}", where="--device", fix=f"choose one of {', '.join(DEVICES)}"
            )
        self._sessions: dict[str, Any] = _make_sessions(bundle, device, threads or core_limit() or 0, tell)
        self._provider: str = self._sessions["detect"].get_providers()[0]
        self._spec = make_spec(bundle, f"onnxruntime {onnxruntime.__version__} {self._provider}")

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        return self._spec

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        """Find objects on `tiles`, (B, S, S, C) uint8 with exactly B = spec.batch.

        Raises:
            ShapeError: `tiles` has another shape or type.
            DeviceError: memory or the device gave out.
        """
        check_tiles(self._spec, tiles)
        boxes, scores, atlas, converged = self._run("detect", {"tile": np.ascontiguousarray(tiles)})
        return Detections(boxes=boxes, scores=scores, converged=converged, atlas=atlas)

    def masks(
        self,
        detections: Detections,
        boxes: NDArray[np.float32],
        tile_index: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Return (M, m, m) mask probabilities for `boxes` (M, 4) px on tiles `tile_index` (M,); M is free.

        Raises:
            ShapeError: the arrays do not fit each other, or an index names no tile of the batch.
            DeviceError: memory or the device gave out.
        """
        atlas = {"atlas": detections.atlas}
        return run_masks(self._spec, boxes, tile_index, lambda feeds: self._run("mask", atlas | feeds)[0])

    def close(self) -> None:
        """Release both graphs; closing twice is allowed."""
        self._sessions = {}

    def _run(self, graph: str, feeds: Mapping[str, NDArray[Any]]) -> Sequence[Any]:
        if not self._sessions:
            raise ValueError("the engine is closed")
        try:
            outputs: Sequence[Any] = self._sessions[graph].run(list(OUTPUTS[graph]), feeds)
        except _RUN_ERRORS as err:
            raise DeviceError(
                f"ONNX Runtime failed on the {graph} graph ({first_line(err)})",
                where=self._provider,
                fix=advise_memory(self._spec, "free memory, or pass --device cpu"),
            ) from err
        return outputs


def _make_sessions(bundle: Bundle, device: str, threads: int, tell: Callable[[str], None]) -> dict[str, Any]:
    if device != "cpu":
        try:
            return _load_graphs(bundle, _CUDA, threads)
        except DeviceError as err:
            if device == "cuda":
                raise
            tell(f"not on CUDA: {err}")
    return _load_graphs(bundle, _CPU, threads)


def _load_graphs(bundle: Bundle, provider: str, threads: int) -> dict[str, Any]:
    if provider not in onnxruntime.get_available_providers():
        raise _missing_cuda()
    if provider == _CUDA:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
            onnxruntime.preload_dlls()  # the CUDA and cuDNN libraries that pip installed
    sessions = {graph: _make_session(bundle, graph, provider, threads) for graph in ("detect", "mask")}
    for graph, session in sessions.items():
        check_signature(bundle, graph, _signature(session))
    return sessions


def _make_session(bundle: Bundle, graph: str, provider: str, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; what matters is raised
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never its own binary format
    # Idle threads would spin in wait of the next operator and take the cores from the readers that
    # prepare the next tiles. 0 threads: ONNX Runtime's own number, one per core of the machine; it then binds
    # each to a core, also to one that this process is kept from.
    options.intra_op_num_threads = threads
    # Without it, CPUs that know no VNNI add up int8 products in 16 bits, which overflow: wrong, and no error.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Some operators have no CUDA kernel. Unless it is told, CUDA computes float32 in TensorFloat-32, which
    # has the digits of half precision.
    providers = [_CPU] if provider == _CPU else [(provider, {"use_tf32": "0"}), _CPU]
    content = bundle.read(f"{graph}.onnx")
    try:
        # enable_fallback=0: a provider that fails is an error here, not a silent and slow CPU
        session = onnxruntime.InferenceSession(content, options, providers=providers, enable_fallback=0)
    except _LOAD_ERRORS as err:
        if provider == _CUDA:
            raise _cuda_error(first_line(err)) from err
        raise BundleError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {graph}.onnx ({first_line(err)})",
            where=bundle.path,
            fix="upgrade with `pip install --upgrade onnxruntime`, or export the model again",
        ) from err
    if session.get_providers()[0] != provider:  # libraries or driver missing: it logs and goes on without
        raise _cuda_error("the driver or a library is missing")
    return session


def _missing_cuda() -> DeviceError:
    """Return why this ONNX Runtime offers no CUDA.

    The packages onnxruntime and onnxruntime-gpu share one folder, and pip may write the first over the
    second.
    """
    try:
        metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError:
        problem, fix = "this ONNX Runtime has no CUDA", "run `pip install 'darcnn[cuda]'`"
    else:
        problem = "onnxruntime was installed over onnxruntime-gpu"
        fix = "run `pip install --force-reinstall --no-deps onnxruntime-gpu`"
    return DeviceError(problem, where="--device cuda", fix=fix)


def _cuda_error(reason: str) -> DeviceError:
    return DeviceError(
        f"CUDA does not start ({reason})",
        where="--device cuda",
        fix="check the NVIDIA driver, run `pip install 'darcnn[cuda]'`, or pass --device cpu",
    )


def _signature(session: Any) -> Signature:
    return {
        tensor.name: (_DTYPES.get(tensor.type, tensor.type), tuple(tensor.shape))
        for tensor in (*session.get_inputs(), *session.get_outputs())
    }
