"""A loaded Wan2.1 I2V model: diffusers' and transformers' own modules, placed on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from cinecat.engines.checkpoint import Checkpoint, read_json
from cinecat.engines.errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class WanModel:
    """The parts of the model, in eval mode.

    The transformer and the text encoder have `dtype` (with Wan's float32 islands kept); the VAE and the image encoder
    are float32, as in the reference.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    text_encoder: UMT5EncoderModel
    image_processor: CLIPImageProcessorPil
    image_encoder: CLIPVisionModel
    vae: AutoencoderKLWan
    transformer: WanTransformer3DModel
    scheduler_class: Any
    scheduler_config: dict[str, Any]

    @property
    def shift(self) -> float:
        """Shift of the noise schedule, where a request gives none."""
        return float(self.scheduler_config.get(self._shift_key, 1.0))

    def new_scheduler(self, steps: int, shift: float | None = None) -> Any:
        """A fresh diffusers scheduler (solver state of one request) set to `steps` steps; `shift` None is its own."""
        changes = {} if shift is None else {self._shift_key: shift}
        scheduler = self.scheduler_class.from_config(self.scheduler_config, **changes)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    @property
    def _shift_key(self) -> str:
        return "shift" if self.scheduler_class is diffusers.FlowMatchEulerDiscreteScheduler else "flow_shift"

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.text_encoder, self.image_encoder, self.vae, self.transformer)


def load_model(checkpoint: Checkpoint, device: str, dtype: str) -> WanModel:
    """Loads a checked folder.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU) or a name.

    Raises:
        ModelError: the device is not there, or a file does not fit its config.
    """
    transformers_logging.disable_progress_bar()
    place = _device(device)
    kind = _dtype(dtype, place)
    folder = checkpoint.folder

    def load(cls: Any, name: str, **options: Any) -> Any:
        try:
            return cls.from_pretrained(folder / name, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ModelError(f"model: {folder / name} cannot be loaded: {error}") from error

    def part(cls: Any, name: str, part_dtype: torch.dtype) -> Any:
        module = load(cls, name, torch_dtype=part_dtype, use_safetensors=True)
        return module.eval().requires_grad_(False).to(place)

    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    return WanModel(
        checkpoint=checkpoint,
        device=place,
        dtype=kind,
        tokenizer=load(AutoTokenizer, "tokenizer"),
        text_encoder=part(UMT5EncoderModel, "text_encoder", kind),
        image_processor=load(CLIPImageProcessorPil, "image_processor"),
        image_encoder=part(CLIPVisionModel, "image_encoder", torch.float32),
        vae=part(AutoencoderKLWan, "vae", torch.float32),
        transformer=part(WanTransformer3DModel, "transformer", kind),
        scheduler_class=_scheduler_class(scheduler_config.get("_class_name")),
        scheduler_config=scheduler_config,
    )


def synchronize(device: torch.device) -> None:
    """Waits for queued device work, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device: {name!r} is not there; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ModelError(f"dtype: {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _scheduler_class(name: object) -> Any:
    """A solver that predicts with a flow model; anything else in the file is refused rather than instantiated."""
    known = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    if name not in known:
        raise ModelError(f"model: scheduler {name!r} is not one of {', '.join(known)}")
    return getattr(diffusers, str(name))
