"""kohya and musubi-tuner: `lora_unet_blocks_0_cross_attn_q.lora_down.weight` with an `.alpha` per layer.

VideoX-Fun writes `lora_unet__`, LyCORIS `lycoris_`. Names are Wan's own or diffusers', dots turned into underscores.
"""

from __future__ import annotations

from cinecat.plugins.formats.layout import AdapterLayout
from cinecat.plugins.formats.names import flat_module
from cinecat.plugins.formats.parts import PartNames
from cinecat.plugins.safetensors_header import SafetensorsHeader

_NAMES = PartNames(r"lora_unet__?|lycoris_", flat_module)


class KohyaFormat:
    """Block indices are read, so that files with some of the blocks or layers are as good as whole ones."""

    name = "kohya"

    def claims(self, header: SafetensorsHeader) -> bool:
        return any(_NAMES.split(key) is not None for key in header.tensors)

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        return _NAMES.read(header)
