"""Formats of LoRA files, each of which says which tensors of a file change which modules of Wan's transformer.

Packages add their own; docs/adapter-formats.md shows how. What they import is here.
"""

from __future__ import annotations

from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats.layout import AdapterFormat, AdapterLayout, FactorKeys, IgnoredKey
from cinecat.plugins.safetensors_header import SafetensorsHeader, TensorEntry

__all__ = [
    "AdapterFormat",
    "AdapterLayout",
    "FactorKeys",
    "IgnoredKey",
    "LoraError",
    "SafetensorsHeader",
    "TensorEntry",
]
