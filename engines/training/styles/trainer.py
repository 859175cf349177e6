"""The training of a style: flow matching on a few encoded clips, through a LoRA of peft's, on accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional

from cinecat.engines.stages import starting_noise
from cinecat.engines.training.dit import shifted
from cinecat.engines.training.loop import schedule
from cinecat.engines.training.progress import Journal, Pulse, training_bar
from cinecat.engines.training.styles.encoded import EncodedClip
from cinecat.engines.training.styles.recipe import StyleRecipe

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A [rank, in] and B [out, rank] of a LoRA by module path, its scaling in B."""

VALIDATION_LOSS, LPIPS = "validation loss", "LPIPS"
"""What may decide which weights are kept."""

_LEVELS = 8
"""Noise levels that the validation loss is the mean of, for each held-out clip."""

# Whole tensors on the first process's CPU, and none of the base model's.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_WHOLE_TO_LOAD = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


@dataclass
class _Progress:
    """What is saved beside the weights and the optimiser's state.

    Attributes:
        step, seconds: done so far.
        running: the training loss, averaged exponentially; NaN before the first step.
        first_loss: what the criterion was before the training.
        best_loss, best_step, best: of the weights that are kept.
        stale: measurements since the best.
    """

    step: int = 0
    seconds: float = 0.0
    running: float = math.nan
    first_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0


@dataclass(frozen=True)
class TrainedStyle:
    """The best weights of a run by its criterion.

    Attributes:
        factors: peft's tensors by key, e.g. "blocks.0.attn2.to_q.lora_A.weight", float32 on the CPU; where the model is
            sharded, only the main process has them.
        loss: the criterion of those weights, on the held-out clips; `first_loss` before the training.
        steps: done in all; the best were reached at `best_step`.
        seconds: spent in them, on all runs together.
        criterion: VALIDATION_LOSS or LPIPS; lower is better.
    """

    factors: dict[str, Tensor]
    loss: float
    first_loss: float
    best_step: int
    steps: int
    seconds: float
    criterion: str = VALIDATION_LOSS


