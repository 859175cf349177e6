"""A trained style as a plugin folder: style.toml, the LoRA, a preview, and the card of its training."""

from __future__ import annotations

import io
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from numpy.typing import NDArray
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from cinecat.engines.checkpoint import Checkpoint, read_json
from cinecat.engines.training.curves import draw_curves
from cinecat.engines.training.styles.clips import ClipShape
from cinecat.engines.training.styles.recipe import StyleRecipe
from cinecat.engines.training.styles.trainer import LPIPS, VALIDATION_LOSS, TrainedStyle
from cinecat.plugins.fingerprint import fingerprint
from cinecat.plugins.manifest import MANIFEST_NAME, MAX_PREVIEW_BYTES, StyleManifest, make_manifest, write_manifest

PREVIEW_NAME = "preview.webp"
CURVE_NAME = "training.csv"

_CURVES = (("loss", "validation_loss"), ("schedule",))
_PREVIEW_SIDES = (480, 320, 240, 160, 96)
"""Longest sides of the preview in pixels, tried until its file is small enough."""

_CRITERIA = {
    VALIDATION_LOSS: "The validation loss is the mean squared error of the velocity on the held-out clips, at fixed "
    "noise levels with fixed noise; it decides which weights are kept, and when the training stops.",
    LPIPS: "LPIPS decides which weights are kept, and when the training stops: between each held-out clip and what the "
    "model makes of it in one step from the middle of its noise schedule, with fixed noise, both decoded by the VAE. "
    "The validation loss is the mean squared error of the velocity on the same clips, at fixed noise levels.",
}

Renderer = Callable[[Path], NDArray[np.uint8]]
"""Makes a clip [frames, height, width, 3] that wears the LoRA in a file."""


@dataclass(frozen=True)
class TrainingRecord:
    """What the card tells besides the result.

    Attributes:
        used, held_out: names of the clips that were trained on, and measured on.
        left_out: sentences on those that were not.
        device: e.g. "cpu" or "NVIDIA H200".
        dtype: of the transformer.
        processes: that trained together.
        seconds: of encoding and training.
        memory: its estimate, in one line.
        lpips_weights: the file and its checksum; empty where the validation loss was the criterion.
        start: the LoRA that was trained further, and its checksum; empty for a new one.
        scale: what strength 1 is of the LoRA as it was trained.
        own: how many of the clips are the model's own, and met the noise that they were made from.
    """

    model: str
    fingerprint: str
    shape: ClipShape
    recipe: StyleRecipe
    used: Sequence[str]
    held_out: Sequence[str]
    left_out: Sequence[str]
    device: str
    dtype: str
    processes: int
    seconds: float
    memory: str
    lpips_weights: str = ""
    start: str = ""
    scale: float = 1.0
    own: int = 0


def style_manifest(checkpoint: Checkpoint, name: str, texts: Mapping[str, str]) -> StyleManifest:
    """The manifest of a style for a model, as yet without checksum and preview.

    Args:
        texts: further keys of style.toml; empty ones are left out.

    Raises:
        ManifestError: a key is wrong.
    """
    transformer = read_json(checkpoint.folder / "transformer" / "config.json")
    table: dict[str, object] = {key: text for key, text in texts.items() if text}
    return make_manifest(
        {
            "title": name.replace("-", " ").capitalize() or name,
            **table,
            "name": name,
            "base_model": checkpoint.family,
            "weights": f"{name}.safetensors",
            "base_dims": {
                "dim": transformer["num_attention_heads"] * transformer["attention_head_dim"],
                "ffn_dim": transformer["ffn_dim"],
                "layers": transformer["num_layers"],
            },
        }
    )


