"""The small transformer's stack, engines of every backend for it, and a backend that needs no compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from cinecat.engines.backends.choice import buckets_for
from cinecat.engines.backends.contract import ANY_SHAPE, Backend, Bucket, Engine, EngineSpec, StackInputs
from cinecat.engines.backends.parity import ParitySuite
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.errors import EngineError
from cinecat.engines.tokens.grid import Grid
from tests.engines.samples import DIM, FFN, small_transformer

GRIDS = (Grid(2, 4, 4), Grid(3, 5, 7))


def small_spec(dtype: str = "float32", device: str = "cpu", buckets: tuple[Bucket, ...] = (ANY_SHAPE,)) -> EngineSpec:
    return EngineSpec(
        model="small",
        device=device,
        architecture="any",
        dtype=dtype,
        layers=2,
        heads=2,
        dim=DIM,
        ffn_dim=FFN,
        image_tokens=3,
        slots=2,
        max_rank=4,
        buckets=buckets,
    )


class Bench:
    """A suite, its stack, and engines of it by backend, built in `folder`."""

    def __init__(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> None:
        transformer = small_transformer()
        if dtype != "float32":
            # Loaded in a dtype, Wan keeps its float32 parts, which `to` would not.
            transformer.save_pretrained(folder / "transformer")
            transformer = WanTransformer3DModel.from_pretrained(
                folder / "transformer", torch_dtype=getattr(torch, dtype)
            ).requires_grad_(False)
        transformer = transformer.to(device)
        self.transformer = transformer
        self.stack = WanStack(transformer)
        self.spec = small_spec(dtype, device, buckets_for(GRIDS))
        self.suite = ParitySuite(transformer, self.spec)
        self._folder = folder

    def engine(self, backend: Backend) -> Engine:
        folder = self._folder / backend.name
        if not folder.exists():
            folder.mkdir()
            backend.build(self.stack, self.spec, folder, lambda step: None)
        return backend.load(self.stack, self.spec, folder)


class FakeBackend:
    """A Backend whose engines run the stack, with weights of its own, and change what comes out."""

    any_shape = True

    def __init__(
        self,
        name: str,
        change: Callable[[Tensor], Tensor] = lambda output: output,
        missing: str | None = None,
        built: bool = True,
        own_weights: bool = False,
    ) -> None:
        self.name, self.own_weights = name, own_weights
        self._change, self._missing, self._built = change, missing, built

    def missing(self, device: torch.device) -> str | None:
        return self._missing

    def versions(self) -> Mapping[str, str]:
        return {"fake": "1"}

    def build(self, stack: WanStack, spec: EngineSpec, folder: Path, announce: Callable[[str], object]) -> None:
        if not self._built:
            raise EngineError("engines: <compiler> crashed")
        torch.save(stack, folder / "stack.pt")

    def load(self, stack: WanStack, spec: EngineSpec, folder: Path) -> Engine:
        own = torch.load(folder / "stack.pt", weights_only=False) if self.own_weights else stack
        return FakeEngine(self.name, own, self._change)


class FakeEngine:
    def __init__(self, name: str, stack: WanStack, change: Callable[[Tensor], Tensor]) -> None:
        self.name, self._stack, self._change = name, stack, change

    def covers(self, inputs: StackInputs) -> bool:
        return True

    def __call__(self, inputs: StackInputs) -> Tensor:
        return self._change(self._stack(inputs))
