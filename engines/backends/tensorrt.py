"""The backend `tensorrt`: the exported graph, built by TensorRT 10.13 to 11 for the buckets of both token paths.

One engine does all of it, plain and styled, since every engine has weights of its own. It is never refittable: styles
are inputs, a refittable engine is slower, and TensorRT 11.3's notes warn of wrong results after a refit.

TensorRT itself is imported only by what builds and runs, `tensorrt_build` and `tensorrt_engine`. The calls
that build and run are in the Python bindings of 10.13.0, of 11.0.0 and of 11.4.0; none has been run here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from cinecat.engines.backends.contract import Banks, Engine, EngineSpec, StackInputs, StyleRows
from cinecat.engines.backends.export import example_inputs
from cinecat.engines.backends.operators import OLDEST, Version
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.errors import EngineError

_NEXT_MAJOR: Version = (12, 0)
_INSTALL = "pip install 'cinecat[tensorrt]'"


@dataclass(frozen=True)
class Options:
    """Where else than here a built engine may run; each costs speed.

    Attributes:
        version_compatible: with later versions of TensorRT's major version too.
        hardware: "own" for GPUs like this one alone, "same_compute_capability" or "ampere_plus".
    """

    version_compatible: bool = False
    hardware: str = "own"

    @classmethod
    def of(cls, spec: EngineSpec) -> Options:
        """Reads a spec's options. Raises EngineError for one that there is not, or two that exclude each other."""
        hardware = [option for option in spec.options if option in _HARDWARE]
        for option in spec.options:
            if option not in _ALL_OPTIONS:
                raise EngineError(f"engines: options: {option!r} is none of tensorrt's: {', '.join(_ALL_OPTIONS)}")
        if len(hardware) > 1:
            raise EngineError(f"engines: options: {' and '.join(hardware)} exclude each other")
        return cls("version_compatible" in spec.options, *hardware)


_HARDWARE = ("same_compute_capability", "ampere_plus")
_ALL_OPTIONS = ("version_compatible", *_HARDWARE)


class TensorRt:
    """A Backend."""

    name = "tensorrt"
    any_shape = False
    own_weights = True

    def missing(self, device: torch.device) -> str | None:
        return library_missing("tensorrt", "tensorrt") or _too_old_or_new() or gpu_missing("tensorrt", device)

    def versions(self) -> Mapping[str, str]:
        tensorrt = importlib.import_module("tensorrt")
        return {
            "tensorrt": str(tensorrt.__version__),
            **{name: version(name) for name in ("torch", "onnx", "onnxscript")},
        }

    def build(self, stack: WanStack, spec: EngineSpec, folder: Path, announce: Callable[[str], object]) -> None:
        from cinecat.engines.backends.tensorrt_build import build

        build(stack, spec, Options.of(spec), folder, announce)

    def load(self, stack: WanStack, spec: EngineSpec, folder: Path) -> Engine:
        from cinecat.engines.backends.tensorrt_engine import load

        return load(spec, Options.of(spec), folder)


def styled(spec: EngineSpec) -> bool:
    """Whether the engine takes styles: wherever there are slots, since a second engine would be a second copy of the
    weights.
    """
    return spec.slots > 0


class Dressing:
    """Gives an engine that takes styles some for the rows that wear none: slot 0, of the banks last seen, or of empty
    ones until a styled row has come.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._banks: Banks | None = None

    def __call__(self, inputs: StackInputs) -> dict[str, torch.Tensor]:
        """The tensors of a forward by the names of the engine's inputs."""
        if not styled(self._spec):
            return inputs.named(False)
        if inputs.styles is not None:
            self._banks = inputs.styles.banks
            return inputs.named(True)
        if self._banks is None:
            empty = example_inputs(self._spec, styled=True, rows=1).styles
            assert empty is not None
            self._banks = empty.banks
        slots = torch.zeros(inputs.rows, dtype=torch.int64, device=inputs.tokens.device)
        return replace(inputs, styles=StyleRows(slots, slots.float(), self._banks)).named(True)


def library_missing(backend: str, module: str) -> str | None:
    """Why a library cannot be imported, with what to install; None where it can."""
    spec = importlib.util.find_spec(module)
    # A folder of that name, as type stubs leave one, is found too, but has nothing to load.
    if spec is None or spec.loader is None or spec.origin is None:
        return f"{backend}: {module} is not installed; {_INSTALL}, on a machine with an NVIDIA GPU and driver"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{backend}: {module} cannot be loaded ({reason}); install the NVIDIA driver and {_INSTALL}"
    return None


def gpu_missing(backend: str, device: torch.device) -> str | None:
    """Why a device is none that TensorRT runs on, with what to do; None where it is one."""
    if not torch.cuda.is_available():
        return f"{backend}: torch sees no NVIDIA GPU; install the NVIDIA driver and a torch with CUDA"
    if device.type != "cuda":
        return f"{backend}: it runs on NVIDIA GPUs, not on {device.type}; set device to cuda"
    return None


def _too_old_or_new() -> str | None:
    found = str(importlib.import_module("tensorrt").__version__)
    major, minor = (int(part) for part in found.split(".")[:2])
    if OLDEST <= (major, minor) < _NEXT_MAJOR:
        return None
    return f"tensorrt: {found} is installed, 10.13 to 11 are supported; pip install 'tensorrt>=10.13,<12'"
