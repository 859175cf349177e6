"""What one request is between two calls of the engine core, and what a step makes of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinecat.engines import resume, stages, step_cache
from cinecat.engines.backends.contract import Engine
from cinecat.engines.context import Branch
from cinecat.engines.denoise import Denoiser, Merged, Moment, sigma_of
from cinecat.engines.messages import Failure
from cinecat.engines.step_cache import Remembered
from cinecat.engines.tokens.adaptive import AdaptiveTokens
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.vae_tiles import Tiling
from cinecat.engines.wardrobe import Outfit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Advance:
    """What a step makes of a request, before it is the request's."""

    latents: Tensor
    scheduler: Any
    tokens: AdaptiveTokens | None
    spent: tuple[int, ...]
    remembered: Remembered


@dataclass
class Request:
    """What one request is between two calls."""

    latents: Tensor  # [1, 16, latent frames, height / 8, width / 8], float32
    condition: Tensor  # [1, 20, latent frames, height / 8, width / 8], float32
    branches: tuple[Branch, ...]  # the prompt's, then with guidance the negative prompt's
    guidance_scale: float
    digest: str  # of all that decides the clip
    scheduler: Any
    timesteps: Tensor  # the scheduler's, on the CPU: reading one must not wait for the device
    denoiser: Denoiser
    engine: Engine
    outfit: Outfit
    grid: Grid
    tiling: Tiling  # of the VAE's frames
    tokens: AdaptiveTokens | None  # None on the uniform path
    runs: frozenset[int] | None = None  # steps that run the model; None where all do
    remembered: Remembered = field(
        default_factory=Remembered
    )  # what steps at full tokens predicted, after guidance; nothing on the uniform path where none is cached
    spent: tuple[int, ...] = ()  # tokens of each step that is done; 0 where it was cached
    decoder: stages.Decoder | None = None

    @property
    def step(self) -> int:
        """How many are done."""
        return len(self.spent)

    @property
    def coming_is_cached(self) -> bool:
        """Whether the coming step runs no forward."""
        return self.runs is not None and self.step not in self.runs

    @property
    def keep_ratio(self) -> float:
        return 1.0 if self.tokens is None else self.tokens.keep_ratio

    @property
    def surroundings(self) -> dict[str, str]:
        """What rounding depends on, and may differ when the request is taken up again."""
        return {"engine": self.engine.name, "tiles": f"{self.tiling.rows} x {self.tiling.columns}"}

    @property
    def state_bytes(self) -> int:
        """Held from the first step on; a condition that the cache holds too counts."""
        wears = 1 if self.tokens is None or self.outfit.whole == self.outfit.merged else 2
        size = self.latents.nbytes + self.condition.nbytes + resume.solver_bytes(self.scheduler, self.latents)
        size += sum(self.denoiser.context_bytes(branch, wears) for branch in self.branches)
        return size + step_cache.state_bytes(self.latents) if self._remembers else size

    @property
    def _remembers(self) -> bool:
        """Whether some steps are expected to follow from those at full tokens."""
        return self.runs is not None or self.tokens is not None

    def moment(self) -> tuple[Moment, int]:
        """What the coming step is predicted from, and its tokens; 0 for a cached one."""
        merged, worn, timestep = None, self.outfit.whole, self.timesteps[self.step]
        if self.tokens is not None and self.tokens.merges:
            expected = self.remembered.carried_on(sigma_of(timestep))
            if (plan := self.tokens.plan(expected)) is not None:
                merged, worn = Merged(plan, expected), self.outfit.merged
        moment = Moment(self.latents, self.condition, timestep, self.branches, worn, merged)
        if self.coming_is_cached:
            return moment, 0
        return moment, self.grid.count if merged is None else merged.plan.tokens

    def cached_velocity(self, moment: Moment) -> Tensor:
        """The velocity of a cached step: [1, 16, T, H, W], float32, after guidance as what it is made from."""
        clean = self.remembered.carried_on(moment.sigma)
        return step_cache.velocity_towards(clean, self.latents, moment.sigma)

    def _go_on(self, progress: resume.Progress) -> None:
        """Goes on from what steps had made."""
        self.latents, self.spent = progress.latents, progress.spent
        for name, value in progress.solver.items():
            setattr(self.scheduler, name, value)
        self.remembered = Remembered(progress.remembered)
        if self.tokens is not None:
            self.tokens.keep_ratio, self.tokens.spent = progress.keep_ratio, list(progress.spent)

    def advance(self, moment: Moment, velocity: Tensor, spent: int) -> Advance | Failure:
        """What the coming step makes of it, by the guided velocity and the tokens of each row; it stays as it is."""
        scheduler = resume.copied_solver(self.scheduler)
        latents = scheduler.step(velocity, moment.timestep, self.latents, return_dict=False)[0]
        if not torch.isfinite(latents).all():
            return Failure(
                "request",
                f"step {self.step + 1} gave NaN or infinity; lower the strengths or the guidance, or wear less",
            )
        tokens, remembered = self.tokens, self.remembered
        if self._remembers and spent == self.grid.count:
            clean = (self.latents - moment.sigma * velocity).to(torch.float32)
            remembered = remembered.with_step(moment.sigma, clean)
        if tokens is not None:
            tokens = tokens.observed(remembered.last, spent)
        return Advance(latents, scheduler, tokens, (*self.spent, spent), remembered)

    def take(self, advance: Advance) -> None:
        """Makes it what a step has made of it."""
        self.latents, self.scheduler, self.tokens = advance.latents, advance.scheduler, advance.tokens
        self.spent, self.remembered = advance.spent, advance.remembered

    def take_up(self, checkpoint: Path) -> tuple[str, ...]:
        """Goes on from a checkpoint where there is one, and says what the caller may want to know."""
        if not checkpoint.exists():
            return ()
        try:
            progress = resume.read(checkpoint, self.digest, self.latents, self.scheduler)
            if self._remembers and not progress.remembered:
                raise resume.NoCheckpoint("it remembers no prediction")
        except resume.NoCheckpoint as reason:
            log.warning("%s cannot be gone on from, all steps begin anew: %s", checkpoint, reason)
            return ("checkpoint: it cannot be gone on from, all steps began anew",)
        self._go_on(progress)
        now = self.surroundings
        changed = [name for name, value in progress.surroundings.items() if now.get(name) != value]
        if not changed:
            return ()
        return (
            f"checkpoint: {self.step} steps were done with another {' and other '.join(changed)}, so the result is not "
            "equal to the bit to that of one run",
        )
