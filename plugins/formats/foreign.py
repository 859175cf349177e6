"""Whose keys they are when they are not Wan's."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Tried in this order on each key.
_MODELS = (
    (r"(?:^|[._])(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]", "Stable Diffusion"),
    (r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]", "Flux or HunyuanVideo"),
    (r"(?:^|[._])transformer_blocks[._]", "Flux, Qwen-Image or LTX-Video"),
    (r"(?:^|[._])vace_blocks[._]", "Wan VACE"),
    (r"(?:^|[._])joint_blocks[._]", "Stable Diffusion 3"),
    (r"(?:^|[._])(?:layers[._]\d+[._]attention|context_refiner)[._]", "Lumina or Z-Image"),
    (r"(?:^|[._])model[._]layers[._]\d", "a language model"),
)
_PATTERNS = tuple((re.compile(pattern, re.ASCII), model) for pattern, model in _MODELS)


def likely_model(keys: Iterable[str]) -> str:
    """The model that keys were probably made for; empty when it cannot be told."""
    return next((model for key in keys for pattern, model in _PATTERNS if pattern.search(key)), "")
