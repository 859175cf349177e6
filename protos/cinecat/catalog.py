"""What a server offers: its styles and its models."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.message import Message

from cinecat.clip import enum_name, moment
from cinecat.v1 import clip_pb2, models_pb2, styles_pb2


@dataclass(frozen=True)
class Preview:
    """A picture or a short clip of what a style does; `data` is empty unless it was asked for."""

    file_name: str
    mime_type: str
    size_bytes: int
    data: bytes


@dataclass(frozen=True)
class StyleInfo:
    """A style that the server offers.

    `models` names the server's models that can wear it; `incompatibility` says why none can, where that is so.
    `sampler` holds what requests that do not say take of "steps", "guidance_scale" and "shift", `base_dims` the sizes
    it was made for. `fingerprint` is the SHA-256 of its weights. `ignored_keys` are tensors of the file that do
    nothing, with the reason: `style` gives the first 100 of `ignored_key_count`, `styles` none. `origin` is "bundled",
    "folder", "installed" or "package", and `provider` the folder or package. It is resident while it is in `slots`,
    which take `slot_bytes`. `uses` counts the jobs begun with it since the server started, `jobs` those that are not
    done with it.
    """

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
    prompt_template: str
    sampler: dict[str, float]
    base_dims: dict[str, int]
    preview: Preview | None
    fingerprint: str
    weights_size_bytes: int
    format: str
    ignored_keys: dict[str, str]
    ignored_key_count: int
    origin: str
    provider: str
    slots: tuple[int, ...]
    slot_bytes: int
    uses: int
    last_use_time: datetime | None
    jobs: int
    models: tuple[str, ...] = ()

    @property
    def resident(self) -> bool:
        """Whether it is in a slot, so that the next clip that wears it reads no file."""
        return bool(self.slots)


@dataclass(frozen=True)
class InstalledStyle:
    """What an upload came to: the style, whether it was there already, and what to know about it."""

    style: StyleInfo
    unchanged: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StyleProblem:
    """A folder, or the entry point of a package, that looks like a style but cannot be offered."""

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
    for, none when any shape runs. `variant` names the file whose changes are fused into its weights, "" for none;
    `fingerprint` changes with either.
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
    variant: str
    fingerprint: str


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
        prompt_template=style.prompt_template,
        sampler=_given(style.sampler),
        base_dims=_given(style.base_dims),
        preview=_preview(style.preview) if style.HasField("preview") else None,
        fingerprint=style.fingerprint,
        weights_size_bytes=style.weights_size_bytes,
        format=style.format,
        ignored_keys={ignored.key: ignored.reason for ignored in style.ignored_keys},
        ignored_key_count=style.ignored_key_count,
        origin=enum_name(styles_pb2.StyleOrigin.DESCRIPTOR, "STYLE_ORIGIN_", style.origin),
        provider=style.provider,
        slots=tuple(style.residency.slots),
        slot_bytes=style.residency.size_bytes,
        uses=style.uses,
        last_use_time=moment(style, "last_use_time"),
        jobs=style.jobs,
        models=tuple(style.models),
    )


def installed_from_proto(answer: styles_pb2.InstallStyleResponse) -> InstalledStyle:
    return InstalledStyle(style_from_proto(answer.style), answer.unchanged, tuple(answer.notes))


def _preview(preview: styles_pb2.StylePreview) -> Preview:
    return Preview(preview.file_name, preview.mime_type, preview.size_bytes, preview.data)


def _given(message: Message) -> dict[str, Any]:
    return {descriptor.name: value for descriptor, value in message.ListFields()}


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
        variant=model.variant,
        fingerprint=model.fingerprint,
    )
