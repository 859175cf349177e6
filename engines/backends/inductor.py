"""The backend `inductor`: one block compiled by AOTInductor with its weights as inputs, so that equal blocks are
compiled once and share the code.

Compiled ahead of time rather than by torch.compile: what comes out is a library that loads in a moment, guards nothing
and compiles nothing while clips are made, whatever the number of rows, tokens and text keys.
"""

from __future__ import annotations

import platform
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cinecat.engines.backends.contract import Engine, EngineSpec, StackInputs
from cinecat.engines.backends.export import example_inputs, open_layer_sizes
from cinecat.engines.backends.stack import WanStack, layer_inputs
from cinecat.engines.errors import EngineError

_COMPILERS = ("g++", "clang++")
_KINDS = tuple((styled, biased) for styled in (False, True) for biased in (False, True))


class InductorEngine:
    """Runs a stack with a compiled block in the place of each."""

    name = "inductor"

    def __init__(self, stack: WanStack, folder: Path) -> None:
        self._weights = [_weights(block) for block in stack.blocks]
        index = -1 if stack.device.index is None else stack.device.index
        self._blocks = {
            kind: torch._inductor.aoti_load_package(str(folder / _file(*kind)), device_index=index) for kind in _KINDS
        }

    def covers(self, inputs: StackInputs) -> bool:
        return True

    def __call__(self, inputs: StackInputs) -> Tensor:
        block: Any = self._blocks[inputs.styles is not None, inputs.key_bias is not None]
        tokens = inputs.tokens
        for layer, weights in enumerate(self._weights):
            tokens = block(weights, tokens, layer_inputs(inputs, layer))
        return tokens


class Inductor:
    """A Backend."""

    name = "inductor"
    any_shape = True
    own_weights = False

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
            return f"inductor: no C++ compiler ({' or '.join(_COMPILERS)}); apt-get install g++"
        if device.type == "cuda" and not torch.utils._triton.has_triton():
            return "inductor: triton is missing; pip install triton"
        return None

    def versions(self) -> Mapping[str, str]:
        return {"torch": torch.__version__, "python": platform.python_version()}

    def build(self, stack: WanStack, spec: EngineSpec, folder: Path, announce: Callable[[str], object]) -> None:
        for number, (styled, biased) in enumerate(_KINDS):
            announce(f"compiling {number + 1} of {len(_KINDS)}")
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    program = _export_block(stack.blocks[0], spec, styled, biased)
                    torch._inductor.aoti_compile_and_package(
                        program,
                        package_path=str(folder / _file(styled, biased)),
                        # Whoever builds it may have other threads than who runs it.
                        inductor_configs={"cpp.dynamic_threads": True},
                    )
            except Exception as error:  # compilers fail in many ways
                raise EngineError(f"engines: inductor cannot compile the blocks: {error}") from error

    def load(self, stack: WanStack, spec: EngineSpec, folder: Path) -> Engine:
        try:
            return InductorEngine(stack, folder)
        except Exception as error:
            raise EngineError(f"engines: {folder} cannot be loaded: {error}") from error


class _BlockFunction(nn.Module):
    """A block as a function of its weights."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Not as a submodule, whose weights would be constants of the program.
        self._block = (block,)
        self.names = [name for name, _ in block.named_parameters()]

    def forward(self, weights: list[Tensor], tokens: Tensor, rest: tuple[Any, ...]) -> Tensor:
        given = dict(zip(self.names, weights, strict=True))
        output: Tensor = torch.func.functional_call(self._block[0], given, (tokens, *rest))
        return output


def _export_block(block: nn.Module, spec: EngineSpec, styled: bool, biased: bool) -> torch.export.ExportedProgram:
    inputs = example_inputs(spec, styled)
    if not biased:
        inputs = replace(inputs, key_bias=None)
    weights = _weights(block)
    tokens, *rest = open_layer_sizes(styled, biased)
    return torch.export.export(
        _BlockFunction(block),
        (weights, inputs.tokens, layer_inputs(inputs, 0)),
        dynamic_shapes=([None] * len(weights), tokens, tuple(rest)),
        strict=False,
    )


def _weights(block: nn.Module) -> list[Tensor]:
    return [parameter.detach() for _, parameter in block.named_parameters()]


def _file(styled: bool, biased: bool) -> str:
    return f"block{'-styled' if styled else ''}{'-biased' if biased else ''}.pt2"
