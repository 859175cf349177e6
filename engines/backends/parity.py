"""Whether an engine computes what diffusers computes: forwards of either token path, of rows that wear styles or none,
beside diffusers' own modules over the same weights.

On the uniform path the reference is diffusers' forward as it is. On the CAT path it is diffusers' blocks with the bias
per key as the mask of their self-attention, which their forward does not pass on, and rotary tables at mean positions.
Prompts are padded to 512 positions there, so the collapse of the padding is compared too. A style is the LoRA formula,
added to what diffusers' linears give.

What is compared are velocities. Between the blocks and them lies a norm, so that a factor common to all of a token's
channels would not be seen; it would do no harm either.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from cinecat.engines.backends.contract import Engine, EngineSpec, StackInputs
from cinecat.engines.context import Branch
from cinecat.engines.denoise import Denoiser, EngineBlocks, Merged, Moment, Passage
from cinecat.engines.errors import EngineError
from cinecat.engines.slots import NO_STYLE, Factors, StyleSlots, Worn
from cinecat.engines.stages import TEXT_TOKENS
from cinecat.engines.tokens import path
from cinecat.engines.tokens.adaptive import price
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.schedule import rung_tokens

TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
"""Largest difference that passes, over the largest absolute value of what diffusers predicts, by the tokens' dtype."""

_LATENTS, _CONDITION = 16, 20
_STYLES = 2
_STRENGTH = 0.8
_STYLE_SIZE = 0.2
"""Of what a style adds to a linear, over what goes into it."""


@dataclass(frozen=True)
class Case:
    """One forward.

    Attributes:
        grid: patches of each row's clip.
        keep_ratio: 1 is the uniform path, less the CAT path at that rung.
        words: of each row's prompt, at most 512.
        styles: what each row wears: 0 for none, else the number of a sample style, 1 or 2.
    """

    grid: Grid
    keep_ratio: float
    words: tuple[int, ...]
    styles: tuple[int, ...]

    @property
    def path(self) -> str:
        """ "uniform" or "cat"."""
        return "uniform" if self.keep_ratio == 1.0 else "cat"

    @property
    def wear(self) -> str:
        """ "plain", "styled", or "mixed" where rows differ."""
        if len(set(self.styles)) > 1:
            return "mixed"
        return "styled" if self.styles[0] else "plain"

    @property
    def tokens(self) -> int:
        """Of each row."""
        return rung_tokens(self.grid, self.keep_ratio)

    def __str__(self) -> str:
        return f"{self.path} {self.wear}, {len(self.words)} x {self.tokens} tokens, prompts of {self.words} words"


@dataclass(frozen=True)
class Outcome:
    """How far an engine is from diffusers in a case.

    Attributes:
        error: largest difference over diffusers' largest absolute value; NaN where the engine gave such.
        tolerance: what it may be.
    """

    case: Case
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def standard_cases(grids: Sequence[Grid], most_rows: int = 3, slots: int = _STYLES) -> tuple[Case, ...]:
    """Both paths, plain, styled and mixed, for clips of every size.

    Args:
        most_rows: that the engine takes.
        slots: for styles that it has.
    """
    second = min(2, slots)
    wears = (((9,), (0,)), ((511,), (1,)), ((0, 40, 9)[:most_rows], (1, 0, second)[:most_rows]))
    return tuple(
        Case(grid, keep, words, styles) for grid, keep, (words, styles) in itertools.product(grids, (1.0, 0.5), wears)
    )


@dataclass(frozen=True)
class _Row:
    """What one row of a forward predicts from. Latents [1, 16, T, H, W] and condition [1, 20, T, H, W] are float32,
    text [1, 512, text_dim] and image [1, n, image_dim] have the transformer's dtype.
    """

    latents: Tensor
    condition: Tensor
    timestep: Tensor
    text: Tensor
    image: Tensor
    branch: Branch
    style: int
    merged: Merged | None

    def moment(self, worn: Worn) -> Moment:
        return Moment(self.latents, self.condition, self.timestep, (self.branch,), worn, self.merged)


