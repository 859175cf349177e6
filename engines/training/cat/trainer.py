"""The distillation: what merged tokens predict in clean space is drawn to what all tokens predict."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional

from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.traces import State, Trace
from cinecat.engines.training.cat.two_paths import CatAdapter, Given, TwoPaths
from cinecat.engines.training.loop import run_training
from cinecat.engines.training.progress import Journal

_GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples, without their whole parts, are spread evenly however many there are."""


def group_of(rung: float, style: str) -> str:
    """What held-out cases are told apart by, for the loss."""
    return f"rung {rung:g}, {'styled' if style else 'plain'}"


@dataclass(frozen=True)
class Held:
    """One case of the held-out measurement.

    Attributes:
        styled: whether its course wears a style.
        side: shorter side of its film, in pixels.
    """

    state: State
    given: Given
    style: str
    rung: float
    side: int

    @property
    def groups(self) -> tuple[str, ...]:
        """What the card reports it under."""
        return (group_of(self.rung, self.style), f"rung {self.rung:g}", f"{self.side} pixels")


@dataclass(frozen=True)
class Measured:
    """What merging loses on the held-out courses.

    Attributes:
        errors: mean squared error of the clean latents to those that all tokens predict, by group of cases.
        loss: the mean of the errors at each rung, plain and styled, each relative to what it is without the adapter.
    """

    errors: Mapping[str, float]
    loss: float


@dataclass(frozen=True)
class TrainedCat:
    """The best averaged weights of a run.

    Attributes:
        factors: peft's tensors by key, float32 on the CPU.
        before, after: without the adapter and with it.
    """

    factors: dict[str, Tensor]
    before: Measured
    after: Measured


def train_cat(
    paths: TwoPaths,
    transformer: Any,
    train: Sequence[Trace],
    held_out: Sequence[Trace],
    recipe: CatRecipe,
    journal: Journal,
    max_seconds: float = math.inf,
) -> TrainedCat:
    """Trains the adapter of `paths`; a run that was stopped goes on from its journal.

    Every sample is drawn from its number. Its loss is the mean squared error in clean space over the mean that its rung
    has without the adapter, in shots that wear a style or in those that wear none: on wan-tiny it is twenty times as
    large at a quarter of the tokens as at three quarters, and four times as large with a style as without. Noise levels
    are weighted alike: their errors lie within a factor of three.

    Args:
        transformer: of `paths`.
        train, held_out: courses on disk.
        max_seconds: of all steps; the schedule then ends by time.
    """
    cases = held_out_cases(held_out, recipe)
    start = copy.deepcopy(paths.adapter)
    before = measure(paths, start, cases, None)

    def loss_at(number: int) -> Tensor:
        trace, index, rung = draw_sample(train, recipe, number)
        style = trace.spec.style
        # Where few films are held out, none of them may wear a style.
        scale = before.errors.get(group_of(rung, style), before.errors[f"rung {rung:g}"])
        return distillation_loss(paths, trace.state(index), trace.given(), style, rung) / scale

    def measured(adapter: CatAdapter, step: int) -> tuple[float, dict[str, float | str]]:
        now = measure(paths, adapter, cases, before)
        gains = {f"gain_db_{rung:g}": round(gain_db(before, now, f"rung {rung:g}"), 3) for rung in recipe.rungs}
        return now.loss, {"held_out_loss": round(now.loss, 5), **gains}

    run_training(
        "CAT",
        paths.adapter,
        _Adam(paths.adapter, recipe),
        journal,
        steps=recipe.steps,
        warmup=max(1, round(recipe.warmup * recipe.steps)),
        average_decay=recipe.average,
        save_seconds=math.inf,
        loss_at=loss_at,
        measure=measured,
        parts=recipe.accumulation,
        save_steps=recipe.evaluate_every,
        max_seconds=max_seconds,
    )
    after = measure(paths, paths.adapter, cases, before)
    factors = get_peft_model_state_dict(transformer)
    return TrainedCat(
        {name: factor.detach().float().cpu().contiguous() for name, factor in factors.items()}, before, after
    )


def distillation_loss(paths: TwoPaths, state: State, given: Given, style: str, rung: float) -> Tensor:
    """Mean squared error of the clean latents that merged tokens predict, with the adapter."""
    clean = paths.clean(state.noisy, state.timestep, given, style, state.prediction, rung, adapted=True)
    return functional.mse_loss(clean, state.target.to(clean.device))


def draw_sample(traces: Sequence[Trace], recipe: CatRecipe, number: int) -> tuple[Trace, int, float]:
    """A course, one of its steps, and a rung; every round is another order of all courses."""
    count = len(traces)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed + number // count))
    trace = traces[int(order[number % count])]
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + number)
    index = int(torch.randint(len(trace), (), generator=draw))
    return trace, index, recipe.rungs[int(torch.randint(len(recipe.rungs), (), generator=draw))]


def held_out_cases(traces: Sequence[Trace], recipe: CatRecipe) -> list[Held]:
    """Each course at each rung, at steps that are spread over all of them."""
    cases: list[Held] = []
    for place, trace in enumerate(traces):
        spec, given = trace.spec, trace.given()
        state = trace.state(int((0.5 + place * _GOLDEN) % 1.0 * len(trace)))
        side = min(spec.width, spec.height)
        cases.extend(Held(state, given, spec.style, rung, side) for rung in recipe.rungs)
    return cases


@torch.no_grad()
def measure(paths: TwoPaths, adapter: CatAdapter, cases: Sequence[Held], before: Measured | None) -> Measured:
    """What merging loses with an adapter.

    Args:
        adapter: whose weights are worn for the measurement, in place of those of `paths`.
        before: without any; None where this is that.
    """
    live = copy.deepcopy(paths.adapter.state_dict())
    paths.adapter.load_state_dict(adapter.state_dict())
    errors: dict[str, list[float]] = {}
    for case in cases:
        error = float(distillation_loss(paths, case.state, case.given, case.style, case.rung))
        for group in case.groups:
            errors.setdefault(group, []).append(error)
    paths.adapter.load_state_dict(live)
    means = {group: sum(values) / len(values) for group, values in errors.items()}
    counting = {group_of(case.rung, case.style) for case in cases}
    ratios = [means[group] / before.errors[group] for group in sorted(counting)] if before else [1.0]
    return Measured(means, sum(ratios) / len(ratios))


def gain_db(before: Measured, after: Measured, group: str) -> float:
    """How much nearer merged tokens come to all tokens."""
    return 10.0 * math.log10(before.errors[group] / after.errors[group])


class _Adam:
    """AdamW as the loop takes it."""

    def __init__(self, adapter: CatAdapter, recipe: CatRecipe) -> None:
        self._adam = torch.optim.AdamW(
            adapter.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self._rate = recipe.learning_rate

    def step(self, factor: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = self._rate * factor
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state)
