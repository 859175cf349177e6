"""Checking a ClipSpec against the model, and filling in what it leaves unset."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cinecat.engines.tokens.budget import least_keep_ratio
from cinecat.engines.tokens.grid import Grid
from cinecat.plugins.registry import Style, UnknownStyle
from cinecat.server.errors import Violation, invalid
from cinecat.server.images import Fit, ImageError, decode_image, fit_image
from cinecat.server.models import (
    DEFAULT_KEEP_RATIO,
    MAX_FPS,
    MAX_PSNR_DB,
    MAX_SHIFT,
    MIN_PSNR_DB,
    MIN_SHIFT,
    token_grid,
    tokens_of_steps,
)
from cinecat.server.style_defaults import apply_style_defaults
from cinecat.server.styles import StyleCatalogue
from cinecat.v1 import clip_pb2, models_pb2

MAX_STRENGTH = 4.0
MAX_ARTIFACTS = 8
MAX_SEED = 2**63 - 1

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# How far rounding to whole multiples of tokens may take a keep ratio without a note.
_NEAR = 0.02
_FITS = {clip_pb2.FIT_CROP: Fit.CROP, clip_pb2.FIT_PAD: Fit.PAD, clip_pb2.FIT_STRETCH: Fit.STRETCH}


@dataclass(frozen=True)
class AcceptableClip:
    """A request that can be served.

    Attributes:
        clip: every field set, style versions and strengths and the seed resolved, the image's bytes left out.
        frame: the first frame, uint8 [height, width, 3], sRGB.
        notes: what was done to the image, and what came from which style.
        weights: LoRA files of the styles, by fingerprint.
    """

    clip: clip_pb2.ClipSpec
    frame: NDArray[np.uint8]
    notes: tuple[str, ...]
    weights: Mapping[str, Path] = field(default_factory=dict)


def check_clip(
    clip: clip_pb2.ClipSpec, model: models_pb2.Model, catalogue: StyleCatalogue, loaded: Sequence[str] = ()
) -> AcceptableClip:
    """Resolves a request for a model. Takes as long as decoding its image: run it in a thread.

    Args:
        loaded: names of all models, for the message where the request names none of them.

    Raises:
        RequestError: with every violation found, not only the first.
    """
    resolved = clip_pb2.ClipSpec()
    resolved.CopyFrom(model.defaults)
    resolved.MergeFrom(clip_pb2.ClipSpec(prompt=clip.prompt, negative_prompt=clip.negative_prompt))
    worn: list[Style] = []
    size = _size(clip, resolved, model)
    violations = [
        *_model(clip, model, loaded),
        *_prompts(clip, model.limits),
        *size,
        *_numbers(clip, resolved, model.limits),
        *_choices(clip, resolved),
        *_run_steps(clip, resolved),
        *_tokenization(clip.tokenization, resolved, model, None if size else token_grid(model, resolved)),
        *_styles(clip, resolved, model, catalogue, worn),
        *_image_bytes(clip, model.limits),
    ]
    if violations:
        raise invalid(violations)
    active = [style for style, ref in zip(worn, resolved.styles, strict=True) if ref.strength]
    style_notes = apply_style_defaults(clip, resolved, active, model.limits)
    if violations := [*_prompts_in_templates(resolved, model.limits), *_more_than_all(resolved)]:
        raise invalid(violations)
    try:
        image = decode_image(
            clip.image, max_bytes=model.limits.max_image_bytes, max_pixels=model.limits.max_image_pixels
        )
    except ImageError as error:
        raise invalid([Violation("clip.image", f"{error}")]) from error
    fitted = fit_image(image, resolved.width, resolved.height, _FITS[resolved.fit])
    weights = {style.fingerprint: style.weights_path for style in worn}
    notes = (*fitted.notes, *style_notes, *_lossy(resolved, model))
    return AcceptableClip(resolved, fitted.pixels, notes, weights)


def _model(clip: clip_pb2.ClipSpec, model: models_pb2.Model, loaded: Sequence[str]) -> list[Violation]:
    if clip.model in ("", model.name):
        return []
    names = ", ".join(loaded or [model.name])
    return [Violation("clip.model", f"{clip.model[:64]!r} is not loaded; loaded: {names}", missing=True)]


def _prompts(clip: clip_pb2.ClipSpec, limits: models_pb2.ModelLimits) -> list[Violation]:
    allowed = limits.max_prompt_characters
    return [
        Violation(f"clip.{field}", f"has {len(text)} characters, at most {allowed} are allowed")
        for field, text in (("prompt", clip.prompt), ("negative_prompt", clip.negative_prompt))
        if len(text) > allowed
    ]


def _prompts_in_templates(resolved: clip_pb2.ClipSpec, limits: models_pb2.ModelLimits) -> list[Violation]:
    allowed, count = limits.max_prompt_characters, len(resolved.prompt)
    if count <= allowed:
        return []
    return [
        Violation("clip.prompt", f"has {count} characters with its style's template, at most {allowed} are allowed")
    ]


def _size(clip: clip_pb2.ClipSpec, resolved: clip_pb2.ClipSpec, model: models_pb2.Model) -> list[Violation]:
    limits = model.limits
    violations = []
    if clip.HasField("width") != clip.HasField("height"):
        unset = "height" if clip.HasField("width") else "width"
        violations.append(Violation(f"clip.{unset}", "must be set when the other side is"))
    elif clip.HasField("width"):
        resolved.width, resolved.height = clip.width, clip.height
        for field, pixels in (("width", clip.width), ("height", clip.height)):
            if not limits.min_size <= pixels <= limits.max_size or pixels % limits.size_multiple:
                violations.append(Violation(f"clip.{field}", _allowed_sizes(pixels, limits)))
    if clip.HasField("frames"):
        resolved.frames = clip.frames
        if not 1 <= clip.frames <= limits.max_frames or clip.frames % 4 != 1:
            violations.append(
                Violation(
                    "clip.frames",
                    f"{clip.frames} is not 4k + 1 between 1 and {limits.max_frames}{_near_frames(clip.frames, limits)}",
                )
            )
    if not violations:
        tokens = token_grid(model, resolved).count
        if tokens > limits.max_tokens:
            violations.append(
                Violation(
                    "clip.frames",
                    f"{resolved.width}x{resolved.height} with {resolved.frames} frames takes {tokens} tokens, "
                    f"at most {limits.max_tokens} are allowed; ask for fewer frames or a smaller size",
                )
            )
        elif model.buckets and tokens not in {bucket.tokens for bucket in model.buckets}:
            built = ", ".join(str(tokens) for tokens in sorted({bucket.tokens for bucket in model.buckets}))
            violations.append(
                Violation(
                    "clip.width",
                    f"no engine is built for the {tokens} tokens of {resolved.width}x{resolved.height} with "
                    f"{resolved.frames} frames, only for {built}; ask for a size that has so many, or let the operator "
                    "add this one to engine_sizes and run cinecat engines build",
                )
            )
    return violations


def _allowed_sizes(pixels: int, limits: models_pb2.ModelLimits) -> str:
    multiple = limits.size_multiple
    near = min(max(round(pixels / multiple) * multiple, limits.min_size), limits.max_size)
    return f"{pixels} is not a multiple of {multiple} between {limits.min_size} and {limits.max_size}; nearest: {near}"


def _near_frames(frames: int, limits: models_pb2.ModelLimits) -> str:
    near = min(max((frames + 1) // 4 * 4 + 1, 1), limits.max_frames)
    return f"; nearest: {near}"


def _numbers(clip: clip_pb2.ClipSpec, resolved: clip_pb2.ClipSpec, limits: models_pb2.ModelLimits) -> list[Violation]:
    violations = []
    if clip.HasField("steps"):
        resolved.steps = clip.steps
        if not 1 <= clip.steps <= limits.max_steps:
            violations.append(Violation("clip.steps", f"{clip.steps} is not between 1 and {limits.max_steps}"))
    if clip.HasField("guidance_scale"):
        resolved.guidance_scale = clip.guidance_scale
        if not 0.0 <= clip.guidance_scale <= limits.max_guidance_scale:  # false for NaN too
            violations.append(
                Violation(
                    "clip.guidance_scale", f"{clip.guidance_scale} is not between 0 and {limits.max_guidance_scale:g}"
                )
            )
    if clip.HasField("fps"):
        resolved.fps = clip.fps
        if not (math.isfinite(clip.fps) and 1.0 <= clip.fps <= MAX_FPS):
            violations.append(Violation("clip.fps", f"{clip.fps} is not between 1 and {MAX_FPS:g}"))
    if clip.HasField("shift"):
        resolved.shift = clip.shift
        if not MIN_SHIFT <= clip.shift <= MAX_SHIFT:  # false for NaN too
            violations.append(Violation("clip.shift", f"{clip.shift} is not between {MIN_SHIFT:g} and {MAX_SHIFT:g}"))
    resolved.seed = clip.seed if clip.HasField("seed") else secrets.randbits(32)
    if resolved.seed < 0:
        violations.append(Violation("clip.seed", f"{clip.seed} is not between 0 and {MAX_SEED}"))
    return violations


def _run_steps(clip: clip_pb2.ClipSpec, resolved: clip_pb2.ClipSpec) -> list[Violation]:
    """How many steps there are is known for certain only after styles had their say, unless the request tells."""
    if not clip.HasField("run_steps"):
        return []
    resolved.run_steps = clip.run_steps
    violations = []
    if clip.run_steps < 2:
        few = f"{clip.run_steps} is not 2 or more; leave it unset to run the model in all steps"
        violations.append(Violation("clip.run_steps", few))
    if clip.tokenization.mode == clip_pb2.Tokenization.CAT:
        violations.append(Violation("clip.run_steps", "cannot go with tokenization CAT; leave one of them unset"))
    if clip.HasField("steps"):
        violations += _more_than_all(resolved)
    return violations


def _more_than_all(resolved: clip_pb2.ClipSpec) -> list[Violation]:
    if resolved.run_steps <= resolved.steps:
        return []
    more = f"{resolved.run_steps} is more than the clip's {resolved.steps} steps; leave it unset to run all of them"
    return [Violation("clip.run_steps", more)]


def _tokenization(
    asked: clip_pb2.Tokenization, resolved: clip_pb2.ClipSpec, model: models_pb2.Model, grid: Grid | None
) -> list[Violation]:
    """`grid` is of the clip's patches; None where its size is wrong."""
    cat, budget = asked.mode == clip_pb2.Tokenization.CAT, asked.WhichOneof("budget")
    violations = []
    if asked.mode:
        resolved.tokenization.CopyFrom(asked)
        if asked.mode not in model.tokenizations:
            offered = ", ".join(clip_pb2.Tokenization.Mode.Name(mode) for mode in model.tokenizations)
            violations.append(Violation("clip.tokenization.mode", f"{asked.mode} is not one of {offered}"))
    if budget and not cat:
        violations.append(Violation(f"clip.tokenization.{budget}", "must be unset unless mode is CAT"))
    elif budget == "target_psnr_db" and not MIN_PSNR_DB <= asked.target_psnr_db <= MAX_PSNR_DB:  # true for NaN too
        between = f"{asked.target_psnr_db} is not between {MIN_PSNR_DB:g} and {MAX_PSNR_DB:g}"
        violations.append(Violation("clip.tokenization.target_psnr_db", between))
    elif cat and grid is not None and budget != "target_psnr_db":
        least = least_keep_ratio(grid)
        if not budget:
            resolved.tokenization.keep_ratio = max(DEFAULT_KEEP_RATIO, least)
        elif not least <= asked.keep_ratio <= 1.0:  # true for NaN too
            violations.append(
                Violation(
                    "clip.tokenization.keep_ratio",
                    f"{asked.keep_ratio} is not between {math.ceil(least * 1000) / 1000:g} and 1, which is what "
                    f"{resolved.width}x{resolved.height} with {resolved.frames} frames allows",
                )
            )
    return violations


