"""What Wan's own repository and diffusers call the modules of the transformer.

The original names are those of `wan/modules/model.py` in Wan-Video/Wan2.1, the others those of diffusers'
WanTransformer3DModel. norm1 and norm2 of the original blocks have no weights; its norm3 is diffusers' norm2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class ModuleKind(StrEnum):
    PROJECTION = "projection"  # linear or convolution: the only kind that takes a LoRA
    LAYER_NORM = "layer norm"
    RMS_NORM = "RMS norm"
    MODULATION = "modulation"


PARAMETERS = {
    ModuleKind.PROJECTION: ("weight", "bias"),
    ModuleKind.LAYER_NORM: ("weight", "bias"),
    ModuleKind.RMS_NORM: ("weight",),
    ModuleKind.MODULATION: ("scale_shift_table",),
}


@dataclass(frozen=True)
class WanModule:
    """A module of the transformer.

    Attributes:
        path: in diffusers' WanTransformer3DModel, e.g. "blocks.0.attn2.to_q"; empty for the transformer itself.
    """

    path: str
    kind: ModuleKind


# Finds the module that a name from a file means; None when it means none.
ModuleOf = Callable[[str], WanModule | None]

_PROJECTION, _RMS, _LAYER = ModuleKind.PROJECTION, ModuleKind.RMS_NORM, ModuleKind.LAYER_NORM

# Original name, diffusers' name and kind, within a block.
_IN_BLOCK = (
    *(
        (f"{original}.{old}", f"{diffusers}.{new}", kind)
        for original, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for old, new, kind in (
            ("q", "to_q", _PROJECTION),
            ("k", "to_k", _PROJECTION),
            ("v", "to_v", _PROJECTION),
            ("o", "to_out.0", _PROJECTION),
            ("norm_q", "norm_q", _RMS),
            ("norm_k", "norm_k", _RMS),
        )
    ),
    ("cross_attn.k_img", "attn2.add_k_proj", _PROJECTION),
    ("cross_attn.v_img", "attn2.add_v_proj", _PROJECTION),
    ("cross_attn.norm_k_img", "attn2.norm_added_k", _RMS),
    ("norm3", "norm2", _LAYER),
    ("ffn.0", "ffn.net.0.proj", _PROJECTION),
    ("ffn.2", "ffn.net.2", _PROJECTION),
)

# The same, outside the blocks.
_OUTSIDE = (
    ("patch_embedding", "patch_embedding", _PROJECTION),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1", _PROJECTION),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2", _PROJECTION),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1", _PROJECTION),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2", _PROJECTION),
    ("time_projection.1", "condition_embedder.time_proj", _PROJECTION),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1", _LAYER),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", _PROJECTION),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", _PROJECTION),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2", _LAYER),
    ("head.head", "proj_out", _PROJECTION),
)


@dataclass(frozen=True)
class _Vocabulary:
    """The modules by their names in one spelling. `block` matches a block's index and the rest of a name."""

    block: re.Pattern[str]
    in_block: Mapping[str, WanModule]
    outside: Mapping[str, WanModule]

    def module(self, name: str) -> WanModule | None:
        match = self.block.fullmatch(name)
        if match is None:
            return self.outside.get(name)
        inner = self.in_block.get(match["inner"] or "")
        if inner is None:
            return None
        return WanModule(f"blocks.{match['index']}.{inner.path}".rstrip("."), inner.kind)


_INDEX = r"(?P<index>0|[1-9][0-9]{0,3})"
_DOTTED = re.compile(rf"blocks\.{_INDEX}(?:\.(?P<inner>.+))?")
_UNDERSCORED = re.compile(rf"blocks_{_INDEX}(?:_(?P<inner>.+))?")

_MODULATION = WanModule("", ModuleKind.MODULATION)
_ORIGINAL = _Vocabulary(
    _DOTTED,
    {old: WanModule(new, kind) for old, new, kind in _IN_BLOCK} | {"": _MODULATION},
    {old: WanModule(new, kind) for old, new, kind in _OUTSIDE} | {"head": _MODULATION},
)
_DIFFUSERS = _Vocabulary(
    _DOTTED,
    {new: WanModule(new, kind) for _, new, kind in _IN_BLOCK} | {"": _MODULATION},
    {new: WanModule(new, kind) for _, new, kind in _OUTSIDE},
)


def _flat(*tables: Mapping[str, WanModule]) -> dict[str, WanModule]:
    return {name.replace(".", "_"): module for table in tables for name, module in table.items()}


# No name of one spelling is another module's name in the other once its dots are underscores; a test holds this.
_FLAT = _Vocabulary(
    _UNDERSCORED,
    _flat(_ORIGINAL.in_block, _DIFFUSERS.in_block),
    _flat(_ORIGINAL.outside, _DIFFUSERS.outside),
)


def original_module(name: str) -> WanModule | None:
    """The module of an original name, e.g. "blocks.0.cross_attn.k_img"."""
    return _ORIGINAL.module(name)


def diffusers_module(name: str) -> WanModule | None:
    """The module of a diffusers name, e.g. "blocks.0.attn2.add_k_proj"."""
    return _DIFFUSERS.module(name)


def flat_module(name: str) -> WanModule | None:
    """The module of either name with underscores for dots, e.g. "blocks_0_cross_attn_k_img"."""
    return _FLAT.module(name)