def train_style(
    transformer: WanTransformer3DModel,
    train: Sequence[EncodedClip],
    held_out: Sequence[EncodedClip],
    recipe: StyleRecipe,
    shift: float,
    journal: Journal,
    save_seconds: float = 60.0,
    cpu: bool = False,
    lpips: Callable[[Sequence[Tensor]], float] | None = None,
    start: Factors | None = None,
) -> TrainedStyle:
    """Trains a LoRA on the transformer, which gets peft's layers; a run that was stopped goes on from its journal.

    Every sample is drawn from the number of its step, so that a resumed run sees what an uninterrupted one would have.
    Under `accelerate launch` each process takes its own samples, and the model is wrapped or sharded as it says.

    Args:
        transformer: frozen, in the dtype that it is to be held in; the LoRA is float32.
        shift: time shift of the noise levels, as the scheduler's.
        save_seconds: between checkpoints.
        cpu: leaves a GPU alone.
        lpips: of clean latents [16, T, H, W] that the model predicts of the held-out clips, in their order; None leaves
            the decision to the validation loss.
        start: of a style that is trained further, as `check_start` takes it; None begins without effect.
    """
    dtype = transformer.patch_embedding.weight.dtype
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.accumulation, mixed_precision=mixed_precision(dtype, cpu), cpu=cpu
    )
    parameters = add_lora(transformer, recipe, start)
    if recipe.checkpoint_activations:
        transformer.enable_gradient_checkpointing()
    optimiser: Any = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    model, optimiser = accelerator.prepare(transformer, optimiser)
    main = accelerator.is_main_process
    progress = _restored(model, optimiser, journal)
    if main:
        journal.rewind(progress.step if progress.best else -1)
    sampler = _Sampler(train, recipe, shift, accelerator.device, dtype)
    probe = _Sampler(held_out, recipe, shift, accelerator.device, dtype)

    def agreed(value: float) -> float:
        """The mean over the processes, which must all take the same turns."""
        if accelerator.num_processes == 1:
            return value
        mean: Any = accelerator.reduce(torch.tensor(value, dtype=torch.float32, device=accelerator.device), "mean")
        return float(mean)

    criterion = VALIDATION_LOSS if lpips is None else LPIPS

    def measure() -> dict[str, float]:
        measured = {VALIDATION_LOSS: agreed(probe.validation_loss(model))}
        if lpips is not None:
            measured[LPIPS] = agreed(lpips(probe.predictions(model)))
        loss = measured[criterion]
        if loss < progress.best_loss:
            weights: dict[str, Any] = get_state_dict(model, (), options=_WHOLE)[0]
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            progress.best = {name: tensor.clone() for name, tensor in weights.items()}
        else:
            progress.stale += 1
        return measured

    def save() -> None:
        weights, moments = get_state_dict(model, optimiser.optimizer, options=_WHOLE)
        if main:
            journal.save({"weights": weights, "moments": moments, **vars(progress)})

    if progress.step == 0:
        measured = measure()
        progress.first_loss = measured[criterion]
        if main:
            journal.log(_row(progress, 0.0, measured))
    pulse = Pulse(save_seconds)
    with training_bar("style", progress.step, recipe.steps) if main else nullcontext(_unseen) as move:
        while progress.step < recipe.steps and progress.stale < recipe.patience:
            started = time.monotonic()
            factor = schedule(progress.step, recipe.steps, max(1, round(recipe.warmup * recipe.steps)))
            for group in optimiser.param_groups:
                group["lr"] = factor * recipe.learning_rate
            losses = []
            for part in range(recipe.accumulation):
                number = progress.step * recipe.accumulation + part
                with accelerator.accumulate(model):
                    loss = sampler.loss(model, number * accelerator.num_processes + accelerator.process_index)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimiser.step()
                    optimiser.zero_grad()
                losses.append(float(loss.detach()))
            progress.step += 1
            progress.seconds += time.monotonic() - started
            mean = sum(losses) / len(losses)
            progress.running = mean if math.isnan(progress.running) else 0.9 * progress.running + 0.1 * mean
            if progress.step % recipe.evaluate_every == 0 or progress.step == recipe.steps:
                measured = measure()
                if main:
                    journal.log(_row(progress, factor, measured))
            move(progress.step, f"loss {progress.running:.4f}, best {criterion} {progress.best_loss:.4f}")
            if agreed(pulse.due()) > 0:
                save()
    save()
    whole = accelerator.unwrap_model(model)
    factors = get_peft_model_state_dict(whole, state_dict=progress.best)
    return TrainedStyle(
        factors={name: tensor.detach().float().cpu().contiguous() for name, tensor in factors.items()},
        loss=progress.best_loss,
        first_loss=progress.first_loss,
        best_step=progress.best_step,
        steps=progress.step,
        seconds=progress.seconds,
        criterion=criterion,
    )


def add_lora(
    transformer: WanTransformer3DModel, recipe: StyleRecipe, start: Factors | None = None
) -> list[torch.nn.Parameter]:
    """Gives a transformer the recipe's LoRA, which begins as `start` or without effect, and freezes all else.

    Returns:
        Its parameters, float32 whatever the transformer has: small updates would be lost in bfloat16.
    """
    torch.manual_seed(recipe.seed)  # of A's initialisation
    transformer.requires_grad_(False)
    transformer.add_adapter(recipe.lora_config(transformer.config.num_layers))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    for module, (a, b) in (start or {}).items():
        layer: Any = transformer.get_submodule(module)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b * (recipe.rank / recipe.alpha))
    return parameters


def mixed_precision(dtype: torch.dtype, cpu: bool) -> str:
    """accelerate's word for what the LoRA is computed in: bfloat16 where model and device have it."""
    has_bfloat16 = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16" if dtype is torch.bfloat16 and has_bfloat16 else "no"


