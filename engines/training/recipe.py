"""All of wan-tiny's training, from a seed to a checkpoint folder: VAE, latents, transformer in stages."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import WanModel, load_model
from cinecat.engines.tiny import WAN_TINY, TinyConfig, build_tiny
from cinecat.engines.training.curves import draw_curves
from cinecat.engines.training.dit import DitRecipe, Lessons, train_dit
from cinecat.engines.training.film import HELD_OUT, make_clip
from cinecat.engines.training.latents import LatentSet, encode_films, lessons
from cinecat.engines.training.progress import Journal, training_bar
from cinecat.engines.training.vae import VaeRecipe, encode, latent_statistics, to_video, train_vae, use_faster_layers

_PROBE_SEEDS = HELD_OUT + 500_000
_STATISTICS_SEEDS = HELD_OUT - 1000
_PART = 100
_VAE_PANELS = (("loss",), ("held_out_psnr", "held_out_first_frame_psnr", "held_out_image_psnr"))
_DIT_PANELS = (("loss", "held_out_loss"),)


@dataclass(frozen=True)
class Films:
    """Films of one size that a stage trains on.

    Attributes:
        side: frame size that the films are made for.
        crop: side of the window that is trained on; `side` for the whole frame.
        first_seed, count: of their first frames.
        courses: what happens behind each of their first frames, at most.
        batch: films of a step.
        share: of the stage's steps that have them; the stage's first films have what the others leave.
    """

    side: int
    crop: int
    first_seed: int
    count: int
    batch: int
    courses: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A part of the transformer's training.

    Attributes:
        probes: held-out films for the loss, of the size of the first films.
        blend: how far the weights go from where the stage began to where it ended, 0 to 1. In between, a model is
            better at the new size and keeps what it had at the old one (arXiv 2109.01903).
    """

    name: str
    recipe: DitRecipe
    films: tuple[Films, ...]
    frames: int = 17
    probes: int = 32
    blend: float = 1.0


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides what comes out; by default what the bundled weights had."""

    vae: VaeRecipe = field(default_factory=lambda: VaeRecipe(steps=1000))
    stages: tuple[Stage, ...] = (
        Stage("dit-64", DitRecipe(steps=450), (Films(128, 64, 0, 1100, batch=32),)),
        Stage(
            "dit-128",
            DitRecipe(steps=1000, muon_rate=0.01, adam_rate=6e-4),
            (Films(128, 128, 100_000, 400, batch=8),),
        ),
        Stage(
            "dit-128-courses",
            DitRecipe(steps=2200, muon_rate=0.01, adam_rate=6e-4),
            (Films(128, 128, 300_000, 600, batch=8, courses=3),),
        ),
        Stage(
            "dit-256",
            DitRecipe(steps=80, muon_rate=0.004, adam_rate=3e-4),
            (Films(256, 256, 200_000, 24, batch=2, courses=3),),
            probes=8,
            blend=0.3,
        ),
        Stage(
            "dit-both",
            DitRecipe(steps=4981, muon_rate=0.01, adam_rate=6e-4, average=0.998, motion_weight=4.0, seed=41),
            (
                Films(128, 128, 400_000, 5500, batch=16, courses=3),
                Films(256, 256, 600_000, 100, batch=4, courses=3, share=0.15),
            ),
            probes=100,
        ),
    )
    model: TinyConfig = WAN_TINY

    def scaled(self, factor: float) -> TrainingPlan:
        """The same plan with so many times the steps and films."""
        return replace(
            self,
            vae=replace(self.vae, steps=_times(self.vae.steps, factor)),
            stages=tuple(
                replace(
                    stage,
                    films=tuple(
                        replace(films, count=_times(films.count, factor, at_least=films.batch)) for films in stage.films
                    ),
                    recipe=replace(stage.recipe, steps=_times(stage.recipe.steps, factor)),
                )
                for stage in self.stages
            ),
        )


def _times(count: int, factor: float, at_least: int = 1) -> int:
    return max(at_least, round(count * factor))


def train_tiny(
    folder: Path, work: Path, plan: TrainingPlan, save_seconds: float = 120.0, compiled: bool = False
) -> None:
    """Trains and writes the checkpoint folder; a run that was stopped goes on where `work` says it was.

    Args:
        folder: where the checkpoint goes; it must not exist.
        work: checkpoints, curves and latents of the run.
        compiled: compiles the transformer's blocks.

    Raises:
        FileExistsError: `folder` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder or move it away")
    draft = work / "model"
    if not draft.exists():
        build_tiny(draft, plan.model)
    if not (work / "vae.done").exists():
        _train_vae(draft, work, plan, save_seconds)
    model = load_model(find_checkpoint(str(draft)), "cpu", "float32")
    use_faster_layers(model.vae)
    for number, stage in enumerate(plan.stages):
        taught = [Lessons(encoded(model, films, stage.frames, work), films.batch, films.share) for films in stage.films]
        probes = replace(stage.films[0], first_seed=_PROBE_SEEDS, count=stage.probes, courses=1)
        held_out = encoded(model, probes, stage.frames, work)
        journal = Journal(work, stage.name)
        before = copy.deepcopy(model.transformer.state_dict())
        train_dit(model.transformer, taught, held_out, stage.recipe, journal, save_seconds, number == 0, compiled)
        _blend(model.transformer, before, stage.blend)
    write_checkpoint(draft, model.transformer, folder, plan, work)


