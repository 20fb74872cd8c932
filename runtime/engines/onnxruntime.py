"""Runs the two graphs of a bundle with ONNX Runtime, on a CPU or an NVIDIA GPU.

The CUDA path of the ONNX Runtime backend never ran on a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
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
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import BundleError, DeviceError, ShapeError, UsageError
from darcnn.runtime.manifest import Manifest

__all__ = ["DEVICES", "OnnxRuntimeEngine"]

DEVICES = ("auto", "cpu", "cuda")

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"

_INPUTS = {"detect": ("tile",), "mask": ("atlas", "boxes", "tile_index")}
_OUTPUTS = {"detect": ("boxes", "scores", "atlas", "converged"), "mask": ("masks",)}

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

Signature = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype, shape)

_log = logging.getLogger(__name__)


class OnnxRuntimeEngine:
    """An `Engine` on ONNX Runtime; all results are the caller's, the atlas lies on the host."""

    def __init__(self, bundle: Bundle, *, device: str) -> None:
        """Load both graphs.

        Args:
            bundle: the model; not needed afterwards.
            device: "cpu", "cuda", or "auto": CUDA where ONNX Runtime offers it and the model loads
                there, else the CPU.
        Raises:
            UsageError: no such device.
            DeviceError: "cuda" was asked for and does not serve.
            BundleError: ONNX Runtime cannot load a graph, or its tensors are not those of the manifest.
        """
        if device not in DEVICES:
            raise UsageError(
                f"no device {device!r}", where="--device", fix=f"choose one of {', '.join(DEVICES)}"
            )
        self._sessions: dict[str, Any] = _make_sessions(bundle, device)
        manifest = bundle.manifest
        self._provider: str = self._sessions["detect"].get_providers()[0]
        self._spec = EngineSpec(
            name=f"onnxruntime {onnxruntime.__version__} {self._provider}",
            batch=manifest.input.batch,
            tile_px=manifest.input.tile_px,
            channels=manifest.input.channels,
            detections=manifest.limits.detections,
            mask_batch=manifest.limits.mask_batch,
            mask_px=manifest.limits.mask_px,
        )

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
        spec = self._spec
        wanted = (spec.batch, spec.tile_px, spec.tile_px, spec.channels)
        if tiles.shape != wanted or tiles.dtype != np.uint8:
            raise ShapeError(f"tiles are {tiles.dtype} {tiles.shape}, not uint8 {wanted}")
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
        n_boxes, spec = len(boxes), self._spec
        if boxes.shape != (n_boxes, 4) or tile_index.shape != (n_boxes,):
            raise ShapeError(f"boxes {boxes.shape} and tile_index {tile_index.shape} do not fit")
        if n_boxes and not 0 <= tile_index.min() <= tile_index.max() < spec.batch:
            raise ShapeError(f"tile_index goes from {tile_index.min()} to {tile_index.max()} of {spec.batch}")
        masks = np.empty((n_boxes, spec.mask_px, spec.mask_px), np.float32)
        for start in range(0, n_boxes, spec.mask_batch):
            rows = slice(start, min(start + spec.mask_batch, n_boxes))
            size = rows.stop - start
            # The last batch is filled up with the whole of tile 0: any box that certainly has pixels.
            padded = np.tile(np.array([0, 0, spec.tile_px, spec.tile_px], np.float32), (spec.mask_batch, 1))
            index = np.zeros(spec.mask_batch, np.int64)
            padded[:size], index[:size] = boxes[rows], tile_index[rows]
            (found,) = self._run("mask", {"atlas": detections.atlas, "boxes": padded, "tile_index": index})
            masks[rows] = found[:size]
        return masks

    def close(self) -> None:
        """Release both graphs; closing twice is allowed."""
        self._sessions = {}

    def _run(self, graph: str, feeds: Mapping[str, NDArray[Any]]) -> Sequence[Any]:
        if not self._sessions:
            raise ValueError("the engine is closed")
        try:
            outputs: Sequence[Any] = self._sessions[graph].run(list(_OUTPUTS[graph]), feeds)
        except _RUN_ERRORS as err:
            raise DeviceError(
                f"ONNX Runtime failed on the {graph} graph ({_first_line(err)})",
                where=self._provider,
                fix="free memory, or pass --device cpu",
            ) from err
        return outputs


