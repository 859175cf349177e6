"""What a server offers: its styles and its models."""

from collections.abc import Iterator
from dataclasses import dataclass

from cinecat.clip import enum_name
from cinecat.v1 import clip_pb2, models_pb2, styles_pb2


@dataclass(frozen=True)
class StyleInfo:
    """A style that the server offers. `incompatibility` says why the server's model cannot wear it; empty if it can."""

    name: str
    version: str
    title: str
    description: str
    trigger_words: tuple[str, ...]
    default_strength: float
    base_model: str
    rank: int
    license: str
    author: str
    compatible: bool
    incompatibility: str


@dataclass(frozen=True)
class StyleProblem:
    """A folder that looks like a style but cannot be offered."""

    folder: str
    reason: str


@dataclass(frozen=True)
class StyleList:
    """All styles of a server, by name, then newest version first; iterating gives the styles."""

    styles: tuple[StyleInfo, ...]
    problems: tuple[StyleProblem, ...]

    def __iter__(self) -> Iterator[StyleInfo]:
        return iter(self.styles)

    def __len__(self) -> int:
        return len(self.styles)


@dataclass(frozen=True)
class ModelLimits:
    """What the server accepts for a model. Sizes are in pixels; 0 means that the server states no limit."""

    size_multiple: int
    min_size: int
    max_size: int
    max_frames: int
    max_tokens: int
    max_steps: int
    max_guidance_scale: float
    max_prompt_characters: int
    max_styles: int
    max_image_bytes: int
    max_image_pixels: int


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model. `width` to `guidance` are its defaults; `buckets` are the (rows, tokens) that engines are built
    for, none when any shape runs.
    """

    name: str
    family: str
    device: str
    dtype: str
    engine: str
    parameters: int
    weights_bytes: int
    limits: ModelLimits
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    guidance: float
    tokenizations: tuple[str, ...]
    buckets: tuple[tuple[int, int], ...]


def style_from_proto(style: styles_pb2.Style) -> StyleInfo:
    return StyleInfo(
        name=style.name,
        version=style.version,
        title=style.title,
        description=style.description,
        trigger_words=tuple(style.trigger_words),
        default_strength=style.default_strength,
        base_model=style.base_model,
        rank=style.rank,
        license=style.license,
        author=style.author,
        compatible=style.compatible,
        incompatibility=style.incompatibility,
    )


def style_list(pages: list[styles_pb2.ListStylesResponse]) -> StyleList:
    """The styles of all pages; each problem once, since every page may repeat them."""
    problems = {(problem.folder, problem.reason): None for page in pages for problem in page.problems}
    return StyleList(
        styles=tuple(style_from_proto(style) for page in pages for style in page.styles),
        problems=tuple(StyleProblem(folder, reason) for folder, reason in problems),
    )


def model_from_proto(model: models_pb2.Model) -> ModelInfo:
    limits, defaults = model.limits, model.defaults
    mode = clip_pb2.Tokenization.Mode.DESCRIPTOR
    return ModelInfo(
        name=model.name,
        family=model.family,
        device=model.device,
        dtype=model.dtype,
        engine=model.engine,
        parameters=model.parameters,
        weights_bytes=model.weights_bytes,
        limits=ModelLimits(
            size_multiple=limits.size_multiple,
            min_size=limits.min_size,
            max_size=limits.max_size,
            max_frames=limits.max_frames,
            max_tokens=limits.max_tokens,
            max_steps=limits.max_steps,
            max_guidance_scale=limits.max_guidance_scale,
            max_prompt_characters=limits.max_prompt_characters,
            max_styles=limits.max_styles,
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
        ),
        width=defaults.width,
        height=defaults.height,
        frames=defaults.frames,
        fps=defaults.fps,
        steps=defaults.steps,
        guidance=defaults.guidance_scale,
        tokenizations=tuple(enum_name(mode, "MODE_", value) for value in model.tokenizations),
        buckets=tuple((bucket.rows, bucket.tokens) for bucket in model.buckets),
    )
