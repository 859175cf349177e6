"""What a loaded model offers: limits and defaults, as ListModels tells them and as requests are checked against."""

from __future__ import annotations

from collections.abc import Sequence

from cinecat.engines.errors import ModelError
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE, ModelInfo
from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.server.settings import Settings, clip_size
from cinecat.v1 import clip_pb2, models_pb2

MAX_PROMPT_CHARACTERS = 4096
MAX_STYLES = 8
MAX_GUIDANCE_SCALE = 30.0
MAX_FPS = 240.0
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MIN_PSNR_DB, MAX_PSNR_DB = 15.0, 60.0
DEFAULT_KEEP_RATIO = 0.75

_CPU_TOKENS = 20_480  # 512 x 512 x 77 frames: minutes per step on two cores
_GPU_TOKENS = 680_400  # 3840 x 2160 x 81 frames


def describe_model(info: ModelInfo, settings: Settings) -> models_pb2.Model:
    """The Models service's answer for a loaded model; `settings` are the model's.

    Raises:
        ModelError: the setting default_size is none of the model's sizes.
    """
    max_tokens = settings.max_tokens or (_CPU_TOKENS if info.device == "cpu" else _GPU_TOKENS)
    return models_pb2.Model(
        name=info.name,
        family=info.family,
        device=info.device,
        dtype=info.dtype,
        engine=info.engine,
        parameters=info.parameters,
        weights_bytes=info.weights_bytes,
        limits=models_pb2.ModelLimits(
            size_multiple=info.size_multiple,
            min_size=2 * info.size_multiple,
            max_size=info.max_size,
            max_frames=min(info.max_frames, _frames_within(max_tokens)),
            max_tokens=max_tokens,
            max_steps=settings.max_steps,
            max_guidance_scale=MAX_GUIDANCE_SCALE,
            max_prompt_characters=MAX_PROMPT_CHARACTERS,
            max_styles=MAX_STYLES,
            max_image_bytes=settings.max_image_mib * 2**20,
            max_image_pixels=settings.max_image_megapixels * 10**6,
        ),
        defaults=_defaults(info, settings, max_tokens),
        tokenizations=[clip_pb2.Tokenization.UNIFORM, clip_pb2.Tokenization.CAT],
        buckets=[models_pb2.Bucket(rows=rows, tokens=tokens) for rows, tokens in info.buckets],
        variant=info.variant,
        fingerprint=info.fingerprint,
    )


def fitting_model(models: Sequence[models_pb2.Model], clip: clip_pb2.ClipSpec) -> int:
    """Index of the model for a request that names none: the first where it gives no size, else the one whose own size
    is the smallest that has as many pixels as the clip, else the one whose own size is the largest.
    """
    if not (clip.HasField("width") and clip.HasField("height")):
        return 0
    areas = [model.defaults.width * model.defaults.height for model in models]
    covering = [area for area in areas if area >= clip.width * clip.height]
    return areas.index(min(covering) if covering else max(areas))


def token_grid(model: models_pb2.Model, clip: clip_pb2.ClipSpec) -> Grid:
    """The patches of a clip of an allowed size and length; the uniform path has a token for each."""
    multiple = model.limits.size_multiple
    return Grid((clip.frames - 1) // VAE_TEMPORAL_STRIDE + 1, clip.height // multiple, clip.width // multiple)


def tokens_of_steps(grid: Grid, clip: clip_pb2.ClipSpec) -> tuple[int, ...]:
    """Tokens per forward that each step of an accepted clip will spend, 0 where it is cached. A clip with a quality to
    hold spends at most these: its keep ratio is known when its first step is done.
    """
    budget = clip.tokenization.WhichOneof("budget")
    keep_ratio = clip.tokenization.keep_ratio if budget == "keep_ratio" else 1.0
    return step_tokens(grid, clip.steps, keep_ratio, run_steps_of(clip))


def run_steps_of(clip: clip_pb2.ClipSpec) -> int | None:
    """How many steps of an accepted clip run the model; None for all."""
    return clip.run_steps if clip.HasField("run_steps") else None


def _frames_within(max_tokens: int) -> int:
    """Longest clip at the smallest size, 2 x 2 tokens per latent frame."""
    return (max(1, max_tokens // 4) - 1) * VAE_TEMPORAL_STRIDE + 1


def _own_size(info: ModelInfo) -> tuple[int, int, int]:
    if info.family == "wan2.1-i2v-tiny":
        return 128, 128, 17
    # The checkpoints differ in nothing but their weights and what they are called.
    return (1280, 720, 81) if "720P" in info.name.upper() else (832, 480, 81)


def _defaults(info: ModelInfo, settings: Settings, max_tokens: int) -> clip_pb2.ClipSpec:
    """The setting default_size, else Wan's own sizes for the real models and the training shape for the tiny one;
    shorter, then smaller, where that is more than the limits allow.
    """
    tiny = info.family == "wan2.1-i2v-tiny"
    width, height, frames = clip_size(settings.default_size) if settings.default_size else _own_size(info)
    if width % info.size_multiple or height % info.size_multiple or frames % 4 != 1:
        raise ModelError(
            f"default_size: {settings.default_size} is no size of {info.name}: width and height are multiples of "
            f"{info.size_multiple}, frames 4k + 1"
        )
    clip = clip_pb2.ClipSpec(
        model=info.name,
        fit=clip_pb2.FIT_CROP,
        width=width,
        height=height,
        frames=frames,
        fps=8.0 if tiny else 16.0,
        steps=min(8 if tiny else 40, settings.max_steps),
        guidance_scale=1.0 if tiny else 5.0,
        shift=info.shift,
        tokenization=clip_pb2.Tokenization(mode=clip_pb2.Tokenization.UNIFORM),
        artifact_formats=[clip_pb2.ARTIFACT_FORMAT_MP4_H264],
    )
    frame_tokens = (clip.width // info.size_multiple) * (clip.height // info.size_multiple)
    if frame_tokens > max_tokens:
        clip.width = clip.height = 2 * info.size_multiple
        frame_tokens = 4
    latent_frames = min((clip.frames - 1) // VAE_TEMPORAL_STRIDE + 1, max(1, max_tokens // frame_tokens))
    clip.frames = (latent_frames - 1) * VAE_TEMPORAL_STRIDE + 1
    return clip