class ParitySuite:
    """Compares engines of one transformer's stack with diffusers' modules over the same weights.

    Args:
        transformer: diffusers', whose stack is made already, so that both share the weights; it gets style slots. No
            engine may release its weights while the suite is used.
        spec: of the engines.
    """

    def __init__(self, transformer: Any, spec: EngineSpec) -> None:
        self.reference = _twin(transformer)
        self.slots = StyleSlots(transformer.blocks, spec.slots, spec.max_rank, spec.torch_dtype)
        self.styles = [_sample_style(self.slots.targets, spec, number) for number in range(min(_STYLES, spec.slots))]
        self.worn = [NO_STYLE]
        for number, factors in enumerate(self.styles):
            self.worn.append(self.slots.wear({f"sample {number}": _STRENGTH}, partial(_given, factors)))
        self._transformer, self._spec = transformer, spec
        self._expected: dict[Case, tuple[Tensor, ...]] = {}

    def check(self, engine: Engine, case: Case) -> Outcome:
        """Runs one case on an engine. Raises EngineError where it is not built for its shapes, or fails."""
        found, expected = self.velocities(engine, case), self.expected(case)
        errors = [
            (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
            for ours, theirs in zip(found, expected, strict=True)
        ]
        # Unlike Python's, this maximum keeps a NaN.
        return Outcome(case, float(torch.stack(errors).max()), TOLERANCES[self._spec.dtype])

    @torch.no_grad()
    def velocities(self, engine: Engine, case: Case) -> tuple[Tensor, ...]:
        """What an engine predicts for every row, all rows in one forward: [1, 16, T, H, W] each.

        Raises:
            EngineError: it is not built for such shapes.
        """
        rows = self._rows(case)
        denoiser = Denoiser(self._transformer, EngineBlocks(self._transformer, _Checked(engine, case), self.slots))
        moments = [row.moment(self.worn[row.style]) for row in rows]
        return tuple(velocity for (velocity,) in denoiser.velocities_of(moments))

    @torch.no_grad()
    def expected(self, case: Case) -> tuple[Tensor, ...]:
        """What diffusers predicts for every row, one row at a time: [1, 16, T, H, W] each."""
        if case not in self._expected:
            self._expected[case] = tuple(map(self._reference, self._rows(case)))
        return self._expected[case]

    def forward(self, engine: Engine, case: Case) -> Callable[[], object]:
        """A step of a case's first row as requests run it, its context and plan ready."""
        row = self._row(case, 0)
        worn = self.worn[row.style]
        denoiser = Denoiser(self._transformer, EngineBlocks(self._transformer, engine, self.slots))
        return torch.no_grad()(lambda: _predict(denoiser, row, worn))

    def reference_forward(self, case: Case) -> Callable[[], object]:
        """The same by diffusers."""
        row = self._row(case, 0)
        return torch.no_grad()(lambda: self._reference(row))

    def _reference(self, row: _Row) -> Tensor:
        reference = self.reference
        with self._wearing(row.style):
            if row.merged is not None:
                blocks = _DiffusersBlocks(reference, row.text, row.image)
                return _predict(Denoiser(reference, blocks), row, NO_STYLE)
            video = torch.cat([row.latents, row.condition], dim=1).to(reference.dtype)
            velocity: Tensor = reference(video, row.timestep[None], row.text, row.image, return_dict=False)[0]
            return velocity

    @contextmanager
    def _wearing(self, style: int) -> Iterator[None]:
        """Within it the reference's linears add a sample style."""
        with ExitStack() as hooks:
            for target, (a, b) in self.styles[style - 1].items() if style else ():

                def add(
                    module: nn.Module, given: tuple[Tensor], output: Tensor, a: Tensor = a, b: Tensor = b
                ) -> Tensor:
                    return output + _STRENGTH * (given[0] @ a.mT @ b.mT)

                hooks.callback(self.reference.get_submodule(target).register_forward_hook(add).remove)
            yield

    def _rows(self, case: Case) -> list[_Row]:
        return [self._row(case, index) for index in range(len(case.words))]

    def _row(self, case: Case, index: int) -> _Row:
        config, device, dtype = self._transformer.config, self._transformer.device, self._spec.torch_dtype
        draw = torch.Generator().manual_seed(1000 * case.words[index] + index)
        grid = case.grid
        shape = (grid.frames, grid.height * path.PATCH, grid.width * path.PATCH)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(1, *sizes, generator=draw).to(device)

        latents, condition, prediction = (drawn(n, *shape) for n in (_LATENTS, _CONDITION, _LATENTS))
        text = drawn(TEXT_TOKENS, config.text_dim).to(dtype)
        text[:, case.words[index] :] = 0
        image = drawn(self._spec.image_tokens, config.image_dim).to(dtype)
        merged = None
        if case.keep_ratio < 1.0:
            merged = Merged(price(grid, prediction).allocate(case.tokens), prediction)
        return _Row(
            latents=latents,
            condition=condition,
            timestep=torch.tensor(900.0 - 150.0 * index, device=device),
            text=text,
            image=image,
            branch=Branch.project(self._transformer.condition_embedder, text, image),
            style=case.styles[index],
            merged=merged,
        )


def _predict(denoiser: Denoiser, row: _Row, worn: Worn) -> Tensor:
    return denoiser.velocities_of([row.moment(worn)])[0][0]


class _Checked:
    """An engine that refuses what it was not built for."""

    def __init__(self, engine: Engine, case: Case) -> None:
        self.name = engine.name
        self._engine, self._case = engine, case

    def covers(self, inputs: StackInputs) -> bool:
        return self._engine.covers(inputs)

    def __call__(self, inputs: StackInputs) -> Tensor:
        if not self.covers(inputs):
            raise EngineError(f"engines: {self.name} is not built for {self._case}")
        return self._engine(inputs)


class _DiffusersBlocks:
    """A BlockStack of diffusers' blocks, for one row. Text [1, 512, text_dim] is padded; image is [1, n, image_dim]."""

    def __init__(self, transformer: Any, text: Tensor, image: Tensor) -> None:
        embedder = transformer.condition_embedder
        self._blocks = transformer.blocks
        self._context = torch.cat([embedder.image_embedder(image), embedder.text_embedder(text)], dim=1)

    def __call__(self, passages: Sequence[Passage]) -> list[Tensor]:
        (passage,) = passages
        tokens, key_bias = passage.tokens, passage.key_bias
        tables = diffusers_rope(passage.rope)
        attention = BiasedAttention(None if key_bias is None else key_bias[:, None, None])
        for block in self._blocks:
            own, block.attn1.processor = block.attn1.processor, attention
            try:
                tokens = block(tokens, self._context, passage.modulation, tables)
            finally:
                block.attn1.processor = own
        return [tokens]


def diffusers_rope(rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Tables [1, K, head_dim / 2] as diffusers' blocks take them, [1, K, 1, head_dim]: every angle twice, once for each
    channel of a pair.
    """
    return tuple(table.repeat_interleave(2, dim=-1)[:, :, None] for table in rope)


class BiasedAttention(WanAttnProcessor):  # type: ignore[misc]
    """diffusers' self-attention with a bias per key [rows, 1, 1, K], which its blocks do not pass on."""

    def __init__(self, key_bias: Tensor | None) -> None:
        super().__init__()
        self._key_bias = key_bias

    def __call__(self, attn: Any, hidden: Tensor, context: Any = None, mask: Any = None, rope: Any = None) -> Tensor:
        output: Tensor = super().__call__(attn, hidden, context, self._key_bias, rope)
        return output


def _twin(transformer: Any) -> Any:
    """The same modules once more, over the same tensors."""
    shared = itertools.chain(transformer.parameters(), transformer.buffers())
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in shared})


def _sample_style(targets: Mapping[str, tuple[int, int]], spec: EngineSpec, number: int) -> Factors:
    """Random factors for every linear that a style may change; the second style has half the rank."""
    draw = torch.Generator().manual_seed(number)
    rank = max(1, spec.max_rank // (1 + number))

    def drawn(rows: int, columns: int, size: float) -> Tensor:
        return (torch.randn(rows, columns, generator=draw) * size).to(spec.torch_dtype).to(spec.device)

    return {
        target: (drawn(rank, n, n**-0.5), drawn(m, rank, _STYLE_SIZE * rank**-0.5))
        for target, (n, m) in targets.items()
    }


def _given(factors: Factors, name: str) -> Factors:
    """Loads a style that is in memory, whatever it is called."""
    return factors
