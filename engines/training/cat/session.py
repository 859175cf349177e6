"""`cinecat train-cat` from end to end: check everything, run the teacher, distil, write the adapter."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from cinecat.engines.checkpoint import Checkpoint, find_checkpoint, read_json
from cinecat.engines.errors import SettingError
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.model import WanModel, find_device, find_dtype, load_model, load_transformer
from cinecat.engines.slots import Factors
from cinecat.engines.training.cat.adapter import CatRecord, write_adapter
from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.traces import Trace, draw_specs, make_traces, trace_of
from cinecat.engines.training.cat.trainer import train_cat
from cinecat.engines.training.cat.two_paths import TwoPaths, misfit
from cinecat.engines.training.progress import Journal, training_bar
from cinecat.engines.training.vae import use_faster_layers
from cinecat.plugins.lora import load_lora
from cinecat.plugins.registry import BUNDLED, Style, StyleRegistry


@dataclass(frozen=True)
class CatTraining:
    """What is asked for.

    Attributes:
        model: as in `find_checkpoint`.
        out: folder of the adapter; it must not exist.
        work: courses, checkpoints and curves; a stopped training goes on from here.
        styles_dirs: folders of further styles that courses wear, beside the bundled ones.
        styles: names of those that they wear; None for all that are for the model, empty for none.
        device: "auto", "cpu" or "cuda"; of the transformer. Films are encoded on the CPU.
        dtype: "auto", "float32" or "bfloat16".
        max_seconds: of the optimiser's steps; the courses before and the measurements between come on top.
    """

    model: str
    out: Path
    work: Path
    recipe: CatRecipe
    styles_dirs: tuple[Path, ...] = ()
    styles: tuple[str, ...] | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_seconds: float = math.inf


def run_training(asked: CatTraining, say: Callable[[str], None]) -> Path:
    """Trains an adapter and writes its folder.

    Args:
        say: hears what a person should know before and after.

    Raises:
        EngineError, StyleError: what was asked for cannot be done, or no step of the training helped; nothing was
            written.
        FileExistsError: the adapter's folder is there already.
    """
    started = time.monotonic()
    if asked.out.exists():
        raise FileExistsError(f"out: {asked.out} exists; name another folder, or move it away")
    checkpoint = find_checkpoint(asked.model)
    _check_recipe(asked.recipe, checkpoint)
    device = find_device(asked.device)
    dtype = find_dtype(asked.dtype, device)
    transformer = load_transformer(checkpoint, str(device), str(dtype).partition(".")[2])
    worn, styles = _styles(asked, checkpoint, transformer)

    identity = f"{checkpoint.fingerprint} {dtype}"
    drawn = draw_specs(asked.recipe, tuple(styles))
    train, held_out = ([trace_of(spec, identity, asked.work / "courses") for spec in specs] for specs in drawn)
    key = repr((asked.recipe, identity, [trace.path.name for trace in (*train, *held_out)]))
    journal = Journal(asked.work, f"cat-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    say(
        f"{len(train)} courses to train on, {len(held_out)} held out; "
        f"styles: {', '.join(style.manifest.name for style in worn) or 'none'}"
    )
    if journal.checkpoint.exists():
        say(f"going on from {journal.checkpoint}")
    paths = TwoPaths(transformer, asked.recipe, styles)
    _make_courses([*train, *held_out], checkpoint, paths)
    cat = train_cat(paths, transformer, train, held_out, asked.recipe, journal, asked.max_seconds)
    if cat.after.loss >= 1.0:
        raise SettingError(
            f"learning_rate: {asked.recipe.learning_rate:g} never came below the error without the adapter; lower it, "
            "or train longer"
        )
    record = CatRecord(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        layers=len(transformer.blocks),
        recipe=asked.recipe,
        styles={style.fingerprint: f"{style.manifest.name} {style.manifest.version}" for style in worn},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        dtype=str(dtype).partition(".")[2],
        threads=torch.get_num_threads(),
        seconds=time.monotonic() - started,
    )
    write_adapter(asked.out, cat, record, journal.curve)
    say(f"error with the adapter: {cat.after.loss:.3f} of that without")
    return asked.out


def _make_courses(traces: Sequence[Trace], checkpoint: Checkpoint, paths: TwoPaths) -> None:
    if all(trace.path.exists() for trace in traces):
        return
    model: WanModel = load_model(checkpoint, "cpu", "float32")
    use_faster_layers(model.vae)
    with training_bar("courses", 0, len(traces)) as move:
        make_traces(traces, model, paths, lambda done: move(done, ""))


def _styles(
    asked: CatTraining, checkpoint: Checkpoint, transformer: WanTransformer3DModel
) -> tuple[list[Style], dict[str, Factors]]:
    """The styles that courses wear, and their factors by fingerprint.

    Raises:
        StyleError: there is none of a name.
        SettingError: one that was asked for does not fit the model.
    """
    registry = StyleRegistry([*asked.styles_dirs, BUNDLED])
    if asked.styles is not None:
        found = [registry.find(name) for name in asked.styles]
    else:
        newest: dict[str, Style] = {}
        for style in registry.styles():
            if style.manifest.base_model == checkpoint.family:
                newest.setdefault(style.manifest.name, style)
        found = list(newest.values())
    worn: list[Style] = []
    factors: dict[str, Factors] = {}
    for style in found:
        loaded = load_lora(style.weights_path, style.fingerprint)
        problem = misfit(transformer, loaded)
        if problem and asked.styles is not None:
            raise SettingError(
                f"styles: {style.manifest.name!r} does not fit {checkpoint.name}: {problem}; leave it out"
            )
        if not problem:
            worn.append(style)
            factors[style.fingerprint] = loaded
    return worn, factors


def _check_recipe(recipe: CatRecipe, checkpoint: Checkpoint) -> None:
    """Raises SettingError for what the model cannot take."""
    transformer = read_json(checkpoint.folder / "transformer" / "config.json")
    vae = read_json(checkpoint.folder / "vae" / "config.json")
    multiple = int(vae.get("scale_factor_spatial") or 8) * int(transformer["patch_size"][1])
    for size in recipe.sizes:
        if min(size) < multiple or any(side % multiple for side in size):
            raise SettingError(f"sizes: {size[0]}x{size[1]} is not made of multiples of {multiple}, such as 128x128")
    if recipe.films < 1 or recipe.held_out < 1:
        raise SettingError(f"films: {recipe.films} to train on and {recipe.held_out} held out; both must be 1 or more")
    if recipe.solver_steps[0] < 2 or recipe.solver_steps[0] > recipe.solver_steps[1]:
        raise SettingError(
            f"solver_steps: {recipe.solver_steps[0]} to {recipe.solver_steps[1]} is not 2 or more, rising"
        )
    if recipe.frames < 5 or (recipe.frames - 1) % VAE_TEMPORAL_STRIDE:
        raise SettingError(f"frames: {recipe.frames} is not 4k + 1 and at least 5, such as 17")
