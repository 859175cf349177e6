"""Which backends there are, and what an engine of theirs is known by."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import torch

from cinecat.engines.backends.contract import ANY_SHAPE, Backend, Bucket, EngineSpec, Range
from cinecat.engines.backends.inductor import Inductor
from cinecat.engines.backends.onnx_runtime import OnnxRuntime
from cinecat.engines.backends.store_key import EngineKey, KeyValue
from cinecat.engines.backends.tensorrt import TensorRt
from cinecat.engines.backends.torch_tensorrt import TorchTensorRt
from cinecat.engines.checkpoint import Checkpoint, read_json
from cinecat.engines.errors import ModelError, SettingError
from cinecat.engines.messages import CoreConfig
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import RUNGS, rung_tokens

TORCH = "torch"
"""The backend that needs no build: the stack, run eagerly."""

AUTO = "auto"
"""The first of BACKENDS whose engine is built already, else TORCH."""

BACKENDS: tuple[Backend, ...] = (TensorRt(), TorchTensorRt(), Inductor(), OnnxRuntime())
"""Those that build something, the one to be preferred first."""

_ROWS = Range(1, 1, 2)
_TEXT = Range(16, 32, 512)


def find_backend(name: str) -> Backend:
    """The backend that a setting names. Raises SettingError for another name."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = ", ".join(backend.name for backend in BACKENDS)
    raise SettingError(f"engine: {name!r} is none that is built; those are {names}")


def engine_spec(
    checkpoint: Checkpoint,
    fingerprint: str,
    transformer: Any,
    slots: int,
    max_rank: int,
    buckets: tuple[Bucket, ...] = (ANY_SHAPE,),
    options: tuple[str, ...] = (),
) -> EngineSpec:
    """What engines of a loaded transformer are built from.

    Args:
        fingerprint: of the model with what is fused into it.
    """
    config, device = transformer.config, transformer.device
    heads = config.num_attention_heads
    return EngineSpec(
        model=fingerprint,
        device=device.type,
        architecture=_architecture(device, bool(options)),
        dtype=str(transformer.dtype).removeprefix("torch."),
        layers=config.num_layers,
        heads=heads,
        dim=heads * config.attention_head_dim,
        ffn_dim=config.ffn_dim,
        image_tokens=_image_tokens(checkpoint),
        slots=slots,
        max_rank=max_rank,
        buckets=buckets,
        options=options,
    )


def check_fixed(backend: Backend, config: CoreConfig) -> None:
    """Raises SettingError where a backend's engines have fixed shapes and no size is set to build them for, or where
    options are set that it does not have.
    """
    if config.engine_options and backend.name != "tensorrt":
        raise SettingError(f"engine_options: {backend.name} has none; those that there are belong to tensorrt")
    if not backend.any_shape and not config.engine_sizes:
        raise SettingError(
            f"engine_sizes: {backend.name} builds for fixed sizes; name those that are asked for, e.g. 832x480x81 "
            "(--size of cinecat engines build)"
        )


def engine_key(backend: Backend, spec: EngineSpec) -> EngineKey:
    """What an engine is known by in the cache: all that it is built from and with."""
    fields = {name: _plain(value) for name, value in spec.as_key().items() if name != "buckets"}
    if not backend.any_shape:
        fields["buckets"] = _plain(spec.as_key()["buckets"])
    versions = tuple(f"{name} {version}" for name, version in sorted(backend.versions().items()))
    return EngineKey.of({**fields, "backend": backend.name, "versions": versions})


def buckets_for(grids: tuple[Grid, ...]) -> tuple[Bucket, ...]:
    """A bucket for every number of tokens that steps of such clips can have, on either path."""
    counts = sorted({rung_tokens(grid, rung) for grid in grids for rung in RUNGS}, reverse=True)
    return tuple(Bucket(_ROWS, Range(count, count, count), _TEXT) for count in counts)


def _architecture(device: torch.device, portable: bool) -> str:
    """The very processor, since compilers use all that it has; of a GPU whose engines are to run on others too, its
    compute capability.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}" + ("" if portable else f" {torch.cuda.get_device_name(device)}")
    features = hashlib.sha256(_cpu_features().encode()).hexdigest()[:8]
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {features}"


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _image_tokens(checkpoint: Checkpoint) -> int:
    config = read_json(checkpoint.folder / "image_encoder" / "config.json")
    # transformers nests a vision model's sizes in some versions.
    config = config.get("vision_config") or config
    try:
        return int((config["image_size"] // config["patch_size"]) ** 2 + 1)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError("model: image_encoder/config.json gives no image_size and patch_size") from error


def _plain(value: object) -> KeyValue:
    if isinstance(value, dict):
        return tuple((str(name), _plain(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    assert isinstance(value, (str, int))
    return value
