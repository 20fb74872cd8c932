"""A CUDA runtime and a TensorRT without a GPU: memory is the host's, and what is not given back is known."""

from __future__ import annotations

import ctypes
from enum import Enum
from itertools import count
from types import SimpleNamespace

from darcnn.runtime.engines.graphs import INPUTS, expected_signatures


class Status(Enum):
    cudaSuccess = 0  # noqa: N815  # CUDA's own name
    cudaErrorMemoryAllocation = 2  # noqa: N815


class FakeCudart:
    """Functions of `cuda.bindings.runtime`; `held` are handles and addresses not given back."""

    cudaError_t = Status  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaEventDisableTiming = 2  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, *, name="Fake", capability=(8, 6), fails_at_malloc=None):
        self.held: dict[object, object] = {}
        self.log: list[tuple[object, ...]] = []  # copies and events, in their order
        self.properties = SimpleNamespace(name=name.encode(), major=capability[0], minor=capability[1])
        self._fails_at = fails_at_malloc
        self._n_mallocs, self._handles = 0, count(1)

    def _hold(self, kind):
        handle = (kind, next(self._handles))
        self.held[handle] = True
        return Status.cudaSuccess, handle

    def _drop(self, handle):
        del self.held[handle]  # twice is an error
        return (Status.cudaSuccess,)

    def cudaGetDeviceCount(self):  # noqa: N802
        return Status.cudaSuccess, 1

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        return Status.cudaSuccess, self.properties

    def cudaDriverGetVersion(self):  # noqa: N802
        return Status.cudaSuccess, 13000

    def cudaMalloc(self, size):  # noqa: N802
        self._n_mallocs += 1
        if self._n_mallocs == self._fails_at:
            return Status.cudaErrorMemoryAllocation, 0
        memory = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(memory)] = memory
        return Status.cudaSuccess, ctypes.addressof(memory)

    def cudaFree(self, address):  # noqa: N802
        return self._drop(address)

    def cudaHostAlloc(self, size, flags):  # noqa: N802
        memory = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(memory)] = memory
        return Status.cudaSuccess, ctypes.addressof(memory)

    def cudaFreeHost(self, address):  # noqa: N802
        return self._drop(address)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        self.log.append(("copy", stream, kind))
        ctypes.memmove(target, source, size)
        return (Status.cudaSuccess,)

    def cudaDeviceSynchronize(self):  # noqa: N802
        self.log.append(("wait for all",))
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        handle = next(self._handles)
        self.held[handle] = True
        return Status.cudaSuccess, handle

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaStreamDestroy(self, stream):  # noqa: N802
        return self._drop(stream)

    def cudaStreamWaitEvent(self, stream, event, flags):  # noqa: N802
        self.log.append(("wait", stream, event))
        return (Status.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags):  # noqa: N802
        return self._hold("event")

    def cudaEventRecord(self, event, stream):  # noqa: N802
        self.log.append(("record", stream, event))
        return (Status.cudaSuccess,)

    def cudaEventSynchronize(self, event):  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaEventDestroy(self, event):  # noqa: N802
        return self._drop(event)

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        return self._hold("graph")

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        return self._hold("recorded")

    def cudaGraphLaunch(self, recorded, stream):  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaGraphDestroy(self, graph):  # noqa: N802
        return self._drop(graph)

    def cudaGraphExecDestroy(self, recorded):  # noqa: N802
        return self._drop(recorded)


class FakeTensorRt:
    """The module `tensorrt_rtx`; plans are the names of graphs, and load unless `refused` has them."""

    def __init__(self, bundle, *, version="1.7.1", refused=(), has_contexts=True):
        self.__version__ = version
        self.runtimes = []
        signatures = expected_signatures(bundle)
        owner = self

        class Logger:
            INTERNAL_ERROR = 0

            def __init__(self, severity):
                pass

        class Runtime:
            def __init__(self, logger):
                self.engine_host_code_allowed = False
                owner.runtimes.append(self)

            def deserialize_cuda_engine(self, plan):
                graph = plan.decode().split()[0]
                return (
                    None if plan.decode() in refused else FakeEngine(graph, signatures[graph], has_contexts)
                )

        self.Logger, self.Runtime = Logger, Runtime
        self.ComputeCapability = SimpleNamespace(SM75=75, SM80=80, SM86=86, SM89=89)  # some of the real ones


class FakeEngine:
    def __init__(self, graph, signature, has_contexts):
        self._signature, self._has_contexts = signature, has_contexts
        self._names = sorted(signature, key=lambda name: (name not in INPUTS[graph], name))
        self.num_io_tensors = len(signature)

    def get_tensor_name(self, index):
        return self._names[index]

    def get_tensor_dtype(self, name):
        names = {"uint8": "UINT8", "float32": "FLOAT", "int64": "INT64", "bool": "BOOL"}
        return SimpleNamespace(name=names[self._signature[name][0]])

    def get_tensor_shape(self, name):
        return self._signature[name][1]

    def create_execution_context(self):
        return FakeContext() if self._has_contexts else None


class FakeContext:
    def set_tensor_address(self, name, address):
        return True

    def execute_async_v3(self, stream):
        return True
