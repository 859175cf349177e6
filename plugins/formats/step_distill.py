"""Files that turn Wan into a model of few steps, as lightx2v and others extract them from whole checkpoints.

Names are Wan's own. Beside LoRA factors there are differences: `.diff` of a weight, `.diff_b` of a bias, `.diff_m` of a
modulation.
"""

from __future__ import annotations

from cinecat.plugins.formats.layout import AdapterLayout
from cinecat.plugins.formats.parts import DIFFERENCES
from cinecat.plugins.formats.wan import ORIGINAL_NAMES, original_keys
from cinecat.plugins.safetensors_header import SafetensorsHeader


class StepDistillFormat:
    """Read whole, differences included; who offers it as a style refuses those."""

    name = "step-distill"

    def claims(self, header: SafetensorsHeader) -> bool:
        return any(split.part in DIFFERENCES for split in original_keys(header))

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        return ORIGINAL_NAMES.read(header)
