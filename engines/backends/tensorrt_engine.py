"""Runs a TensorRT engine on torch's tensors and streams. Imported only where TensorRT is."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import tensorrt as trt
import torch
from torch import Tensor

from cinecat.engines.backends.contract import GRAPH_INPUTS, GRAPH_OUTPUT, EngineSpec, StackInputs
from cinecat.engines.backends.export import graph_names
from cinecat.engines.backends.profiles import tightest
from cinecat.engines.backends.tensorrt import Dressing, Options, styled
from cinecat.engines.backends.tensorrt_build import PLAN, Log
from cinecat.engines.errors import EngineError, EngineFault

_KINDS = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.INT64: torch.int64,
}

_COPIED = frozenset((*GRAPH_INPUTS, "slots", "strengths"))
"""Inputs whose tensors are other ones in every step. The banks are read where they lie."""

_SIZES_KEPT = 16
"""Forwards of so many different sizes keep their context and their CUDA graph."""


class Scratch:
    """Device memory for activations, one for all engines of a process on one device: they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def at_least(self, size: int) -> Tensor:
        """That memory, grown where it is smaller than `size` bytes; then it lies elsewhere."""
        if self._memory.numel() < size:
            device = self._memory.device
            # First given back, so that both are never held.
            self._memory = torch.empty(0, dtype=torch.uint8, device=device)
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory


_scratch_of: dict[torch.device, Scratch] = {}


def load(spec: EngineSpec, options: Options, folder: Path) -> TensorRtEngine:
    """An engine from what `tensorrt_build.build` wrote.

    Raises:
        EngineError: there is no engine, it is another TensorRT's or GPU's, or it does not take what the contract gives.
    """
    log = Log()
    runtime = trt.Runtime(log)
    # A version compatible plan brings the code of its own runtime; the cache vouches for what it holds.
    runtime.engine_host_code_allowed = options.version_compatible
    try:
        with (folder / PLAN).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)
    except (OSError, ValueError) as error:
        raise EngineError(f"tensorrt: {folder / PLAN} cannot be read: {error}") from error
    if engine is None:
        raise EngineError(f"tensorrt: {folder / PLAN} cannot be loaded: {log.told()}")
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if names != {*graph_names(styled(spec)), GRAPH_OUTPUT} or engine.num_optimization_profiles != len(spec.buckets):
        raise EngineError(f"tensorrt: {folder / PLAN} was not built for this model and these buckets")
    return TensorRtEngine(engine, runtime, log, spec)


class TensorRtEngine:
    """Runs a built engine. Not for two threads at once."""

    name = "tensorrt"

    def __init__(self, engine: trt.ICudaEngine, runtime: trt.Runtime, log: Log, spec: EngineSpec) -> None:
        self._engine = engine
        # TensorRT wants both to outlive the engine.
        self._runtime, self._log = runtime, log
        self._spec = spec
        self._device = torch.device(spec.device, torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._scratch = _scratch_of.setdefault(self._device, Scratch(self._device))
        self._forwards: OrderedDict[tuple[int, ...], _SizedForward] = OrderedDict()
        self._dressing = Dressing(spec)

    def covers(self, inputs: StackInputs) -> bool:
        return tightest(self._spec.buckets, inputs) is not None

    def __call__(self, inputs: StackInputs) -> Tensor:
        profile = tightest(self._spec.buckets, inputs)
        if profile is None:
            raise EngineError(f"tensorrt: no bucket is for {tuple(inputs.tokens.shape)} tokens; build one")
        given = {name: tensor.contiguous() for name, tensor in self._dressing(inputs).items()}
        sizes = (*inputs.tokens.shape[:2], inputs.text_keys.shape[2])
        forward = self._forwards.get(sizes)
        if forward is None:
            forward = self._forwards[sizes] = _SizedForward(self._engine, self._log, profile, given, self._stream)
        self._forwards.move_to_end(sizes)
        if len(self._forwards) > _SIZES_KEPT:
            torch.cuda.synchronize(self._device)
            self._forwards.popitem(last=False)
        return forward(given, self._scratch.at_least(self._engine.device_memory_size_v2))


class _SizedForward:
    """Forwards of one size: a context with its shapes set once, and from the second forward on one CUDA graph."""

    def __init__(
        self,
        engine: trt.ICudaEngine,
        log: Log,
        profile: int,
        given: Mapping[str, Tensor],
        stream: torch.cuda.Stream,
    ) -> None:
        self._log = log
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._may_capture, self._ran = True, False
        self._addresses: dict[str, int] = {}
        self._scratch = 0
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None or not self._context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise EngineFault(f"tensorrt: no context for profile {profile}: {log.told()}")
        stream.synchronize()
        for name, tensor in given.items():
            # An address is all that TensorRT gets to see: a wrong type would pass unnoticed.
            if _KINDS.get(engine.get_tensor_dtype(name)) != tensor.dtype:
                raise EngineError(
                    f"tensorrt: {name} is {tensor.dtype}, the engine takes {engine.get_tensor_dtype(name)}"
                )
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"tensorrt: {name} cannot be {tuple(tensor.shape)}: {log.told()}")
        self._inputs = {name: torch.empty_like(tensor) for name, tensor in given.items() if name in _COPIED}
        self._output = torch.empty_like(given["tokens"])
        for name, tensor in {**self._inputs, GRAPH_OUTPUT: self._output}.items():
            self._bind(name, tensor)

    def __call__(self, given: Mapping[str, Tensor], scratch: Tensor) -> Tensor:
        """Runs on a stream of its own, after what the current stream has to do and before what it gets to do next."""
        for name, tensor in given.items():
            if name in self._inputs:
                self._inputs[name].copy_(tensor)
            else:
                self._bind(name, tensor)
        if scratch.data_ptr() != self._scratch:
            self._scratch, self._graph = scratch.data_ptr(), None
            self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        current = torch.cuda.current_stream(scratch.device)
        self._stream.wait_stream(current)
        if self._graph is None and self._ran and self._may_capture:
            self._capture()
        with torch.cuda.stream(self._stream):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._enqueue()
                self._ran = True
        current.wait_stream(self._stream)
        return self._output.clone()

    def _bind(self, name: str, tensor: Tensor) -> None:
        if self._addresses.get(name) == tensor.data_ptr():
            return
        self._addresses[name], self._graph = tensor.data_ptr(), None
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise EngineFault(f"tensorrt: {name} cannot be bound: {self._log.told()}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineFault(f"tensorrt: the forward failed: {self._log.told()}")

    def _capture(self) -> None:
        """Records the forward, after one that ran with these shapes, as TensorRT wants it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._enqueue()
        except (RuntimeError, EngineFault):
            # Some kernels cannot be recorded; launching them one by one is slower and nothing else.
            self._may_capture = False
        else:
            self._graph = graph
