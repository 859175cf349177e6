"""Where a model's weights are kept while they do not work: on the device, in the host's memory, or in eight bits.

A 14B model in bfloat16 fits one 80 GB card as it is. For less, the encoders can stay on the host until a prompt or an
image comes, the blocks until their turn, and the blocks' matrices can be kept in float8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from torch import Tensor, nn

from cinecat.engines.backends.choice import AUTO, TORCH
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.errors import ModelError
from cinecat.engines.messages import CoreConfig, Offload, StorageDtype

HOST = torch.device("cpu")

RESIDENT_BLOCKS = 2
"""Blocks on the device at once where they are offloaded: the one that runs, and the next one on its way."""

_STORAGE = {"float8_e4m3fn": torch.float8_e4m3fn}
_LARGEST_SCALE = 14  # float16 holds the products


def check_engine(engine: str, offload: Offload, storage_dtype: StorageDtype) -> str:
    """The engine that may run: "auto" is torch where the blocks' weights are not simply on the device.

    Raises:
        ModelError: the engine that is set has weights that cannot be placed so.
    """
    setting = "offload = blocks" if offload == "blocks" else f"storage_dtype = {storage_dtype}"
    if offload != "blocks" and storage_dtype == "none":
        return engine
    if engine not in (AUTO, TORCH):
        raise ModelError(
            f"{setting.split()[0]}, engine: {setting} is for the engine torch alone, and engine is {engine}; set "
            f"engine to torch, or {setting.split()[0]} to none"
        )
    return TORCH


def checked(config: CoreConfig, sharded: bool = False) -> CoreConfig:
    """The settings with the engine of `check_engine`, which says what it raises; sharded blocks run on torch too."""
    engine = check_engine(config.engine, config.offload, config.storage_dtype)
    if sharded and engine not in (AUTO, TORCH):
        raise ModelError(
            f"shard, engine: ranks share the work of the engine torch alone, and engine is {engine}; set engine to "
            "torch, or shard to none"
        )
    return replace(config, engine=TORCH if sharded else engine)


def on_host(config: CoreConfig) -> bool:
    """Whether blocks are loaded into the host's memory, to come to the device a part at a time."""
    return config.offload == "blocks" or config.storage_dtype != "none" or config.shard_weights != "none"


def storage_note(storage_dtype: StorageDtype) -> str:
    """What a result says of its blocks' precision; empty where it is that of the dtype."""
    if storage_dtype == "none":
        return ""
    return f"storage_dtype: the matrices of the blocks are kept in {storage_dtype}, so the result is not exact"


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Has a module's weights on a device for a while, and afterwards where they were.

    The copy that they came from stays meanwhile, so going back moves nothing. Nothing is done where they are there.
    """
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def place(
    transformer: nn.Module, stack: WanStack, device: torch.device, offload: Offload, storage_dtype: StorageDtype
) -> None:
    """Puts a transformer's weights where the settings say; from then on its blocks run in the stack alone.

    Weights come to the device in the dtype that they are kept in, so it never holds the whole model in more.

    Args:
        transformer: diffusers' WanTransformer3DModel, which the stack was made of.
        device: on which the stack runs.
        offload: "blocks" leaves the stack's weights on the host, pinned where the device is a GPU.
        storage_dtype: of the stack's matrices; a block has them in its own dtype while it runs.
    """
    if offload != "blocks" and storage_dtype == "none":
        return
    stack.free_parts()
    if storage_dtype != "none":
        for block in stack.blocks:
            hook = _WideWhileRunning(matrices(block), _STORAGE[storage_dtype])
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "cinecat_storage")
    bring(transformer, device, besides=stack.parameters() if offload == "blocks" else ())
    if offload == "blocks":
        _offload_blocks(stack, device)


def bring(transformer: nn.Module, device: torch.device, besides: Iterable[nn.Parameter]) -> None:
    """Has all of a transformer on a device, but for some parameters."""
    left_out = {id(parameter) for parameter in besides}
    for tensor in chain(transformer.parameters(), transformer.buffers()):
        if id(tensor) not in left_out:
            tensor.data = tensor.data.to(device)


def matrices(block: nn.Module) -> list[nn.Parameter]:
    """A stack block's weights that may be kept in fewer bits: all that linears multiply with, and nothing else."""
    return [parameter for parameter in block.parameters() if parameter.dim() == 2]


def kept_bytes(parameters: Iterable[nn.Parameter], storage_dtype: StorageDtype) -> int:
    """What weights of a stack take where they are kept."""
    narrow = _STORAGE.get(storage_dtype)
    return sum(
        parameter.numel() * (narrow.itemsize if narrow and parameter.dim() == 2 else parameter.element_size())
        for parameter in parameters
    )


class _WideWhileRunning(ModelHook):  # type: ignore[misc]  # diffusers is not typed
    """Narrows a block's matrices, and widens them while it runs. diffusers' own hook for that sits on linears, whose
    forward a stack passes by.

    A matrix is kept times the power of two that brings its largest number just into the narrow dtype's range: float8
    has only 14 normal powers of two, and weights of wide models lie at their lower end. Registered before group
    offloading, so that weights are widened after they came to the device.
    """

    def __init__(self, weights: list[nn.Parameter], narrow: torch.dtype) -> None:
        super().__init__()
        self._narrow, self._wide = narrow, weights[0].dtype
        self._scales: dict[nn.Parameter, float] = {}
        self._kept: dict[nn.Parameter, Tensor] = {}
        for weight in weights:
            room = torch.finfo(narrow).max / max(float(weight.abs().max()), torch.finfo(torch.float32).tiny)
            self._scales[weight] = 2.0 ** min(math.floor(math.log2(room)), _LARGEST_SCALE)
            weight.data = (weight.data * self._scales[weight]).to(narrow)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for weight, scale in self._scales.items():
            if weight.dtype == self._narrow:  # after a forward that failed it may still be wide
                # Kept until the block has run: memory of the copying stream must not be given out again before.
                self._kept[weight] = weight.data
                weight.data = weight.data.to(self._wide).div_(scale)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for weight, narrow in self._kept.items():
            weight.data = narrow
        self._kept.clear()
        return output


def _offload_blocks(stack: WanStack, device: torch.device) -> None:
    streams = device.type == "cuda"
    if streams:
        for parameter in stack.parameters():
            # diffusers pins all groups before it lets go of any weight; what is pinned already it takes as it is.
            parameter.data = parameter.data.pin_memory()
        # diffusers prefetches, and waits for copies, only below a module that has tensors beside its blocks.
        stack.register_buffer("offload_anchor", torch.empty(0), persistent=False)
    apply_group_offloading(stack, onload_device=device, offload_device=HOST, num_blocks_per_group=1, use_stream=streams)
