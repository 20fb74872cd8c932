"""What the TensorRT backend needs of CUDA, through NVIDIA's own cuda-python; failures are one line.

None of this ever ran on a GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import DeviceError

__all__ = [
    "DeviceBuffer",
    "Event",
    "PinnedBuffer",
    "Stream",
    "copy_in",
    "copy_on_gpu",
    "copy_out",
    "copy_to_host",
    "gpu_capability",
    "gpu_name",
    "release_recorded",
    "visible_gpus",
]


_ELSE = "choose another --backend"


def _cudart() -> Any:
    """Return the CUDA runtime's bindings.

    Raises:
        DeviceError: they are not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as err:
        raise DeviceError(
            "cuda-python is not installed", where="--backend", fix="run `pip install cuda-python`"
        ) from err
    return runtime


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; return its result, of several a tuple, of none None.

    Raises:
        DeviceError: it failed.
    """
    cudart = _cudart()
    try:
        status, *results = getattr(cudart, name)(*arguments)
    except RuntimeError as err:  # the driver's library is not on this machine
        raise DeviceError(
            f"CUDA does not start ({str(err).splitlines()[0]})",
            where="GPU",
            fix=f"check the NVIDIA driver, or {_ELSE}",
        ) from err
    if status != cudart.cudaError_t.cudaSuccess:
        reason = getattr(status, "name", str(status))
        fix = "free GPU memory" if "MemoryAllocation" in reason else "check the NVIDIA driver"
        raise DeviceError(f"{name} failed ({reason})", where="GPU", fix=f"{fix}, or {_ELSE}")
    return results[0] if len(results) == 1 else tuple(results) or None


def gpu_capability(device: int = 0) -> str:
    """Return the compute capability of a GPU as "sm86".

    Raises:
        DeviceError: there is no GPU.
    """
    if _call("cudaGetDeviceCount") <= device:
        raise DeviceError(
            "no NVIDIA GPU on this machine", where="GPU", fix=f"check the NVIDIA driver, or {_ELSE}"
        )
    properties = _call("cudaGetDeviceProperties", device)
    return f"sm{properties.major}{properties.minor}"


def visible_gpus() -> list[str]:
    """Return how CUDA_VISIBLE_DEVICES names the GPUs that this process sees; none without CUDA."""
    try:
        n_gpus = _call("cudaGetDeviceCount")
    except DeviceError:
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",")[:n_gpus] if chosen else [str(number) for number in range(n_gpus)]


def gpu_name(device: int = 0) -> str:
    """Return name, compute capability and driver of a GPU, for the key of what is compiled on it.

    Raises:
        DeviceError: there is no GPU.
    """
    capability = gpu_capability(device)
    properties = _call("cudaGetDeviceProperties", device)
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return f"{name} {capability} driver {_call('cudaDriverGetVersion')}"


class Stream:
    """A CUDA stream; closing twice is allowed."""

    def __init__(self) -> None:
        # one that blocks would bar the whole process from the default stream while a graph is recorded
        self.handle: Any = _call("cudaStreamCreateWithFlags", _cudart().cudaStreamNonBlocking)

    def wait(self) -> None:
        """Return when all that was queued is done."""
        _call("cudaStreamSynchronize", self.handle)

    def wait_for(self, event: Event) -> None:
        """Let what is queued from now on begin after `event`; the host goes on at once."""
        _call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def begin_capture(self) -> None:
        """Record what is queued from now on instead of running it."""
        mode = _cudart().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call("cudaStreamBeginCapture", self.handle, mode)

    def end_capture(self) -> Any:
        """Return what was recorded, ready to `launch`, until the caller gives it to `release_recorded`."""
        graph = _call("cudaStreamEndCapture", self.handle)
        try:
            return _call("cudaGraphInstantiate", graph, 0)
        finally:
            _call("cudaGraphDestroy", graph)  # what was instantiated does not need it

    def launch(self, recorded: Any) -> None:
        """Queue all that was recorded as one."""
        _call("cudaGraphLaunch", recorded, self.handle)

    def close(self) -> None:
        """Give it back."""
        if self.handle is not None:
            _call("cudaStreamDestroy", self.handle)
            self.handle = None


class Event:
    """A point in the work of a stream; closing twice is allowed."""

    def __init__(self) -> None:
        self.handle: Any = _call("cudaEventCreateWithFlags", _cudart().cudaEventDisableTiming)

    def record(self, stream: Stream) -> None:
        """Let the event happen when all that is queued in `stream` by now is done."""
        _call("cudaEventRecord", self.handle, stream.handle)

    def wait(self) -> None:
        """Return when the event has happened, at once if it was never recorded."""
        _call("cudaEventSynchronize", self.handle)

    def close(self) -> None:
        """Give it back."""
        if self.handle is not None:
            _call("cudaEventDestroy", self.handle)
            self.handle = None


def release_recorded(recorded: Any) -> None:
    """Give back what `Stream.end_capture` returned."""
    _call("cudaGraphExecDestroy", recorded)


class DeviceBuffer:
    """Memory on the GPU for an array of one shape and type."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.n_bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.address: int = int(_call("cudaMalloc", self.n_bytes))

    def close(self) -> None:
        """Give it back; closing twice is allowed."""
        if self.address:
            _call("cudaFree", self.address)
            self.address = 0


