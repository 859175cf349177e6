"""What every engine takes and gives: tensors in, tensors out, and the shapes that it was built for.

An engine is the stack of transformer blocks and nothing else. Patch embedding, merging, the keys and values of the
context, head, solver and guidance stay outside, so uniform and merged tokens, plain and styled rows run through one
engine with one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cinecat.engines.backends.stack import WanStack

STYLED_TARGETS = (
    *(f"attn1.{linear}" for linear in ("to_q", "to_k", "to_v", "to_out.0")),
    "attn2.to_q",
    "attn2.to_out.0",
    "ffn.net.0.proj",
    "ffn.net.2",
)
"""Linears inside the engine that a style may change. Keys and values of the context, which a style changes too, are
computed once per request and come in as they are.
"""

TEXT_MULTIPLE = 16
"""Text keys of an engine are a multiple of this: see `context.ContextKeys`."""


@dataclass(frozen=True)
class Banks:
    """Styles in their slots, for all layers: banks A [layers, slots + 1, rank, in] and B [layers, slots + 1, out, rank]
    in the tokens' dtype, in the order of STYLED_TARGETS; slot 0 is no style.
    """

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]


@dataclass(frozen=True)
class StyleRows:
    """What the rows of a forward wear.

    Attributes:
        slots: int64 [rows].
        strengths: float32 [rows].
    """

    slots: Tensor
    strengths: Tensor
    banks: Banks


@dataclass(frozen=True)
class StackInputs:
    """One forward of the stack. K tokens, T text keys, I image keys.

    Attributes:
        tokens: [rows, K, dim].
        rope_cos, rope_sin: float32 [rows, K, head_dim / 2], of each pair of channels.
        modulation: [rows, 6, dim], of each row's timestep.
        text_keys, text_values: [layers, rows, T, dim], projected and normalised.
        text_bias: [rows, T], added to the logits: log of how many positions of the prompt a key stands for.
        image_keys, image_values: [layers, rows, I, dim].
        key_bias: [rows, K], added to the logits of self-attention: log of how many patches a token stands for; None
            where each stands for one.
        styles: None where no row wears any.

    Biases have the tokens' dtype.
    """

    tokens: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    modulation: Tensor
    text_keys: Tensor
    text_values: Tensor
    text_bias: Tensor
    image_keys: Tensor
    image_values: Tensor
    key_bias: Tensor | None = None
    styles: StyleRows | None = None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def named(self, styled: bool) -> dict[str, Tensor]:
        """All tensors by the names that compiled graphs give their inputs, in the graphs' order.

        A graph takes a key bias always, zeros where there is none; with `styled` also slots, strengths and banks.

        Raises:
            ValueError: rows wear styles and the graph takes none.
        """
        named: dict[str, Tensor] = {name: getattr(self, name) for name in GRAPH_INPUTS}
        if self.key_bias is None:
            named["key_bias"] = self.tokens.new_zeros(self.tokens.shape[:2])
        if not styled:
            if self.styles is not None:
                raise ValueError("styles: the graph takes none")
            return named
        if self.styles is None:
            raise ValueError("styles: the graph takes slots, strengths and banks")
        named["slots"], named["strengths"] = self.styles.slots, self.styles.strengths
        for target, a, b in zip(STYLED_TARGETS, self.styles.banks.a, self.styles.banks.b, strict=True):
            named[bank_name(target, "a")], named[bank_name(target, "b")] = a, b
        return named


GRAPH_INPUTS = tuple(each.name for each in fields(StackInputs) if each.name != "styles")
"""Names of a plain graph's inputs, in order."""


def bank_name(target: str, side: str) -> str:
    """Name of the input that holds bank A or B ("a" or "b") of a target."""
    return f"bank_{target.replace('.', '_')}_{side}"


STYLE_INPUTS = (
    "slots",
    "strengths",
    *(bank_name(target, side) for target in STYLED_TARGETS for side in "ab"),
)
"""Names of the further inputs of a styled graph, in order."""

GRAPH_OUTPUT = "output"


class Engine(Protocol):
    """A stack of blocks, ready to run.

    Attributes:
        name: the backend, as results report it.
    """

    name: str

    def covers(self, inputs: StackInputs) -> bool:
        """Whether it was built for such shapes."""
        ...

    def __call__(self, inputs: StackInputs) -> Tensor:
        """Runs all blocks: [rows, K, dim] in the tokens' dtype."""
        ...


@dataclass(frozen=True)
class Range:
    """Sizes from least to most; engines are fastest at the best."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise ValueError(f"range: {self.least}, {self.best}, {self.most} do not rise from 1")

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most


@dataclass(frozen=True)
class Bucket:
    """Shapes that an engine is built for.

    Attributes:
        rows: of a forward.
        tokens: of each row.
        text: text keys of each row.
    """

    rows: Range
    tokens: Range
    text: Range

    def covers(self, inputs: StackInputs) -> bool:
        rows, tokens, _ = inputs.tokens.shape
        return rows in self.rows and tokens in self.tokens and inputs.text_keys.shape[2] in self.text


ANY_SHAPE = Bucket(Range(1, 1, 64), Range(1, 320, 2**20), Range(1, 16, 512))
"""For backends whose engines take every shape."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from, besides the backend; together they are its key in the cache.

    Attributes:
        model: fingerprint of the model.
        device: "cpu" or "cuda".
        architecture: of the processor: CPU features, or the GPU's compute capability.
        dtype: of the tokens, e.g. "bfloat16".
        layers, heads, dim, ffn_dim, image_tokens: of the model.
        slots, max_rank: of the banks, without the slot for "no style".
        buckets: shapes to build for; ANY_SHAPE alone for backends that take every shape.
        options: of the backend.
    """

    model: str
    device: str
    architecture: str
    dtype: str
    layers: int
    heads: int
    dim: int
    ffn_dim: int
    image_tokens: int
    slots: int
    max_rank: int
    buckets: tuple[Bucket, ...] = (ANY_SHAPE,)
    options: tuple[str, ...] = ()

    def as_key(self) -> dict[str, object]:
        """Everything in it, as plain data."""
        return asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Backend(Protocol):
    """A way to make engines.

    Attributes:
        name: as settings and results spell it.
        any_shape: whether its engines take every shape, so that no bucket enters their key.
        own_weights: whether its engines hold the weights once more, besides the stack.
    """

    name: str
    any_shape: bool
    own_weights: bool

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, in one line with what to install; None where it can."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that its artifacts depend on."""
        ...

    def build(self, stack: WanStack, spec: EngineSpec, folder: Path, announce: Callable[[str], object]) -> None:
        """Writes what `load` needs into an empty folder.

        Raises:
            EngineError: it cannot be built.
        """
        ...

    def load(self, stack: WanStack, spec: EngineSpec, folder: Path) -> Engine:
        """An engine from what `build` wrote, for the weights that it was built from.

        Raises:
            EngineError: the folder holds no such engine.
        """
        ...