class _Sampler:
    """Losses on a set of clips, each drawn from a number."""

    def __init__(
        self, clips: Sequence[EncodedClip], recipe: StyleRecipe, shift: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._clips = clips
        self._seed = recipe.seed
        self._shift = shift
        self._device = device
        self._dtype = dtype

    def loss(self, model: Any, number: int) -> Tensor:
        """Of the sample of that number; each round is another order of all clips."""
        count = len(self._clips)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + number // count))
        draw = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        level = float(shifted(torch.rand((), generator=draw), self._shift))
        return self._at(model, self._clips[int(order[number % count])], level, draw)

    @torch.no_grad()
    def validation_loss(self, model: Any) -> float:
        """The mean over all clips at fixed noise levels with fixed noise."""
        levels = shifted((torch.arange(_LEVELS) + 0.5) / _LEVELS, self._shift)
        losses = [
            float(self._at(model, clip, float(level), torch.Generator().manual_seed(1000 * index + place)))
            for index, clip in enumerate(self._clips)
            for place, level in enumerate(levels)
        ]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def predictions(self, model: Any) -> list[Tensor]:
        """What the model makes of each clip in one step, with fixed noise: clean latents [16, T, H, W].

        Half of a request's steps lie on either side of the noise level, which is 0.75 at a shift of 3. Much below it
        the noisy clip itself shows the look, whatever the model has learnt; much above it the prediction is the blur of
        all that could be.
        """
        level = float(shifted(torch.tensor(0.5), self._shift))
        predicted = []
        for index, clip in enumerate(self._clips):
            draw = torch.Generator().manual_seed(1000 * index + _LEVELS)
            noise = _noise(clip, draw)
            noisy = (1 - level) * clip.clean + level * noise
            predicted.append(noisy - level * self._velocity(model, clip, noisy, level).cpu())
        return predicted

    def _at(self, model: Any, clip: EncodedClip, level: float, draw: torch.Generator) -> Tensor:
        """Mean squared error of the velocity noise - clean at a noise level.

        The model's own clips meet the noise that they were made from: the style then learns to lead from each noise
        where the model leads, in its look, rather than to the mean of all that could be (rectified flow, arXiv
        2209.03003, with the plain model's coupling).
        """
        noise = _noise(clip, draw)
        noisy = (1 - level) * clip.clean + level * noise
        target = (noise - clip.clean).to(self._device)
        return functional.mse_loss(self._velocity(model, clip, noisy, level), target)

    def _velocity(self, model: Any, clip: EncodedClip, noisy: Tensor, level: float) -> Tensor:
        """What the model predicts of a clip's latents [16, T, H, W] at a noise level, float32."""
        velocity: Tensor = model(
            torch.cat([noisy, clip.condition])[None].to(self._device, self._dtype),
            torch.tensor([level * 1000.0], device=self._device),
            clip.context[None].to(self._device, self._dtype),
            clip.image[None].to(self._device, self._dtype),
            return_dict=False,
        )[0][0]
        return velocity.float()


def _noise(clip: EncodedClip, draw: torch.Generator) -> Tensor:
    """What a clip is mixed with: the noise that a request of its seed begins with, or else any."""
    if clip.seed is None:
        return torch.randn(clip.clean.shape, generator=draw)
    return starting_noise(clip.seed, (1, *clip.clean.shape), torch.device("cpu"))[0]


def _restored(model: Any, optimiser: Any, journal: Journal) -> _Progress:
    state = journal.load()
    if state is None:
        return _Progress()
    weights, moments = state.pop("weights"), state.pop("moments")
    set_state_dict(
        model, optimiser.optimizer, model_state_dict=weights, optim_state_dict=moments, options=_WHOLE_TO_LOAD
    )
    return _Progress(**state)


def _row(progress: _Progress, factor: float, measured: Mapping[str, float]) -> dict[str, float | int | str]:
    return {
        "step": progress.step,
        "seconds": round(progress.seconds, 1),
        "schedule": round(factor, 4),
        "loss": "" if math.isnan(progress.running) else round(progress.running, 5),
        **{name.lower().replace(" ", "_"): round(value, 5) for name, value in measured.items()},
    }


def _unseen(step: int, note: str) -> None:
    """The progress bar of a process that prints nothing."""