def write_plugin(
    folder: Path,
    manifest: StyleManifest,
    style: TrainedStyle,
    record: TrainingRecord,
    layers: int,
    curve: Path,
    render: Renderer | None = None,
) -> list[str]:
    """Writes the folder of a finished style, at once or not at all.

    Args:
        layers: blocks of the transformer.
        curve: CSV of the training.
        render: makes the preview; None leaves it out.

    Returns:
        Sentences on what could not be made.

    Raises:
        FileExistsError: the folder is there already.
        OSError: it cannot be written.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give another --name or --out, or move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        weights = staging / manifest.weights
        worn = replace(record.recipe, alpha=record.recipe.alpha * record.scale)
        save_lora(weights, style.factors, worn.lora_config(layers))
        notes = [] if render is None else _add_preview(staging / PREVIEW_NAME, render, weights, record.shape.fps)
        shutil.copy(curve, staging / CURVE_NAME)
        picture = (staging / CURVE_NAME).with_suffix(".png")
        panels = (*_CURVES, ("lpips",)) if style.criterion == LPIPS else _CURVES
        draw_curves(manifest.name, staging / CURVE_NAME, panels, picture)
        sha256 = fingerprint(weights)
        preview = PREVIEW_NAME if (staging / PREVIEW_NAME).exists() else ""
        table = {**asdict(manifest), "sha256": sha256, "preview": preview}
        (staging / MANIFEST_NAME).write_text(write_manifest(make_manifest(table)), encoding="utf-8")
        (staging / "README.md").write_text(training_card(manifest, style, record), encoding="utf-8")
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return notes


def save_lora(path: Path, factors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Writes a LoRA in diffusers' layout, with peft's configuration, which scales it, in the header.

    Args:
        factors: peft's tensors by key, as `TrainedStyle` has them.
    """
    WanImageToVideoPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=dict(factors),
        weight_name=path.name,
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    # safetensors makes files that their owner alone can read, and a server often runs as somebody else.
    path.chmod(0o644)


def encode_preview(frames: NDArray[np.uint8], fps: float, limit: int = MAX_PREVIEW_BYTES) -> bytes:
    """An animated WebP of at most `limit` bytes, of frames [frames, height, width, 3]; smaller where it must be.

    Raises:
        ValueError: it is too large at any size.
    """
    height, width = frames.shape[1:3]
    for side in _PREVIEW_SIDES:
        scale = min(1.0, side / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        pictures = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]
        file = io.BytesIO()
        pictures[0].save(
            file,
            "WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=max(1, round(1000 / fps)),
            loop=0,
            quality=80,
        )
        if file.tell() <= limit:
            return file.getvalue()
    raise ValueError(f"{len(frames)} frames take more than {limit} bytes as WebP at any size")


def training_card(manifest: StyleManifest, style: TrainedStyle, record: TrainingRecord) -> str:
    """README.md of a style: what it was trained on, how, and what came of it."""
    own = {"lpips_weights": record.lpips_weights, "start": record.start, "scale": record.scale}
    settings = {**asdict(record.recipe), **asdict(record.shape), **own}
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "accelerate"))
    change = (style.loss / style.first_loss - 1) * 100
    lines = [
        f"# {manifest.title}",
        "",
        f"`{manifest.name}` {manifest.version}, a style for {manifest.base_model}, trained by `cinecat train-style` on "
        f"{record.model} ({record.fingerprint}).",
        "",
        "## Result",
        "",
        "| | |",
        "|---|---|",
        f"| {style.criterion} before | {style.first_loss:.5f} |",
        f"| {style.criterion} of these weights | {style.loss:.5f} ({change:+.1f}%) |",
        f"| reached at step | {style.best_step} of {style.steps} done, {record.recipe.steps} at most |",
        f"| time | {style.seconds:.0f} s in steps, {record.seconds:.0f} s in the last run |",
        f"| machine | {_machine(record)} |",
        f"| {record.memory.partition(': ')[0]} | {record.memory.partition(': ')[2]} (estimated) |",
        f"| with | {libraries} |",
        "",
        _CRITERIA[style.criterion],
        "",
        "![curves](training.png)",
        "",
        "## Settings",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in settings.items()),
        "",
        "## Clips",
        "",
        f"Trained on {len(record.used)}: {', '.join(record.used)}.",
        "",
        f"Held out {len(record.held_out)}: {', '.join(record.held_out)}.",
        *(["", f"The model's own, with the noise that made them: {record.own}."] if record.own else []),
        *(["", "Left out:", "", *(f"- {sentence}" for sentence in record.left_out)] if record.left_out else []),
    ]
    return "\n".join([*lines, ""])


def _add_preview(path: Path, render: Renderer, weights: Path, fps: float) -> list[str]:
    """A style without a preview is still a style."""
    try:
        path.write_bytes(encode_preview(render(weights), fps))
    except (MemoryError, torch.OutOfMemoryError):
        return ["preview: left out, the whole model does not fit into memory"]
    except ValueError as error:
        return [f"preview: left out, {error}"]
    return []


def _machine(record: TrainingRecord) -> str:
    several = f"{record.processes} processes, " if record.processes > 1 else ""
    return f"{several}{record.device}, {record.dtype}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|") or "none"
