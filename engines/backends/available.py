"""Which backends can run here. Nothing is imported before it is asked for."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TENSORRT = "pip install 'cinecat[tensorrt]'"


def torch_missing(device: torch.device) -> str | None:
    """None: what serves at all serves from `torch`."""
    return None


def inductor_missing(device: torch.device) -> str | None:
    """A C++ compiler on a CPU, Triton on a GPU."""
    from cinecat.engines.backends.inductor import Inductor

    return Inductor().missing(device)


def onnxruntime_missing(device: torch.device) -> str | None:
    """onnx, onnxscript, and an onnxruntime that has the device."""
    from cinecat.engines.backends.onnx_runtime import OnnxRuntime

    return OnnxRuntime().missing(device)


def tensorrt_missing(device: torch.device) -> str | None:
    """A GPU, the package, and its library."""
    return _no_gpu("tensorrt", device) or _no_package("tensorrt", "tensorrt") or _no_nvinfer("tensorrt")


def torch_tensorrt_missing(device: torch.device) -> str | None:
    """What `tensorrt` needs, and torch_tensorrt."""
    name = "torch_tensorrt"
    return (
        _no_gpu(name, device)
        or _no_package(name, "tensorrt")
        or _no_nvinfer(name)
        or _no_package(name, "torch_tensorrt")
    )


BACKENDS: dict[str, Callable[[torch.device], str | None]] = {
    "torch": torch_missing,
    "inductor": inductor_missing,
    "onnxruntime": onnxruntime_missing,
    "tensorrt": tensorrt_missing,
    "torch_tensorrt": torch_tensorrt_missing,
}
"""By name: why a backend cannot run on a device, in one line with what to install; None where it can."""


def _no_gpu(backend: str, device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    return f"{backend}: it needs an NVIDIA GPU, the device is {device}"


def _no_package(backend: str, module: str) -> str | None:
    spec = importlib.util.find_spec(module)
    # A folder of that name, as type stubs leave one, is found too, but has nothing to load.
    if spec is None or spec.origin is None:
        return f"{backend}: {module} is missing; {_TENSORRT}"
    return None


def _no_nvinfer(backend: str) -> str | None:
    for library in ("libnvinfer.so.11", "libnvinfer.so.10"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return None
    # The package brings the library along, and loads it by its full path.
    try:
        importlib.import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        return f"{backend}: libnvinfer cannot be loaded ({f'{error}'.splitlines()[0]}); {_TENSORRT}"
    return None
