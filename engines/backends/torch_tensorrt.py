"""The backend `torch_tensorrt`: the exported program, compiled by Torch-TensorRT's dynamo front end.

It knows one optimisation profile, so all buckets become one range around them. Like `tensorrt` it makes one engine
with its own weights, which takes styles wherever there are slots, and is never refittable. The calls are those of
Torch-TensorRT 2.13.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinecat.engines.backends.contract import Engine, EngineSpec, StackInputs
from cinecat.engines.backends.export import export_program, graph_names
from cinecat.engines.backends.profiles import hull, input_shapes
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.tensorrt import Dressing, Options, gpu_missing, library_missing, styled
from cinecat.engines.errors import EngineError

_OLDEST = (2, 13)
_PROGRAM = "engine.ep"
_ZIP64_PICKLE = 4
"""Pickles of older protocols end at 4 GB."""


class TorchTensorRtEngine:
    """Runs a compiled program."""

    name = "torch_tensorrt"

    def __init__(self, module: Any, spec: EngineSpec) -> None:
        self._module = module
        self._bucket = hull(spec.buckets)
        self._dressing = Dressing(spec)

    def covers(self, inputs: StackInputs) -> bool:
        return self._bucket.covers(inputs)

    def __call__(self, inputs: StackInputs) -> Tensor:
        output = self._module(*(tensor.contiguous() for tensor in self._dressing(inputs).values()))
        first: Tensor = output[0] if isinstance(output, tuple | list) else output
        return first


class TorchTensorRt:
    """A Backend."""

    name = "torch_tensorrt"
    any_shape = False
    own_weights = True

    def missing(self, device: torch.device) -> str | None:
        return library_missing("torch_tensorrt", "torch_tensorrt") or _too_old() or gpu_missing(self.name, device)

    def versions(self) -> Mapping[str, str]:
        names = ("torch_tensorrt", "tensorrt", "torch")
        return {name: str(importlib.import_module(name).__version__) for name in names}

    def build(self, stack: WanStack, spec: EngineSpec, folder: Path, announce: Callable[[str], object]) -> None:
        import torch_tensorrt

        settings = compile_settings(spec)
        announce("exporting")
        program = export_program(stack, spec, styled(spec))
        announce("compiling")
        try:
            inputs = [torch_tensorrt.Input(**each) for each in input_settings(program, spec)]
            compiled = torch_tensorrt.dynamo.compile(program, inputs=inputs, **settings)
            announce("saving")
            torch_tensorrt.save(
                compiled,
                str(folder / _PROGRAM),
                output_format="exported_program",
                retrace=False,
                pickle_protocol=_ZIP64_PICKLE,
            )
        except Exception as error:  # converters and TensorRT fail in many ways
            raise EngineError(f"torch_tensorrt: cannot compile the blocks: {error}") from error

    def load(self, stack: WanStack, spec: EngineSpec, folder: Path) -> Engine:
        import torch_tensorrt

        try:
            return TorchTensorRtEngine(torch_tensorrt.load(str(folder / _PROGRAM)).module(), spec)
        except Exception as error:
            raise EngineError(f"torch_tensorrt: {folder / _PROGRAM} cannot be loaded: {error}") from error


def input_settings(program: torch.export.ExportedProgram, spec: EngineSpec) -> list[dict[str, Any]]:
    """Arguments of a torch_tensorrt.Input for every input of an exported program, in order."""
    names, bucket = graph_names(styled(spec)), hull(spec.buckets)
    assert program.example_inputs is not None
    settings = []
    for name, tensor in zip(names, program.example_inputs[0], strict=True):
        shapes = input_shapes(name, tensor.shape, bucket)
        sizes = {"min_shape": shapes.least, "opt_shape": shapes.best, "max_shape": shapes.most}
        fixed = {"shape": shapes.best} if shapes.least == shapes.most else sizes
        settings.append({**fixed, "dtype": tensor.dtype, "name": name})
    return settings


def compile_settings(spec: EngineSpec) -> dict[str, Any]:
    """Arguments of torch_tensorrt.dynamo.compile. Raises EngineError for an option that it does not have."""
    options = Options.of(spec)
    if options.hardware == "same_compute_capability":
        raise EngineError("engines: options: same_compute_capability is not torch_tensorrt's; ampere_plus is")
    return {
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware == "ampere_plus",
        # All in one engine: whatever fell back to torch would be a copy of weights and a break of the graph.
        "require_full_compilation": True,
        "min_block_size": 1,
        "immutable_weights": True,
        "disable_tf32": True,
        # True is the default, and would take the bias of the keys for a causal mask.
        "attn_bias_is_causal": False,
    }


def _too_old() -> str | None:
    found = str(importlib.import_module("torch_tensorrt").__version__)
    if tuple(int(part) for part in found.split(".")[:2]) >= _OLDEST:
        return None
    return f"torch_tensorrt: {found} is too old; pip install 'torch-tensorrt>=2.13', which wants the same torch"