@torch.no_grad()
def _blend(transformer: WanTransformer3DModel, before: dict[str, Tensor], share: float) -> None:
    for name, weight in transformer.state_dict().items():
        weight.copy_(torch.lerp(before[name], weight, share))


def _train_vae(draft: Path, work: Path, plan: TrainingPlan, save_seconds: float) -> None:
    vae = AutoencoderKLWan.from_pretrained(draft / "vae")
    train_vae(vae, plan.vae, Journal(work, "vae"), save_seconds)
    finish_vae(vae, draft / "vae", plan.vae.side)
    (work / "vae.done").touch()


@torch.no_grad()
def finish_vae(vae: AutoencoderKLWan, folder: Path, side: int, clips: int = 48) -> None:
    """Measures the latents' statistics, which its config then holds, and saves the VAE."""
    latents: list[Tensor] = [
        encode(vae, to_video(make_clip(seed, 17, side, side).frames)[None])
        for seed in range(_STATISTICS_SEEDS, _STATISTICS_SEEDS + clips)
    ]
    mean, std = latent_statistics(torch.cat(latents))
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder, safe_serialization=True)


def encoded(model: WanModel, films: Films, frames: int, work: Path) -> LatentSet:
    """Films in latents, computed in parts that are kept in `work` for every stage that has them."""
    parts = []
    with training_bar(f"latents {films.crop}", 0, films.count) as move:
        for done in range(0, films.count, _PART):
            seeds = range(films.first_seed + done, films.first_seed + min(done + _PART, films.count))
            path = work / f"films-{films.crop}-{films.courses}-{seeds.start}-{len(seeds)}.latents"
            if not path.exists():
                encode_films(
                    model,
                    lambda seed: lessons(seed, frames, films.side, films.crop, films.courses),
                    seeds,
                    lambda some, done=done: move(done + some, ""),  # type: ignore[misc]
                ).save(path)
            parts.append(LatentSet.load(path))
            move(done + len(seeds), "")
    return joined(parts)


def joined(parts: list[LatentSet]) -> LatentSet:
    """One set of several from one model."""
    shared = {"empty_text": parts[0].empty_text, "empty_count": parts[0].empty_count}
    per_film = [f.name for f in fields(LatentSet) if f.name not in shared]
    return LatentSet(**{name: torch.cat([getattr(part, name) for part in parts]) for name in per_film}, **shared)


def write_checkpoint(
    draft: Path, transformer: WanTransformer3DModel, folder: Path, plan: TrainingPlan, work: Path
) -> None:
    """Writes the folder at once: the draft with what was trained, in half precision, and the curves of the training."""
    staging = folder.with_name(f".{folder.name}-staging")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(draft, staging)
    vae = AutoencoderKLWan.from_pretrained(draft / "vae")
    for part, module in (("transformer", transformer), ("vae", vae)):
        shutil.rmtree(staging / part)
        half = copy.deepcopy(module).half()
        half.register_to_config(_name_or_path="")  # else the folder of the draft
        half.save_pretrained(staging / part, safe_serialization=True)
    about = json.loads((staging / "cinecat.json").read_text())
    about["training"] = asdict(plan) | {"model": None}
    (staging / "cinecat.json").write_text(json.dumps(about, indent=2))
    curves = staging / "training"
    curves.mkdir()
    for name, panels in (("vae", _VAE_PANELS), *((stage.name, _DIT_PANELS) for stage in plan.stages)):
        shutil.copy(Journal(work, name).curve, curves)
        draw_curves(name, curves / f"{name}.csv", panels, curves / f"{name}.png")
    staging.rename(folder)
