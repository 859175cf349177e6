"""What a worn style says about fields that a request leaves unset.

The request's own values always win. Of several styles, the first named that says something decides, field by field; a
style at strength 0 says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from cinecat.plugins.manifest import PROMPT
from cinecat.plugins.registry import Style
from cinecat.v1 import clip_pb2, models_pb2


def apply_style_defaults(
    clip: clip_pb2.ClipSpec, resolved: clip_pb2.ClipSpec, styles: Sequence[Style], limits: models_pb2.ModelLimits
) -> tuple[str, ...]:
    """Writes into `resolved` what the styles say and `clip` does not.

    Returns:
        Notes for the job: what came from which style.
    """
    return (*_sampler(clip, resolved, styles, limits), *_prompt(clip, resolved, styles))


def _sampler(
    clip: clip_pb2.ClipSpec, resolved: clip_pb2.ClipSpec, styles: Sequence[Style], limits: models_pb2.ModelLimits
) -> list[str]:
    highest = {"steps": limits.max_steps, "guidance_scale": limits.max_guidance_scale, "shift": float("inf")}
    notes = []
    for field, limit in highest.items():
        if clip.HasField(field):  # type: ignore[arg-type]
            continue
        for style in styles:
            value = getattr(style.manifest.sampler, field)
            if value is not None:
                setattr(resolved, field, min(value, limit))
                notes.append(f"{field}: {min(value, limit):g}, from style {style.manifest.name}")
                break
    return notes


def _prompt(clip: clip_pb2.ClipSpec, resolved: clip_pb2.ClipSpec, styles: Sequence[Style]) -> list[str]:
    resolved.prompt_as_is = clip.prompt_as_is
    if clip.prompt_as_is:
        return []
    for style in styles:
        manifest = style.manifest
        if manifest.prompt_template:
            # An empty prompt leaves the punctuation around it behind.
            filled = manifest.prompt_template.replace(PROMPT, clip.prompt)
            resolved.prompt = filled if clip.prompt else filled.strip(" ,;")
            resolved.prompt_as_is = True
            return [f"prompt: in the template of style {manifest.name}"]
    if clip.prompt:
        return []
    for style in styles:
        if style.manifest.trigger_words:
            resolved.prompt = ", ".join(style.manifest.trigger_words)
            resolved.prompt_as_is = True
            return [f"prompt: the trigger words of style {style.manifest.name}"]
    return []
