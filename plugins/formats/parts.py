"""The endings of keys that the built-in formats share: what a tensor is within its module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats.foreign import likely_model
from cinecat.plugins.formats.layout import MAX_KEY, AdapterLayout, FactorKeys, IgnoredKey, quoted_key
from cinecat.plugins.formats.names import PARAMETERS, ModuleKind, ModuleOf, WanModule
from cinecat.plugins.formats.scaling import PeftScaling
from cinecat.plugins.safetensors_header import SafetensorsHeader


class Part(StrEnum):
    """What a tensor is to its module. The value of a difference is the name of its parameter."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"
    UP_BIAS = "up bias"
    WEIGHT = "weight"
    BIAS = "bias"
    MODULATION = "scale_shift_table"


DIFFERENCES = (Part.WEIGHT, Part.BIAS, Part.MODULATION)

# Between lora_A and weight, peft may write the adapter's name. "diff" and its kin come from differences of whole
# checkpoints, the last one for Wan's modulation.
_ENDINGS = {
    Part.DOWN: r"lora_(?:A|down)(?:\.\w+)?\.weight|lora\.down\.weight",
    Part.UP: r"lora_(?:B|up)(?:\.\w+)?\.weight|lora\.up\.weight",
    Part.ALPHA: r"alpha",
    Part.UP_BIAS: r"lora_(?:B|up)(?:\.\w+)?\.bias",
    Part.WEIGHT: r"diff",
    Part.BIAS: r"diff_b",
    Part.MODULATION: r"diff_m",
}
_REFUSED = {
    r"dora_scale|lora_magnitude_vector(?:\.\w+)*": "is part of a DoRA, whose change depends on the base weights",
    r"hada_\w+(?:\.\w+)*": "is part of a LoHa, which is no product of two small matrices",
    r"lokr_\w+(?:\.\w+)*": "is part of a LoKr, which is no product of two small matrices",
    r"lora_mid(?:\.\w+)*": "is part of a LoRA of convolutions in three factors",
    r"b?oft_\w+(?:\.\w+)*": "is part of an OFT, which multiplies the base weights",
    r"weight|bias|modulation|scale_shift_table|scale_weight": "is a weight of a whole model, not a change of one",
}
_PLAIN = "only plain LoRAs are supported; train one, or extract one from this"

_GROUPS = [*_ENDINGS.values(), *_REFUSED]
_KEY = re.compile(rf"(?P<name>.+?)\.(?:{'|'.join(f'({ending})' for ending in _GROUPS)})", re.ASCII)
_PARTS = list(_ENDINGS)
_REASONS = list(_REFUSED.values())

# peft's wrapper, then what diffusers' pipelines, ComfyUI and DiffSynth write before a module's name.
DOTTED_PREFIX = r"(?:base_model\.model\.)?(?:transformer\.|(?:model\.)?diffusion_model\.|pipe\.dit\.)?"

_TEXT_ENCODER = re.compile(r"lora_te\d?_|lora_text_encoder|text_encoder(?:_\d)?\.")


@dataclass(frozen=True)
class SplitKey:
    """A key that names a module of Wan.

    Attributes:
        name: the module's name as the file spells it, without a prefix.
        part: what the tensor is; None when it is nothing that can be used, which `refusal` then says.
    """

    name: str
    module: WanModule
    part: Part | None
    refusal: str = ""


class PartNames:
    """Keys that are a prefix, a module's name and an ending."""

    def __init__(self, prefix: str, module_of: ModuleOf) -> None:
        """Takes a pattern for what comes before a module's name, and what finds the module."""
        self._prefix = re.compile(prefix, re.ASCII)
        self._module_of = module_of

    def split(self, key: str) -> SplitKey | None:
        """None when the key names no module."""
        prefix = self._prefix.match(key) if len(key) <= MAX_KEY else None
        match = prefix and _KEY.fullmatch(key, prefix.end())
        if not match:
            return None
        name, *endings = match.groups()
        module = self._module_of(name)
        if module is None:
            return None
        index = next(index for index, text in enumerate(endings) if text is not None)
        if index < len(_PARTS):
            return SplitKey(name, module, _PARTS[index])
        return SplitKey(name, module, None, _REASONS[index - len(_PARTS)])

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        """Says what each tensor is for.

        Raises:
            LoraError: naming the key that cannot be used.
        """
        parts: dict[str, dict[Part, str]] = {}
        names: dict[str, str] = {}
        ignored = []
        unknown = []
        for key in header.tensors:
            found = self.split(key)
            if found is not None:
                part = _usable_part(key, found)
                path = found.module.path
                keys = parts.setdefault(path, {})
                if part in keys:
                    raise LoraError(
                        f"{quoted_key(keys[part])} and {quoted_key(key)} are the same part of one layer; drop one"
                    )
                keys[part] = key
                names[path] = found.name
            elif _TEXT_ENCODER.match(key):
                ignored.append(IgnoredKey(key, "changes the text encoder; styles change the transformer only"))
            else:
                unknown.append(key)
        if unknown:
            raise LoraError(unknown_keys(unknown))
        scaling = PeftScaling.of(header.metadata)
        factors = {
            path: _factor_keys(names[path], keys, header, scaling)
            for path, keys in parts.items()
            if any(part not in DIFFERENCES for part in keys)
        }
        differences = {
            f"{path}.{part}".removeprefix("."): keys[part]
            for path, keys in parts.items()
            for part in DIFFERENCES
            if part in keys
        }
        return AdapterLayout(factors, differences, tuple(ignored))


def unknown_keys(keys: Sequence[str]) -> str:
    """What is wrong with keys that name nothing in Wan's transformer."""
    shown = ", ".join(quoted_key(key) for key in keys[:3]) + (" and others" if len(keys) > 3 else "")
    model = likely_model(keys)
    guess = f"it looks like a LoRA for {model}; " if model else ""
    return f"{len(keys)} of its keys name nothing in Wan's transformer ({shown}); {guess}choose one made for Wan2.1 I2V"


def _usable_part(key: str, found: SplitKey) -> Part:
    part, kind = found.part, found.module.kind
    if part is None:
        raise LoraError(f"{quoted_key(key)} {found.refusal}; {_PLAIN}")
    fits = part in PARAMETERS[kind] if part in DIFFERENCES else kind is ModuleKind.PROJECTION
    if not fits:
        raise LoraError(f"{quoted_key(key)} changes what no {kind} has; export it again")
    return part


def _factor_keys(name: str, keys: Mapping[Part, str], header: SafetensorsHeader, scaling: PeftScaling) -> FactorKeys:
    for part, other in ((Part.DOWN, "lora_A or lora_down"), (Part.UP, "lora_B or lora_up")):
        if part not in keys:
            key = next(iter(keys.values()))
            raise LoraError(f"{quoted_key(key)} has no {other} beside it; export the file again")
    shape = header.tensors[keys[Part.DOWN]].shape
    rank = shape[0] if shape else 0
    # A rank of zero is refused with the shapes.
    scale = scaling.scale(name, rank) if rank else 1.0
    return FactorKeys(keys[Part.DOWN], keys[Part.UP], keys.get(Part.ALPHA, ""), scale, keys.get(Part.UP_BIAS, ""))