def _make_sessions(bundle: Bundle, device: str) -> dict[str, Any]:
    if device != "cpu":
        try:
            return _load_graphs(bundle, _CUDA)
        except DeviceError as err:
            if device == "cuda":
                raise
            _log.info("running on the CPU: %s", err)
    return _load_graphs(bundle, _CPU)


def _load_graphs(bundle: Bundle, provider: str) -> dict[str, Any]:
    if provider not in onnxruntime.get_available_providers():
        raise _missing_cuda()
    if provider == _CUDA:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
            onnxruntime.preload_dlls()  # the CUDA and cuDNN libraries that pip installed
    expected = _expected_signatures(bundle)
    sessions = {graph: _make_session(bundle, graph, provider) for graph in ("detect", "mask")}
    for graph, session in sessions.items():
        _check_signature(bundle, graph, expected[graph], _signature(session))
    return sessions


def _make_session(bundle: Bundle, graph: str, provider: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; what matters is raised
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never its own binary format
    # Idle threads would spin in wait of the next operator and take the cores from the readers that
    # prepare the next tiles. The number of threads stays ONNX Runtime's own: one per core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    providers = [provider] if provider == _CPU else [provider, _CPU]  # some operators have no CUDA kernel
    content = bundle.read(f"{graph}.onnx")
    try:
        # enable_fallback=0: a provider that fails is an error here, not a silent and slow CPU
        session = onnxruntime.InferenceSession(content, options, providers=providers, enable_fallback=0)
    except _LOAD_ERRORS as err:
        if provider == _CUDA:
            raise _cuda_error(_first_line(err)) from err
        raise BundleError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {graph}.onnx ({_first_line(err)})",
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


def _expected_signatures(bundle: Bundle) -> dict[str, Signature]:
    """Return the tensors that the two graphs of this bundle must have, inputs and outputs together."""
    manifest: Manifest = bundle.manifest
    sizes, limits = manifest.input, manifest.limits
    atlas = manifest.graphs.get("detect", {}).get("atlas")
    if atlas is None:
        raise BundleError(
            "manifest.json does not say what atlas is", where=bundle.path, fix="export the model again"
        )
    batch, tile = sizes.batch, sizes.tile_px
    return {
        "detect": {
            "tile": ("uint8", (batch, tile, tile, sizes.channels)),
            "boxes": ("float32", (batch, limits.detections, 4)),
            "scores": ("float32", (batch, limits.detections)),
            "atlas": ("float32", atlas[1]),
            "converged": ("bool", (batch,)),
        },
        "mask": {
            "atlas": ("float32", atlas[1]),
            "boxes": ("float32", (limits.mask_batch, 4)),
            "tile_index": ("int64", (limits.mask_batch,)),
            "masks": ("float32", (limits.mask_batch, limits.mask_px, limits.mask_px)),
        },
    }


def _signature(session: Any) -> Signature:
    return {
        tensor.name: (_DTYPES.get(tensor.type, tensor.type), tuple(tensor.shape))
        for tensor in (*session.get_inputs(), *session.get_outputs())
    }


def _check_signature(bundle: Bundle, graph: str, expected: Signature, found: Signature) -> None:
    stated = bundle.manifest.graphs.get(graph, {})
    for source, signature in (("manifest.json", stated), (f"{graph}.onnx", found)):
        for name in sorted(set(expected) | set(signature)):
            if signature.get(name) != expected.get(name):
                raise BundleError(
                    f"{source} has {_describe(name, signature)} in the {graph} graph, "
                    f"the model's input and limits ask for {_describe(name, expected)}",
                    where=bundle.path,
                    fix="export the model again",
                )


def _describe(name: str, signature: Signature) -> str:
    if name not in signature:
        return f"no {name}"
    kind, shape = signature[name]
    return f"{name} {kind} {list(shape)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
