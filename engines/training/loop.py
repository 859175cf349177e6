"""The loop of both trainings: steps on one schedule, averaged weights, curves and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from cinecat.engines.training.average import BestAverage
from cinecat.engines.training.muon import Optimisers
from cinecat.engines.training.progress import Journal, Pulse, training_bar

Model = TypeVar("Model", bound=nn.Module)


def run_training(
    title: str,
    model: Model,
    optimisers: Optimisers,
    journal: Journal,
    *,
    steps: int,
    warmup: int,
    average_decay: float,
    save_seconds: float,
    loss_at: Callable[[int], Tensor],
    measure: Callable[[Model, int], tuple[float, Mapping[str, float | str]]],
) -> None:
    """Trains in place, resuming from the journal's checkpoint; ends with the best averaged weights, frozen.

    Args:
        save_seconds: between checkpoints; each also measures the averaged weights.
        loss_at: the loss of a step. It draws its data from the step's number, so that a resumed run sees what an
            uninterrupted one would have seen.
        measure: the held-out loss of some weights after so many steps, and what the curve shows of it.
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
    with training_bar(title, step, steps) as move:
        while step < steps:
            started = time.monotonic()
            factor = schedule(step, steps, warmup)
            loss = loss_at(step)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimisers.step(factor)
            step += 1
            average.follow(model, step)
            seconds += time.monotonic() - started
            value = float(loss.detach())
            running = value if running == 0.0 else 0.97 * running + 0.03 * value
            move(step, f"loss {running:.4f}")
            if pulse.due() or step == steps:
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


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate: linear warm-up, then one cosine to a fiftieth at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