class PinnedBuffer:
    """An array in page-locked memory, which copies need to run beside the computation."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._address = int(_call("cudaHostAlloc", size, 0))
        memory = (ctypes.c_uint8 * size).from_address(self._address)
        self.array: NDArray[Any] = np.frombuffer(memoryview(memory), dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Give it back; closing twice is allowed. The array must not be used any more."""
        if self._address:
            self.array = self.array[:0].copy()
            _call("cudaFreeHost", self._address)
            self._address = 0


def copy_in(buffer: DeviceBuffer, source: Any, pinned: NDArray[Any], stream: Stream) -> None:
    """Queue a copy of `source` into `buffer`.

    Args:
        buffer: where to.
        source: an array of the same shape and type in host memory, or on the GPU already and contiguous
            (anything with `__cuda_array_interface__`: PyCUDA, CuPy, PyTorch). The stream that it names is
            waited for; where it names none, as PyTorch's, all that is queued on the GPU by now.
        pinned: of the same shape; arrays of the host go through it.
        stream: queues the copy.
    Raises:
        DeviceError: the copy failed, or the array on the GPU is not contiguous.
    """
    kinds = _cudart().cudaMemcpyKind
    on_gpu = getattr(source, "__cuda_array_interface__", None)
    if on_gpu is not None:
        strides = on_gpu.get("strides")
        if strides is not None and list(strides) != _contiguous_strides(buffer.shape, buffer.dtype.itemsize):
            raise DeviceError(
                "an array on the GPU that is not contiguous", where="tiles", fix="make it contiguous first"
            )
        _wait_for_maker(on_gpu)
        address, kind = int(on_gpu["data"][0]), kinds.cudaMemcpyDeviceToDevice
    else:
        np.copyto(pinned, source)
        address, kind = pinned.ctypes.data, kinds.cudaMemcpyHostToDevice
    _call("cudaMemcpyAsync", buffer.address, address, buffer.n_bytes, kind, stream.handle)


def copy_on_gpu(buffer: DeviceBuffer, source: DeviceBuffer, stream: Stream) -> None:
    """Queue a copy of `source` into `buffer`, both of one shape and type."""
    kind = _cudart().cudaMemcpyKind.cudaMemcpyDeviceToDevice
    _call("cudaMemcpyAsync", buffer.address, source.address, buffer.n_bytes, kind, stream.handle)


def copy_out(pinned: NDArray[Any], buffer: DeviceBuffer, stream: Stream) -> None:
    """Queue a copy of `buffer` into `pinned`; it is there when the stream has been waited for."""
    kind = _cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
    _call("cudaMemcpyAsync", pinned.ctypes.data, buffer.address, buffer.n_bytes, kind, stream.handle)


def copy_to_host(interface: Mapping[str, Any]) -> NDArray[Any]:
    """Return a copy in host memory of what `__cuda_array_interface__` describes, strides and all.

    Waits for the stream that the interface names, or for all that is queued on the GPU if it names none.

    Raises:
        DeviceError: the copy failed, or the strides run backwards.
    """
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = tuple(interface.get("strides") or _contiguous_strides(shape, dtype.itemsize))
    if min(strides, default=0) < 0:
        raise DeviceError(
            "an array on the GPU that runs backwards", where="frame", fix="make it contiguous first"
        )
    if 0 in shape:
        return np.empty(shape, dtype)
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    host = np.empty(extent, np.uint8)
    _wait_for_maker(interface)
    kind = _cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost
    stream = Stream()  # the default one may be in use, or barred while a graph is recorded
    try:
        address = int(interface["data"][0])
        _call("cudaMemcpyAsync", host.ctypes.data, address, extent, kind, stream.handle)
        stream.wait()
    finally:
        stream.close()
    return np.ndarray(shape, dtype, buffer=host.data, strides=strides)


def _wait_for_maker(interface: Mapping[str, Any]) -> None:
    """Return when what an array on the GPU is to hold is there."""
    if interface.get("stream") is not None:
        _call("cudaStreamSynchronize", interface["stream"])
    else:
        _call("cudaDeviceSynchronize")


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Return the strides of a C-contiguous array.

    >>> _contiguous_strides((4, 3, 2), 2)
    [12, 4, 2]
    """
    return [itemsize * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
