"""`cinecat train-style` from end to end: check everything, encode, train, write the plugin."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from cinecat.engines.checkpoint import Checkpoint, find_checkpoint, read_json
from cinecat.engines.core import EngineCore
from cinecat.engines.errors import SettingError
from cinecat.engines.memory import available_bytes
from cinecat.engines.messages import CoreConfig, StyleUse
from cinecat.engines.model import (
    WanEncoders,
    find_device,
    find_dtype,
    load_encoders,
    load_transformer,
    load_vae_decoder,
    schedule_shift,
)
from cinecat.engines.quality.lpips import Lpips, load_lpips
from cinecat.engines.training.evaluation import Frames, Sampling, generate
from cinecat.engines.training.progress import Journal, training_bar
from cinecat.engines.training.styles.clips import CaptionedClip, ClipShape, find_clips, first_frame
from cinecat.engines.training.styles.encoded import EncodedClip, cached_path, encode_clips
from cinecat.engines.training.styles.held_out_lpips import LEAST_SIDE, HeldOutLpips
from cinecat.engines.training.styles.memory import TrainingMemory, check_memory, estimate_memory
from cinecat.engines.training.styles.plugin import TrainingRecord, style_manifest, write_plugin
from cinecat.engines.training.styles.recipe import TARGETS, StyleRecipe
from cinecat.engines.training.styles.sizes import check_shape, defaults
from cinecat.engines.training.styles.trainer import TrainedStyle, train_style
from cinecat.plugins.fingerprint import fingerprint
from cinecat.plugins.lora import inspect_lora, load_lora
from cinecat.plugins.manifest import PROMPT, StyleManifest

_LEAST_CLIPS = 2
_PREVIEW_STEPS = 20
# The first process encodes while the others wait for it.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class StyleTraining:
    """What is asked for.

    Attributes:
        clips: folder of captioned videos.
        name: of the style.
        model: as in `find_checkpoint`.
        out: folder that the style's own folder is made in.
        work: checkpoints, curves and encoded clips; a stopped training goes on from here.
        texts: further keys of style.toml, e.g. "title" and "version".
        width, height, frames, fps: of every clip; None leaves it to the model's family.
        learning_rate: in place of the recipe's; None leaves it to the model's family.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32" or "bfloat16".
        preview: whether the engine renders one.
        lpips_weights: a file, as `load_lpips` reads it; LPIPS is then the criterion of the training.
        save_seconds: between checkpoints.
        start: file of a LoRA that is trained further; None begins a new one.
        scale: what strength 1 of the written style is of the LoRA as it was trained.
    """

    clips: Path
    name: str
    model: str
    out: Path
    work: Path
    recipe: StyleRecipe
    texts: Mapping[str, str] = field(default_factory=dict)
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: float | None = None
    learning_rate: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    preview: bool = True
    lpips_weights: Path | None = None
    save_seconds: float = 60.0
    start: Path | None = None
    scale: float = 1.0


def run_training(asked: StyleTraining, say: Callable[[str], None]) -> Path:
    """Trains a style and writes its folder; under `accelerate launch`, together with the other processes.

    Args:
        say: hears, on the main process alone, what a person should know before and after.

    Raises:
        EngineError, StyleError, ClipError: what was asked for cannot be done, which is known before anything is
            trained, or no step of the training helped; no style was written.
        FileExistsError: the style's folder is there already.
    """
    started = time.monotonic()
    _check_choices(asked)
    checkpoint = find_checkpoint(asked.model)
    rate = defaults(checkpoint).learning_rate if asked.learning_rate is None else asked.learning_rate
    asked = replace(asked, recipe=replace(asked.recipe, learning_rate=rate))
    state = PartialState(cpu=find_device(asked.device).type == "cpu", timeout=_PATIENCE)
    say = say if state.is_main_process else _unheard
    ready = _prepare(asked, checkpoint, state, say)
    style, journal = _train(asked, ready, state, say)
    if style.best_step == 0:
        before = "of the style that it began with" if asked.start else "without the style"
        raise SettingError(
            f"learning_rate: {asked.recipe.learning_rate:g} never came below the {style.criterion} {before} "
            f"({style.first_loss:.4f}) in {style.steps} steps; lower it, or give more clips"
        )
    if state.is_main_process:
        _write(asked, ready, style, journal, state, time.monotonic() - started, say)
    return ready.folder


@dataclass(frozen=True)
class _Ready:
    """What is known before anything is loaded.

    Attributes:
        folder: that the style is written to.
        prompts: of the clips, captions as the recipe's template makes them.
        layers: blocks of the transformer.
        held_out: indices of the clips that are only measured on.
        left_out: what was wrong with clips that are not used.
    """

    checkpoint: Checkpoint
    manifest: StyleManifest
    shape: ClipShape
    folder: Path
    dtype: torch.dtype
    sharded: bool
    lpips: Lpips | None
    lpips_sum: str
    start_sum: str
    layers: int
    clips: list[CaptionedClip]
    prompts: list[str]
    held_out: list[int]
    left_out: list[str]
    memory: TrainingMemory

    @property
    def used(self) -> list[int]:
        return [index for index in range(len(self.clips)) if index not in self.held_out]


def _prepare(asked: StyleTraining, checkpoint: Checkpoint, state: PartialState, say: Callable[[str], None]) -> _Ready:
    manifest = style_manifest(checkpoint, asked.name, asked.texts)
    layers = int(read_json(checkpoint.folder / "transformer" / "config.json")["num_layers"])
    if asked.start is not None:
        asked.recipe.check_start(inspect_lora(asked.start).targets, layers)
    shape = clip_shape(asked, checkpoint)
    lpips = _load_lpips(asked.lpips_weights, shape)
    folder = asked.out / asked.name
    if folder.exists():
        raise FileExistsError(f"name: {folder} exists; give another --name or --out, or move it away")
    clips, left_out = find_clips(asked.clips, shape)
    for sentence in left_out:
        say(f"left out: {sentence}")
    if len(clips) < _LEAST_CLIPS:
        raise SettingError(
            f"clips: {asked.clips} holds {len(clips)} clips that can be trained on; at least {_LEAST_CLIPS} are "
            "needed, one of them to measure on"
        )
    dtype = find_dtype(asked.dtype, state.device)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    shards = state.num_processes if sharded else 1
    memory = estimate_memory(checkpoint, shape, asked.recipe, dtype, shards, lpips is not None)
    say(str(memory))
    sharing = state.num_processes if state.device.type == "cpu" else 1
    check_memory(memory, available_bytes(state.device), str(state.device), sharing)
    return _Ready(
        checkpoint=checkpoint,
        manifest=manifest,
        shape=shape,
        folder=folder,
        dtype=dtype,
        sharded=sharded,
        lpips=lpips,
        lpips_sum=fingerprint(asked.lpips_weights) if asked.lpips_weights else "",
        start_sum=fingerprint(asked.start) if asked.start else "",
        layers=layers,
        clips=clips,
        prompts=[_as_prompt(asked.recipe, clip.caption) for clip in clips],
        held_out=held_out(len(clips), asked.recipe),
        left_out=left_out,
        memory=memory,
    )


def _train(
    asked: StyleTraining, ready: _Ready, state: PartialState, say: Callable[[str], None]
) -> tuple[TrainedStyle, Journal]:
    """The trained style, on every process, and the journal that holds its curve."""
    checkpoint, shape, device = ready.checkpoint, ready.shape, str(state.device)
    identity = f"{checkpoint.fingerprint} {ready.dtype}"
    kept = asked.work / "clips"
    with state.main_process_first():
        encoded = _encode(ready, device, asked.dtype, identity, kept, state)
    criterion = "the validation loss" if ready.lpips is None else "LPIPS"
    say(f"{len(ready.used)} clips to train on, {len(ready.held_out)} held out; {criterion} decides when to stop")
    places = [
        cached_path(clip, prompt, shape, identity, kept).name
        for clip, prompt in zip(ready.clips, ready.prompts, strict=True)
    ]
    extras = [checksum for checksum in (ready.lpips_sum, ready.start_sum) if checksum]
    seeds = [clip.seed for clip in ready.clips]
    if any(seed is not None for seed in seeds):
        extras.append(repr(seeds))
    key = repr((asked.recipe, places, state.num_processes, *extras))
    journal = Journal(asked.work, f"{asked.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if journal.checkpoint.exists():
        say(f"going on from {journal.checkpoint}")
    judged = [encoded[index] for index in ready.held_out]
    judge = None
    if ready.lpips is not None:
        judge = HeldOutLpips(load_vae_decoder(checkpoint, device), ready.lpips, judged)
    # A model that is to be sharded is divided from the host's memory.
    place = "cpu" if ready.sharded else device
    style = train_style(
        load_transformer(checkpoint, place, str(ready.dtype).partition(".")[2]),
        [encoded[index] for index in ready.used],
        judged,
        asked.recipe,
        schedule_shift(checkpoint),
        journal,
        asked.save_seconds,
        cpu=state.device.type == "cpu",
        lpips=judge,
        start=load_lora(asked.start, ready.start_sum) if asked.start else None,
    )
    return style, journal


def _write(
    asked: StyleTraining,
    ready: _Ready,
    style: TrainedStyle,
    journal: Journal,
    state: PartialState,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    _free()
    record = TrainingRecord(
        model=ready.checkpoint.name,
        fingerprint=ready.checkpoint.fingerprint,
        shape=ready.shape,
        recipe=asked.recipe,
        used=[ready.clips[index].path.name for index in ready.used],
        held_out=[ready.clips[index].path.name for index in ready.held_out],
        left_out=ready.left_out,
        device=torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else "CPU",
        dtype=str(ready.dtype).partition(".")[2],
        processes=state.num_processes,
        seconds=seconds,
        memory=str(ready.memory),
        lpips_weights=f"{asked.lpips_weights.name} (SHA-256 {ready.lpips_sum[:12]})" if asked.lpips_weights else "",
        start=f"{asked.start.name} (SHA-256 {ready.start_sum[:12]})" if asked.start else "",
        scale=asked.scale,
        own=sum(clip.seed is not None for clip in ready.clips),
    )
    shown = ready.held_out[0]

    def render(weights: Path) -> Frames:
        clip, prompt = ready.clips[shown], ready.prompts[shown]
        return _preview(ready.checkpoint, asked, ready.shape, clip, prompt, weights, str(state.device))

    preview = render if asked.preview else None
    for note in write_plugin(ready.folder, ready.manifest, style, record, ready.layers, journal.curve, preview):
        say(note)
    say(
        f"{style.criterion} {style.first_loss:.4f} -> {style.loss:.4f} at step {style.best_step} of {style.steps}, "
        f"{style.seconds:.0f} s"
    )


def clip_shape(asked: StyleTraining, checkpoint: Checkpoint) -> ClipShape:
    """The size that is asked for, or the family's own.

    Raises:
        SettingError: the model cannot take it.
    """
    own = defaults(checkpoint).shape
    shape = ClipShape(
        own.width if asked.width is None else asked.width,
        own.height if asked.height is None else asked.height,
        own.frames if asked.frames is None else asked.frames,
        own.fps if asked.fps is None else asked.fps,
    )
    check_shape(shape, checkpoint)
    return shape


def held_out(count: int, recipe: StyleRecipe) -> list[int]:
    """Which clips are kept for the validation, at least one and not all; the same for a seed."""
    amount = min(count - 1, max(1, round(count * recipe.held_out)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return sorted(order[:amount])


def _load_lpips(path: Path | None, shape: ClipShape) -> Lpips | None:
    """Raises WeightsError for a file that does not hold the weights, SettingError for clips too small for them."""
    if path is None:
        return None
    for name, pixels in (("width", shape.width), ("height", shape.height)):
        if pixels < LEAST_SIDE:
            raise SettingError(f"{name}: {pixels} is below {LEAST_SIDE}, which lpips-weights need")
    return load_lpips(path)


def _check_choices(asked: StyleTraining) -> None:
    choices: tuple[tuple[str, str, Sequence[str]], ...] = (
        ("targets", asked.recipe.targets, tuple(TARGETS)),
        ("dtype", asked.dtype, ("auto", "float32", "bfloat16")),
        ("device", asked.device, ("auto", "cpu", "cuda")),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            hint = "; choose a GPU with CUDA_VISIBLE_DEVICES" if value.startswith("cuda:") else ""
            raise SettingError(f"{name}: {value!r} is not one of {', '.join(allowed)}{hint}")


def _as_prompt(recipe: StyleRecipe, caption: str) -> str:
    return recipe.prompt_template.replace(PROMPT, caption) if recipe.prompt_template else caption


def _encode(
    ready: _Ready, device: str, dtype: str, identity: str, folder: Path, state: PartialState
) -> list[EncodedClip]:
    def load() -> WanEncoders:
        return load_encoders(ready.checkpoint, device, dtype)

    clips, prompts, shape = ready.clips, ready.prompts, ready.shape
    if not state.is_main_process:
        return encode_clips(load, clips, prompts, shape, identity, folder)
    with training_bar("clips", 0, len(clips)) as move:
        encoded = encode_clips(load, clips, prompts, shape, identity, folder, lambda done: move(done, ""))
    _free()
    return encoded


def _preview(
    checkpoint: Checkpoint,
    asked: StyleTraining,
    shape: ClipShape,
    clip: CaptionedClip,
    prompt: str,
    weights: Path,
    device: str,
) -> Frames:
    """A clip from the first frame of a held-out one, as a request that wears the style would be served."""
    config = CoreConfig(
        model=asked.model,
        device=device,
        dtype=asked.dtype,
        threads=0,
        style_slots=1,
        max_rank=asked.recipe.rank,
        cache_bytes=0,
    )
    style = StyleUse(str(weights), fingerprint(weights), 1.0)
    core = EngineCore(checkpoint, config)
    sampling = Sampling(_PREVIEW_STEPS, defaults(checkpoint).guidance_scale, asked.recipe.seed)
    return generate(core, first_frame(clip, shape), prompt, shape.frames, sampling, (style,))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _unheard(sentence: str) -> None:
    """What processes other than the main one have to say."""
