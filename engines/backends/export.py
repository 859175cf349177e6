"""The stack as an exported program and as an ONNX graph, with no size baked in but the model's own.

Rows, tokens and text keys stay open; layers, widths, image tokens, slots and ranks are the model's and the server's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cinecat.engines.backends.contract import (
    GRAPH_INPUTS,
    GRAPH_OUTPUT,
    STYLE_INPUTS,
    STYLED_TARGETS,
    Banks,
    EngineSpec,
    StackInputs,
    StyleRows,
)
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.errors import EngineError

OPSET = 20
"""Of ONNX graphs: what TensorRT 10.13 to 11 read, and ONNX Runtime too."""

ROWS, TOKENS, TEXT = "rows", "tokens", "text"
"""Names of the sizes that stay open."""

_OPEN: dict[str, dict[int, str]] = {
    "tokens": {0: ROWS, 1: TOKENS},
    "rope_cos": {0: ROWS, 1: TOKENS},
    "rope_sin": {0: ROWS, 1: TOKENS},
    "modulation": {0: ROWS},
    "text_keys": {1: ROWS, 2: TEXT},
    "text_values": {1: ROWS, 2: TEXT},
    "text_bias": {0: ROWS, 1: TEXT},
    "image_keys": {1: ROWS},
    "image_values": {1: ROWS},
    "key_bias": {0: ROWS, 1: TOKENS},
    "slots": {0: ROWS},
    "strengths": {0: ROWS},
}
"""Which dimensions of the inputs are open, by name of the size; the banks have none."""


class StackGraph(nn.Module):
    """The stack with flat inputs, as GRAPH_INPUTS and, styled, STYLE_INPUTS name them."""

    def __init__(self, stack: WanStack, styled: bool) -> None:
        super().__init__()
        self.stack = stack
        self.styled = styled

    def forward(self, *inputs: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(GRAPH_INPUTS, inputs, strict=False))
        styles = None
        if self.styled:
            slots, strengths, *banks = inputs[len(GRAPH_INPUTS) :]
            styles = StyleRows(slots, strengths, Banks(tuple(banks[0::2]), tuple(banks[1::2])))
        output: Tensor = self.stack(StackInputs(**named, styles=styles))
        return output


def graph_names(styled: bool) -> tuple[str, ...]:
    """Names of a graph's inputs, in order."""
    return GRAPH_INPUTS + STYLE_INPUTS if styled else GRAPH_INPUTS


def open_sizes(name: str) -> dict[int, str]:
    """Which dimensions of an input are open, each "rows", "tokens" or "text"."""
    return _OPEN.get(name, {})


def open_dims() -> dict[str, Dim]:
    """The open sizes as torch.export is told of them: fresh ones for each program."""
    return {
        ROWS: Dim(ROWS, min=1, max=64),
        TOKENS: Dim(TOKENS, min=2, max=2**20),
        TEXT: Dim(TEXT, min=2, max=512),
    }


def open_layer_sizes(styled: bool, biased: bool) -> list[Any]:
    """Open sizes of a block's tokens and of `stack.layer_inputs`, in torch.export's form."""
    sizes = open_dims()

    def of(name: str) -> dict[int, Dim]:
        # A layer's keys and values have lost the dimension of the layers.
        lost = name.startswith(("text_", "image_")) and name != "text_bias"
        return {dim - lost: sizes[size] for dim, size in open_sizes(name).items()}

    shapes: list[Any] = [of(name) for name in GRAPH_INPUTS if name != "key_bias"]
    shapes.append(of("key_bias") if biased else None)
    shapes += [of("slots"), of("strengths")] if styled else [None, None]
    shapes.append(dict.fromkeys(STYLED_TARGETS, (None, None)) if styled else {})
    return shapes


def example_inputs(spec: EngineSpec, styled: bool, rows: int = 2, tokens: int = 24, text: int = 32) -> StackInputs:
    """Inputs of some sizes, zeros throughout, on the spec's device."""
    dtype, device = spec.torch_dtype, torch.device(spec.device)
    layers, dim, half = spec.layers, spec.dim, spec.dim // spec.heads // 2

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    styles = None
    if styled:
        sizes = [target_size(target, spec) for target in STYLED_TARGETS]
        banks = Banks(
            tuple(zeros(layers, spec.slots + 1, spec.max_rank, n) for n, _ in sizes),
            tuple(zeros(layers, spec.slots + 1, m, spec.max_rank) for _, m in sizes),
        )
        styles = StyleRows(zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.float32), banks)
    return StackInputs(
        tokens=zeros(rows, tokens, dim),
        rope_cos=zeros(rows, tokens, half, dtype=torch.float32),
        rope_sin=zeros(rows, tokens, half, dtype=torch.float32),
        modulation=zeros(rows, 6, dim),
        text_keys=zeros(layers, rows, text, dim),
        text_values=zeros(layers, rows, text, dim),
        text_bias=zeros(rows, text),
        image_keys=zeros(layers, rows, spec.image_tokens, dim),
        image_values=zeros(layers, rows, spec.image_tokens, dim),
        key_bias=zeros(rows, tokens),
        styles=styles,
    )


def target_size(target: str, spec: EngineSpec) -> tuple[int, int]:
    """(in, out) features of a linear of STYLED_TARGETS."""
    if target == "ffn.net.0.proj":
        return spec.dim, spec.ffn_dim
    return (spec.ffn_dim, spec.dim) if target == "ffn.net.2" else (spec.dim, spec.dim)


def export_program(stack: WanStack, spec: EngineSpec, styled: bool) -> ExportedProgram:
    """The stack as torch.export sees it. Raises EngineError when it cannot be exported."""
    named = example_inputs(spec, styled).named(styled)
    sizes = open_dims()
    shapes = tuple({dim: sizes[size] for dim, size in open_sizes(name).items()} for name in named)
    try:
        with torch.no_grad():
            return torch.export.export(
                StackGraph(stack, styled).eval(), tuple(named.values()), dynamic_shapes=(shapes,), strict=False
            )
    except Exception as error:  # torch raises many kinds
        raise EngineError(f"engines: the blocks cannot be exported: {error}") from error


def export_onnx(stack: WanStack, spec: EngineSpec, styled: bool, path: Path) -> None:
    """Writes the stack as an ONNX graph, its weights beside it as `path`.data.

    Raises:
        EngineError: it cannot be exported, or a library is missing.
    """
    program = export_program(stack, spec, styled)
    try:
        with _silence():
            onnx = torch.onnx.export(
                program,
                input_names=list(graph_names(styled)),
                # The program has its own symbols for them: this names them.
                dynamic_shapes=[open_sizes(name) or None for name in graph_names(styled)],
                output_names=[GRAPH_OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
            assert onnx is not None
            onnx.save(str(path), external_data=True)
    except Exception as error:
        raise EngineError(f"engines: the blocks cannot be written as ONNX: {error}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Within it torch.onnx says nothing: its exporter tells of torchvision, which the graph has no use for."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
