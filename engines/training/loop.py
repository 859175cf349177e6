"""The loop of the trainings of models: steps on one schedule, averaged weights, curves and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from cinecat.engines.training.average import BestAverage
from cinecat.engines.training.progress import Journal, Pulse, training_bar

Model = TypeVar("Model", bound=nn.Module)


class Optimiser(Protocol):
    """What moves the weights."""

    def step(self, factor: float) -> None:
        """One step at `factor` of the learning rate; the gradients are dropped."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def run_training(
    title: str,
    model: Model,
    optimisers: Optimiser,
    journal: Journal,
    *,
    steps: int,
    warmup: int,
    average_decay: float,
    save_seconds: float,
    loss_at: Callable[[int], Tensor],
    measure: Callable[[Model, int], tuple[float, Mapping[str, float | str]]],
    parts: int = 1,
    save_steps: int = 0,
    max_seconds: float = math.inf,
) -> None:
    """Trains in place, resuming from the journal's checkpoint; ends with the best averaged weights, frozen.

    Args:
        save_seconds: between checkpoints; each also measures the averaged weights.
        loss_at: the loss of a part of a step. It draws its data from the part's number, so that a resumed run sees what
            an uninterrupted one would have seen.
        measure: the held-out loss of some weights after so many steps, and what the curve shows of it.
        parts: whose mean gradient a step takes; they run one after the other.
        save_steps: between checkpoints, rather than seconds, so that the best weights do not depend on a clock.
        max_seconds: of all steps together. Where it is shorter than `steps`, the schedule runs by time.
    """
    average = BestAverage(model, average_decay)
    step, seconds = 0, 0.0
    state = journal.load()
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimisers.load_state_dict(state["optimiser"])
        step, seconds = int(state["step"]), float(state["seconds"])
        journal.rewind(step)
    model.train().requires_grad_(True)
    pulse, running = Pulse(save_seconds), 0.0

    def reached() -> float:
        return max(step, seconds / max_seconds * steps)

    with training_bar(title, int(reached()), steps) as move:
        while reached() < steps:
            started = time.monotonic()
            factor = schedule(reached(), steps, warmup)
            value = 0.0
            for part in range(parts):
                loss = loss_at(step * parts + part) / parts
                loss.backward()  # type: ignore[no-untyped-call]
                value += float(loss.detach())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimisers.step(factor)
            step += 1
            average.follow(model, step)
            seconds += time.monotonic() - started
            running = value if running == 0.0 else 0.97 * running + 0.03 * value
            move(min(int(reached()), steps), f"loss {running:.4f}")
            due = step % save_steps == 0 if save_steps else pulse.due()
            if due or reached() >= steps:
                held_out_loss, shown = measure(average.model, step)
                average.offer(held_out_loss)
                journal.log(
                    {
                        "step": step,
                        "seconds": round(seconds, 1),
                        "schedule": round(factor, 4),
                        "loss": round(running, 5),
                        **shown,
                    }
                )
                journal.save(
                    {
                        "model": model.state_dict(),
                        "average": average.state_dict(),
                        "optimiser": optimisers.state_dict(),
                        "step": step,
                        "seconds": seconds,
                    }
                )
    average.give(model)
    model.eval().requires_grad_(False)


def schedule(step: float, steps: int, warmup: int) -> float:
    """Share of the learning rate: linear warm-up, then one cosine to a fiftieth at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