def _lossy(resolved: clip_pb2.ClipSpec, model: models_pb2.Model) -> list[str]:
    """Notes for a clip whose result is not what the uniform path would give."""
    tokenization = resolved.tokenization
    if resolved.HasField("run_steps") and resolved.run_steps < resolved.steps:
        return [f"steps: caching is lossy; {resolved.run_steps} of {resolved.steps} steps run the model"]
    if tokenization.mode != clip_pb2.Tokenization.CAT:
        return []
    if tokenization.WhichOneof("budget") == "target_psnr_db":
        return [
            f"tokenization: cat is lossy; the keep ratio follows from {tokenization.target_psnr_db:g} dB, an estimate"
        ]
    asked, grid = tokenization.keep_ratio, token_grid(model, resolved)
    notes = [f"tokenization: cat is lossy; keep ratio {asked:g}"] if asked < 1.0 else []
    spent = tokens_of_steps(grid, resolved)
    held = sum(spent) / len(spent) / grid.count
    if held > asked + _NEAR:
        notes.append(
            f"tokenization: {asked:g} cannot be held by a clip of this size in {resolved.steps} steps, the first of "
            f"which has all tokens; the keep ratio will be {held:.2f}"
        )
    return notes


def _choices(clip: clip_pb2.ClipSpec, resolved: clip_pb2.ClipSpec) -> list[Violation]:
    violations = []
    if clip.fit:
        resolved.fit = clip.fit
        if clip.fit not in _FITS:
            violations.append(_unknown_enum("clip.fit", clip.fit, clip_pb2.Fit))
    if len(clip.artifact_formats) > MAX_ARTIFACTS:
        count = len(clip.artifact_formats)
        violations.append(
            Violation("clip.artifact_formats", f"names {count} files, at most {MAX_ARTIFACTS} are written")
        )
    elif clip.artifact_formats:
        del resolved.artifact_formats[:]
        formats = (value or clip_pb2.ARTIFACT_FORMAT_MP4_H264 for value in clip.artifact_formats)
        resolved.artifact_formats.extend(dict.fromkeys(formats))
        for index, value in enumerate(clip.artifact_formats):
            if value not in clip_pb2.ArtifactFormat.values():
                violations.append(_unknown_enum(f"clip.artifact_formats[{index}]", value, clip_pb2.ArtifactFormat))
    return violations


