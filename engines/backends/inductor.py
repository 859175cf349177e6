"""The backend `inductor`: torch.compile, one block at a time, so that all equal blocks compile once.

Shapes are dynamic: one compilation serves every number of tokens and text keys, and another one every number of rows
above one, since torch takes a size of one for a constant. What a build leaves is torch's own cache of compiled code,
which another process of the same machine takes up.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinecat.engines.backends.contract import Engine, EngineSpec, StackInputs
from cinecat.engines.backends.export import example_inputs
from cinecat.engines.backends.stack import WanStack, WanStackBlock, layer_inputs
from cinecat.engines.errors import EngineError

_ARTIFACTS = "inductor.bin"
_COMPILERS = ("g++", "clang++")


class InductorEngine:
    """Runs a stack's blocks as torch.compile makes them."""

    name = "inductor"

    def __init__(self, stack: WanStack) -> None:
        self._stack = stack
        # The function and not the module: the stack itself stays eager for whoever else runs it.
        self._block: Any = torch.compile(WanStackBlock.forward, dynamic=True, fullgraph=True)

    def covers(self, inputs: StackInputs) -> bool:
        return True

    def __call__(self, inputs: StackInputs) -> Tensor:
        tokens = inputs.tokens
        for layer, block in enumerate(self._stack.blocks):
            tokens = self._block(block, tokens, *layer_inputs(inputs, layer))
        return tokens


class Inductor:
    """A Backend."""

    name = "inductor"
    any_shape = True

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
            return f"inductor: no C++ compiler ({' or '.join(_COMPILERS)}); install one, e.g. apt-get install g++"
        if device.type == "cuda" and not torch.utils._triton.has_triton():
            return "inductor: triton is missing; pip install triton"
        return None

    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__, "python": platform.python_version()}

    def build(self, stack: WanStack, spec: EngineSpec, folder: Path, announce: Callable[[str], object]) -> None:
        engine = InductorEngine(stack)
        forwards = [(rows, styled, biased) for rows in (1, 2) for styled in (False, True) for biased in (False, True)]
        torch._dynamo.reset()
        try:
            with torch.inference_mode():
                for number, (rows, styled, biased) in enumerate(forwards):
                    announce(f"compiling {number + 1} of {len(forwards)}")
                    inputs = example_inputs(spec, styled, rows)
                    engine(inputs if biased else replace(inputs, key_bias=None))
            saved = torch.compiler.save_cache_artifacts()
        except Exception as error:  # compilers fail in many ways
            raise EngineError(f"engines: inductor cannot compile the blocks: {error}") from error
        if saved is None:
            raise EngineError("engines: inductor left nothing to keep; is its cache switched off?")
        (folder / _ARTIFACTS).write_bytes(saved[0])

    def load(self, stack: WanStack, spec: EngineSpec, folder: Path) -> Engine:
        try:
            torch.compiler.load_cache_artifacts((folder / _ARTIFACTS).read_bytes())
        except Exception as error:
            raise EngineError(f"engines: {folder / _ARTIFACTS} cannot be taken up: {error}") from error
        return InductorEngine(stack)
