"""The backend `onnxruntime`: the exported graph, plain and styled, as sessions of ONNX Runtime.

Tensors are bound by address, on the CPU or a GPU; nothing is copied on the way in or out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinecat.engines.backends.contract import GRAPH_OUTPUT, Engine, EngineSpec, StackInputs
from cinecat.engines.backends.export import export_onnx, graph_names
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.errors import EngineError

_PLAIN, _STYLED = "plain.onnx", "styled.onnx"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# onnx.TensorProto's numbers.
_KINDS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


class OnnxRuntimeEngine:
    """Runs an exported stack. The styled session has weights of its own, and is made when a row first wears a style."""

    name = "onnxruntime"

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._sessions = {False: self._session(styled=False)}

    def covers(self, inputs: StackInputs) -> bool:
        return True

    def __call__(self, inputs: StackInputs) -> Tensor:
        styled = inputs.styles is not None
        session = self._sessions.get(styled)
        if session is None:
            session = self._sessions[styled] = self._session(styled)
        given = {name: tensor.contiguous() for name, tensor in inputs.named(styled).items()}
        output = torch.empty_like(given["tokens"])
        binding = session.io_binding()
        kind, index = self._device.type, self._device.index or 0
        for name in graph_names(styled):
            tensor = given[name]
            binding.bind_input(name, kind, index, _KINDS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(GRAPH_OUTPUT, kind, index, _KINDS[output.dtype], tuple(output.shape), output.data_ptr())
        if kind == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        session.run_with_iobinding(binding)
        return output

    def _session(self, styled: bool) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Spinning threads would take the cores from torch, which runs between two forwards.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self._folder / (_STYLED if styled else _PLAIN)
        providers: list[Any] = [_PROVIDERS[self._device.type]]
        if self._device.type == "cuda":
            providers = [(providers[0], {"device_id": self._device.index or 0})]
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its own kinds, which it does not export
            raise EngineError(f"engines: {path} cannot be loaded: {error}") from error


class OnnxRuntime:
    """A Backend."""

    name = "onnxruntime"
    any_shape = True
    own_weights = True

    def missing(self, device: torch.device) -> str | None:
        for module in ("onnxruntime", "onnx", "onnxscript"):
            if importlib.util.find_spec(module) is None:
                return f"onnxruntime: {module} is missing; pip install 'cinecat[onnx]'"
        import onnxruntime

        if _PROVIDERS[device.type] not in onnxruntime.get_available_providers():
            return f"onnxruntime: it has no {_PROVIDERS[device.type]}; pip install onnxruntime-gpu"
        return None

    def versions(self) -> Mapping[str, str]:
        return {name: version(name) for name in ("torch", "onnx", "onnxscript")}

    def build(self, stack: WanStack, spec: EngineSpec, folder: Path, announce: Callable[[str], object]) -> None:
        for number, name in enumerate((_PLAIN, _STYLED)):
            announce(f"exporting {number + 1} of 2")
            export_onnx(stack, spec, name == _STYLED, folder / name)

    def load(self, stack: WanStack, spec: EngineSpec, folder: Path) -> Engine:
        return OnnxRuntimeEngine(folder, stack.device)
