"""The scale that peft's configuration gives a LoRA. diffusers writes it into the file's header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cinecat.plugins.errors import LoraError, quoted

_METADATA_KEY = "lora_adapter_metadata"
# peft reads pattern keys as regular expressions, which in a file from elsewhere can take for ever to match. Module
# names, plain or escaped, anchored or not, are what diffusers and peft write.
_PATTERN_KEY = re.compile(r"\^?\w+(?:\\?\.\w+)*\$?", re.ASCII)


@dataclass(frozen=True)
class PeftScaling:
    """The part of peft's LoraConfig that decides a module's scale.

    It is lora_alpha / r, or lora_alpha / sqrt(r) under rsLoRA, with alpha_pattern and rank_pattern; and 1, which is
    diffusers' convention, for a file that says nothing.
    """

    r: float
    lora_alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    given: bool = True

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> PeftScaling:
        """Reads the "lora_adapter_metadata" of a header.

        Raises:
            LoraError: it cannot be honoured.
        """
        if not metadata.get(_METADATA_KEY):
            return cls(r=1, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}, use_rslora=False, given=False)
        try:
            config = json.loads(metadata[_METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise LoraError(f"its {_METADATA_KEY} is not JSON; export it again") from error
        if not isinstance(config, dict):
            raise LoraError(f"its {_METADATA_KEY} is not a JSON object; export it again")
        # Pipelines write "transformer.r", a transformer alone writes "r".
        fields = {key.removeprefix("transformer."): value for key, value in config.items()}
        if fields.get("use_dora"):
            raise LoraError(f"its {_METADATA_KEY} says DoRA, which is not supported; train a plain LoRA")
        return cls(
            r=_number(fields, "r"),
            lora_alpha=_number(fields, "lora_alpha"),
            rank_pattern=_pattern(fields, "rank_pattern"),
            alpha_pattern=_pattern(fields, "alpha_pattern"),
            use_rslora=bool(fields.get("use_rslora")),
        )

    def scale(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by.

        Args:
            module: its name in the file, to which the patterns refer.
            rank: of its tensors, at least 1.

        Raises:
            LoraError: the file's tensors have another rank than its metadata.
        """
        if not self.given:
            return 1.0
        expected = _lookup(self.rank_pattern, module, self.r)
        if expected != rank:
            raise LoraError(f"{module} has rank {rank}, but {_METADATA_KEY} says {expected:g}; export it again")
        alpha = _lookup(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _number(fields: Mapping[str, Any], key: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:  # false for NaN too
        raise LoraError(f"{key} in its {_METADATA_KEY} is {quoted(value)}; it must be a number")
    return value


def _pattern(fields: Mapping[str, Any], key: str) -> dict[str, float]:
    pattern = fields.get(key) or {}
    if not isinstance(pattern, dict):
        raise LoraError(f"{key} in its {_METADATA_KEY} is {quoted(pattern)}; it must map module names to numbers")
    for name in pattern:
        if not _PATTERN_KEY.fullmatch(name):
            raise LoraError(f"{key} in its {_METADATA_KEY} has the pattern {quoted(name)}; only module names are read")
    return {name: _number(pattern, name) for name in pattern}


def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that is the module or, unless anchored, its last components."""
    for key, value in pattern.items():
        name = key.removesuffix("$").replace("\\.", ".")
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}")):
            return value
    return default
