"""Reads safetensors straight into a module's parameters, so that no second copy of a weight is ever held.

diffusers and transformers map whole files into memory and convert beside them: of a float32 checkpoint that is served
in bfloat16, two to three times the weights were resident at the peak. Here a tensor's bytes go through a small buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import accelerate
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cinecat.engines.checkpoint import weight_files
from cinecat.engines.errors import ModelError
from cinecat.plugins.errors import LoraError
from cinecat.plugins.safetensors_header import TensorEntry, read_header

BUFFER_BYTES = 2**24
"""What the host holds of a tensor at a time, besides the weights themselves."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 3


def without_weights() -> AbstractContextManager[object]:
    """Modules that are built in this context have parameters on the meta device and real buffers."""
    empty: AbstractContextManager[object] = accelerate.init_empty_weights()
    return empty


def fill(module: nn.Module, part: Path, device: torch.device, dtype: torch.dtype, float32: Iterable[str] = ()) -> None:
    """Gives a module that was built `without_weights` its parameters, and moves its buffers.

    Args:
        part: folder with a safetensors file, or an index and its shards. Tensors that the module lacks are passed over.
        device: where the parameters end; the host never holds more than `BUFFER_BYTES` of what goes elsewhere.
        dtype: of the parameters.
        float32: parameters with one of these among the parts of their names are float32 whatever the dtype.

    Raises:
        ModelError: a file cannot be read, a tensor is missing, or it does not fit.
    """
    kept = frozenset(float32)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    missing = set(parameters)
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)  # one for all, or the allocator would keep many
    for path in weight_files(part):
        try:
            with path.open("rb", buffering=0) as file:
                tensors = read_header(file).tensors
                for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
                    if name not in parameters:
                        continue
                    _check(path, name, entry, parameters[name])
                    kind = torch.float32 if kept & set(name.split(".")) else dtype
                    value = torch.empty(entry.shape, dtype=kind, device=device)
                    _read(file, entry, value, buffer)
                    _set(module, name, value)
                    missing.discard(name)
        except (OSError, LoraError) as error:
            raise ModelError(f"model: {path} cannot be loaded: {error}") from error
    if isinstance(module, PreTrainedModel):
        module.tie_weights()
    missing = {name for name in missing if module.get_parameter(name).is_meta}
    if missing:
        raise ModelError(f"model: {part} cannot be loaded: it lacks {_some(sorted(missing))}; download it again")
    for owner in module.modules():
        for name, value in owner.named_buffers(recurse=False):
            owner._buffers[name] = value.to(device)


def _check(path: Path, name: str, entry: TensorEntry, parameter: Tensor) -> None:
    if entry.dtype not in _DTYPES:
        raise ModelError(f"model: {path} cannot be loaded: {name} is {entry.dtype}, not one of {', '.join(_DTYPES)}")
    if entry.shape != tuple(parameter.shape):
        raise ModelError(
            f"model: {path} cannot be loaded: {name} is {list(entry.shape)}, its config.json says "
            f"{list(parameter.shape)}"
        )


def _read(file: BinaryIO, entry: TensorEntry, target: Tensor, buffer: Tensor) -> None:
    """Copies a tensor from its file, at most a buffer at a time."""
    stored, flat = _DTYPES[entry.dtype], target.view(-1)
    numbers = math.prod(entry.shape)
    file.seek(entry.offset)
    if target.device.type == "cpu" and stored == target.dtype:
        _fill_bytes(file, flat)
        return
    pieces = buffer.view(stored)
    for start in range(0, numbers, pieces.numel()):
        piece = pieces[: numbers - start]
        _fill_bytes(file, piece)
        flat[start : start + piece.numel()].copy_(piece)


def _fill_bytes(file: BinaryIO, tensor: Tensor) -> None:
    rest = tensor.view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise OSError("it ended while it was read")
        rest = rest[count:]


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
