"""A trained adapter as a folder: the LoRA, and the card of its training."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.trainer import TrainedCat, gain_db
from cinecat.engines.training.curves import draw_curves
from cinecat.engines.training.styles.plugin import save_lora
from cinecat.plugins.fingerprint import fingerprint

WEIGHTS_NAME = "cat_adapter.safetensors"
CURVE_NAME = "training.csv"


@dataclass(frozen=True)
class CatRecord:
    """What the card tells besides the result.

    Attributes:
        model, fingerprint: that it was trained on and for.
        layers: blocks of the transformer.
        styles: name and version by fingerprint, of those that courses wore.
        device: e.g. "CPU" or "NVIDIA H200".
        dtype: of the transformer.
        threads: of the CPU.
        seconds: of the last run, courses and measurements included.
    """

    model: str
    fingerprint: str
    layers: int
    recipe: CatRecipe
    styles: Mapping[str, str]
    device: str
    dtype: str
    threads: int
    seconds: float


def write_adapter(folder: Path, cat: TrainedCat, record: CatRecord, curve: Path) -> None:
    """Writes the folder, at once or not at all.

    Args:
        curve: CSV of the training.

    Raises:
        FileExistsError: the folder is there already.
        OSError: it cannot be written.
    """
    if folder.exists():
        raise FileExistsError(f"out: {folder} exists; name another folder, or move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        weights = staging / WEIGHTS_NAME
        save_lora(weights, cat.factors, record.recipe.lora_config(record.layers))
        shutil.copy(curve, staging / CURVE_NAME)
        gains = [f"gain_db_{rung:g}" for rung in record.recipe.rungs]
        panels = (("loss", "held_out_loss"), gains, ("schedule",))
        draw_curves("CAT adapter", staging / CURVE_NAME, panels, (staging / CURVE_NAME).with_suffix(".png"))
        (staging / "README.md").write_text(card(cat, record, fingerprint(weights)), encoding="utf-8")
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def card(cat: TrainedCat, record: CatRecord, sha256: str) -> str:
    """README.md of an adapter: what it is for, what it gains, and how it came to be."""
    recipe = record.recipe
    parameters = sum(factor.numel() for factor in cat.factors.values())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    worn = ", ".join(f"{name} ({key[:12]})" for key, name in record.styles.items()) or "none"
    lines = [
        "# CAT adapter",
        "",
        f"A LoRA of rank {recipe.rank} for {record.model} ({record.fingerprint}), worn only in steps with merged "
        "tokens, so that they predict what all tokens would. Trained by `cinecat train-cat`.",
        "",
        "## Result",
        "",
        f"Mean squared error of the predicted clean latents to those that all tokens predict, on {recipe.held_out} "
        "held-out courses of denoising, each at every rung.",
        "",
        "| | without | with | gain |",
        "|---|---|---|---|",
        *(_row(cat, group) for group in sorted(cat.before.errors, reverse=True)),
        "",
        "![curves](training.png)",
        "",
        "## Training",
        "",
        "Samples are steps of courses of denoising: a third of the courses are films with noise, a third are what the "
        "uniform model samples itself, and a third are sampled on merged tokens without the adapter. Half of them wear "
        "a style.",
        "",
        "| | |",
        "|---|---|",
        f"| `{WEIGHTS_NAME}` | {parameters:,} parameters, SHA-256 {sha256} |",
        f"| styles | {worn} |",
        f"| machine | {record.device}, {record.dtype}, {record.threads} threads of {os.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()} |",
        f"| time | {record.seconds:.0f} s in the last run |",
        f"| with | {libraries} |",
        *(f"| {name} | {_cell(value)} |" for name, value in asdict(recipe).items()),
    ]
    return "\n".join([*lines, ""])


def _row(cat: TrainedCat, group: str) -> str:
    gain = gain_db(cat.before, cat.after, group)
    return f"| {group} | {cat.before.errors[group]:.5f} | {cat.after.errors[group]:.5f} | {gain:+.2f} dB |"


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return str(value)
