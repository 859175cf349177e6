"""Wan's own module names: `diffusion_model.blocks.0.cross_attn.q.lora_down.weight`.

ComfyUI's prefix `diffusion_model.` is usual; DiffSynth writes none and keeps peft's adapter name, as in
`lora_A.default.weight`.
"""

from __future__ import annotations

from cinecat.plugins.formats.diffusers import has_diffusers_names
from cinecat.plugins.formats.layout import AdapterLayout
from cinecat.plugins.formats.names import diffusers_module, original_module
from cinecat.plugins.formats.parts import DIFFERENCES, DOTTED_PREFIX, PartNames, SplitKey
from cinecat.plugins.safetensors_header import SafetensorsHeader

ORIGINAL_NAMES = PartNames(DOTTED_PREFIX, original_module)


def original_keys(header: SafetensorsHeader) -> list[SplitKey]:
    """The keys with original names; none when all of these are diffusers' names too and others are diffusers' alone."""
    found = [split for split in map(ORIGINAL_NAMES.split, header.tensors) if split is not None]
    distinct = any(diffusers_module(split.name) is None for split in found)
    return found if distinct or not has_diffusers_names(header) else []


class WanFormat:
    """LoRA factors alone; a file with differences is for the step-distill format."""

    name = "wan"

    def claims(self, header: SafetensorsHeader) -> bool:
        found = original_keys(header)
        return bool(found) and not any(split.part in DIFFERENCES for split in found)

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        return ORIGINAL_NAMES.read(header)