def _unknown_enum(field: str, value: int, enum: Any) -> Violation:
    names = ", ".join(name for name in list(enum.keys()) if not name.endswith("UNSPECIFIED"))
    return Violation(field, f"{value} is not one of {names}")


def _styles(
    clip: clip_pb2.ClipSpec,
    resolved: clip_pb2.ClipSpec,
    model: models_pb2.Model,
    catalogue: StyleCatalogue,
    chosen: list[Style],
) -> list[Violation]:
    """Adds the styles to `resolved`, and to `chosen` in the same order."""
    if len(clip.styles) > model.limits.max_styles:
        return [
            Violation("clip.styles", f"names {len(clip.styles)} styles, at most {model.limits.max_styles} go together")
        ]
    violations = []
    for index, wanted in enumerate(clip.styles):
        path = f"clip.styles[{index}]"
        try:
            style = catalogue.find(wanted.name, wanted.version)
        except UnknownStyle as error:
            violations.append(Violation(f"{path}.name", f"{error}", missing=True))
            continue
        strength = wanted.strength if wanted.HasField("strength") else style.manifest.default_strength
        if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:  # false for NaN too
            violations.append(
                Violation(f"{path}.strength", f"{strength} is not between {-MAX_STRENGTH:g} and {MAX_STRENGTH:g}")
            )
        if any(other.manifest.name == style.manifest.name for other in chosen):
            violations.append(Violation(f"{path}.name", f"{style.manifest.name!r} is named twice"))
        elif problem := catalogue.incompatibility(style):
            violations.append(Violation(f"{path}.name", f"{style.manifest.name!r} {problem}"))
        if problem := _other_weights(wanted.fingerprint, style):
            violations.append(Violation(f"{path}.fingerprint", problem))
        chosen.append(style)
        resolved.styles.add(
            name=style.manifest.name,
            version=style.manifest.version,
            strength=strength,
            fingerprint=style.fingerprint,
        )
    active = [style for style, ref in zip(chosen, resolved.styles, strict=True) if ref.strength]
    if not violations and (problem := catalogue.incompatibility_together(active)):
        violations.append(Violation("clip.styles", f"together, {problem}"))
    return violations


def _other_weights(wanted: str, style: Style) -> str:
    if wanted in ("", style.fingerprint):
        return ""
    if not _FINGERPRINT.fullmatch(wanted):
        return f"{wanted[:80]!r} is not 64 lower-case hexadecimal digits; leave it unset to take what there is"
    return (
        f"{style.manifest.name!r} {style.manifest.version} has the weights {style.fingerprint[:12]}..., not "
        f"{wanted[:12]}...; leave it unset to take what there is"
    )


def _image_bytes(clip: clip_pb2.ClipSpec, limits: models_pb2.ModelLimits) -> list[Violation]:
    if not clip.image:
        return [Violation("clip.image", "is missing: send the bytes of a PNG, JPEG, WebP or TIFF file")]
    if len(clip.image) > limits.max_image_bytes:
        return [Violation("clip.image", f"has {len(clip.image)} bytes, at most {limits.max_image_bytes} are allowed")]
    return []
