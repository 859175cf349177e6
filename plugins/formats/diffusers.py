"""diffusers and peft: `transformer.blocks.0.attn2.to_q.lora_A.weight`, with peft's configuration in the header."""

from __future__ import annotations

from cinecat.plugins.formats.layout import AdapterLayout
from cinecat.plugins.formats.names import diffusers_module, original_module
from cinecat.plugins.formats.parts import DOTTED_PREFIX, PartNames
from cinecat.plugins.safetensors_header import SafetensorsHeader

_NAMES = PartNames(DOTTED_PREFIX, diffusers_module)


def has_diffusers_names(header: SafetensorsHeader) -> bool:
    """Whether a key names a module as diffusers does and Wan's own repository does not."""
    found = map(_NAMES.split, header.tensors)
    return any(split is not None and original_module(split.name) is None for split in found)


class DiffusersFormat:
    """Also what peft writes alone, with or without its prefix `base_model.model.`."""

    name = "diffusers"

    def claims(self, header: SafetensorsHeader) -> bool:
        return has_diffusers_names(header)

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        return _NAMES.read(header)
