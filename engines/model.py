"""A loaded Wan2.1 I2V model: diffusers' and transformers' own modules, placed on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from cinecat.engines.checkpoint import Checkpoint, read_json
from cinecat.engines.errors import ModelError
from cinecat.engines.vae import lay_out
from cinecat.engines.weights import fill, without_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class WanEncoders:
    """The model without its transformer, in eval mode.

    The text encoder has `dtype`; the VAE and the image encoder are float32, as in the reference.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    text_encoder: UMT5EncoderModel
    image_processor: CLIPImageProcessorPil
    image_encoder: CLIPVisionModel
    vae: AutoencoderKLWan


@dataclass(frozen=True)
class WanModel(WanEncoders):
    """All parts of the model; the transformer has `dtype` too, with Wan's float32 islands kept."""

    transformer: WanTransformer3DModel
    scheduler_class: Any
    scheduler_config: dict[str, Any]

    @property
    def shift(self) -> float:
        """Shift of the noise schedule, where a request gives none."""
        return float(self.scheduler_config.get(_shift_key(self.scheduler_class), 1.0))

    def new_scheduler(self, steps: int, shift: float | None = None) -> Any:
        """A fresh diffusers scheduler (solver state of one request) set to `steps` steps; `shift` None is its own."""
        changes = {} if shift is None else {_shift_key(self.scheduler_class): shift}
        scheduler = self.scheduler_class.from_config(self.scheduler_config, **changes)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.text_encoder, self.image_encoder, self.vae, self.transformer)


def load_model(
    checkpoint: Checkpoint, device: str, dtype: str, encoders_on_host: bool = False, transformer_on_host: bool = False
) -> WanModel:
    """Loads a checked folder.

    Args:
        device: "auto" (a GPU where there is one), "auto:N" (the GPU of that number), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU) or a name.
        encoders_on_host, transformer_on_host: load the encoders of text and image, or the transformer, into the host's
            memory, for `placement` to move; the dtype is still that of the device.

    Raises:
        ModelError: the device is not there, or a file does not fit its config.
    """
    scheduler_class, scheduler_config = _scheduler(checkpoint)
    encoders = load_encoders(checkpoint, device, dtype, encoders_on_host)
    kind = str(encoders.dtype).removeprefix("torch.")
    return WanModel(
        **vars(encoders),
        transformer=load_transformer(checkpoint, "cpu" if transformer_on_host else device, kind),
        scheduler_class=scheduler_class,
        scheduler_config=scheduler_config,
    )


def load_encoders(checkpoint: Checkpoint, device: str, dtype: str, on_host: bool = False) -> WanEncoders:
    """Loads everything but the transformer; arguments and errors as `load_model`."""
    transformers_logging.disable_progress_bar()
    place = find_device(device)
    home = torch.device("cpu") if on_host else place
    kind = find_dtype(dtype, place)
    return WanEncoders(
        checkpoint=checkpoint,
        device=place,
        dtype=kind,
        tokenizer=_load(checkpoint, AutoTokenizer, "tokenizer"),
        text_encoder=_text_encoder(checkpoint, home, kind),
        image_processor=_load(checkpoint, CLIPImageProcessorPil, "image_processor"),
        image_encoder=_module(checkpoint, CLIPVisionModel, "image_encoder", home, torch.float32),
        vae=load_vae(checkpoint, device),
    )


def load_transformer(checkpoint: Checkpoint, device: str, dtype: str) -> WanTransformer3DModel:
    """Loads the transformer alone, frozen and in eval mode; arguments and errors as `load_model`."""
    place = find_device(device)
    if place.type == "cuda":
        # For libraries that run on the current one.
        torch.cuda.set_device(place)
    folder = checkpoint.folder / "transformer"
    config = read_json(folder / "config.json")
    transformer: WanTransformer3DModel = _empty(folder, lambda: WanTransformer3DModel.from_config(config))
    fill(transformer, folder, place, find_dtype(dtype, place), WanTransformer3DModel._keep_in_fp32_modules)
    return transformer


def load_vae(checkpoint: Checkpoint, device: str) -> AutoencoderKLWan:
    """Loads the VAE alone, float32; arguments and errors as `load_model`."""
    return lay_out(_module(checkpoint, AutoencoderKLWan, "vae", find_device(device), torch.float32))


def load_vae_decoder(checkpoint: Checkpoint, device: str) -> AutoencoderKLWan:
    """Loads the VAE without its encoder, float32; arguments and errors as `load_model`."""
    place = find_device(device)
    vae = load_vae(checkpoint, "cpu")
    del vae.encoder, vae.quant_conv
    return vae.to(place)


def pixel_stride(checkpoint: Checkpoint) -> int:
    """Pixels per latent of a checkpoint's VAE, along width and height."""
    return int(read_json(checkpoint.folder / "vae" / "config.json").get("scale_factor_spatial", 8))


def schedule_shift(checkpoint: Checkpoint) -> float:
    """Shift of a checkpoint's noise schedule. Raises ModelError when its scheduler is not known."""
    scheduler_class, config = _scheduler(checkpoint)
    return float(config.get(_shift_key(scheduler_class), 1.0))


def _text_encoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> UMT5EncoderModel:
    folder = checkpoint.folder / "text_encoder"
    config = _load(checkpoint, UMT5Config, "text_encoder")
    encoder: UMT5EncoderModel = _empty(folder, lambda: UMT5EncoderModel(config))
    # transformers keeps these from float16 alone, whose range they exceed.
    fill(encoder, folder, device, dtype, encoder._keep_in_fp32_modules if dtype == torch.float16 else ())
    return encoder


def _empty(folder: Path, build: Callable[[], Any]) -> Any:
    """A module in eval mode that has no weights yet."""
    try:
        with without_weights():
            return build().eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"model: {folder} cannot be loaded: {error}") from error


def _load(checkpoint: Checkpoint, cls: Any, name: str, **options: Any) -> Any:
    folder = checkpoint.folder / name
    try:
        return cls.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"model: {folder} cannot be loaded: {error}") from error


def _module(checkpoint: Checkpoint, cls: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    module = _load(checkpoint, cls, name, torch_dtype=dtype, use_safetensors=True)
    return module.eval().requires_grad_(False).to(device)


def synchronize(device: torch.device) -> None:
    """Waits for queued device work, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def find_device(name: str) -> torch.device:
    """The device that a setting names, as in `load_model`. Raises ModelError when it is not there."""
    kind, _, number = name.partition(":")
    if kind == "auto" and (not number or number.isdecimal()):
        name = name.replace("auto", "cuda") if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device: {name!r} is not one of auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device: {name!r} is not there; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs. "
            "With auto or cuda every replica takes a GPU of its own: lower replicas, or name GPUs that may be shared"
        )
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting names, as in `load_model`. Raises ModelError for any other name."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ModelError(f"dtype: {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _scheduler(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """Class and config of the solver, which predicts with a flow model; anything else is refused, not instantiated."""
    config = read_json(checkpoint.folder / "scheduler" / "scheduler_config.json")
    name = config.get("_class_name")
    known = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    if name not in known:
        raise ModelError(f"model: scheduler {name!r} is not one of {', '.join(known)}")
    return getattr(diffusers, str(name)), config


def _shift_key(scheduler_class: Any) -> str:
    return "shift" if scheduler_class is diffusers.FlowMatchEulerDiscreteScheduler else "flow_shift"
