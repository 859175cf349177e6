"""LoRA files of Loom, a trainer made up as an example.

Loom calls A and B "warp" and "weft" and writes `loom/7/text/query/warp` for block 7. Its header holds one gain for all
layers, and the file carries the optimizer's step along.
"""

from __future__ import annotations

import re

from cinecat.plugins.formats import AdapterLayout, FactorKeys, IgnoredKey, LoraError, SafetensorsHeader

ATTENTIONS = {"self": "attn1", "text": "attn2"}
LINEARS = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}

WARP = re.compile(r"loom/(?P<block>[0-9]{1,3})/(?P<attention>\w+)/(?P<linear>\w+)/warp")


class LoomFormat:
    name = "loom"

    def claims(self, header: SafetensorsHeader) -> bool:
        return any(key.startswith("loom/") for key in header.tensors)

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        try:
            gain = float(header.metadata.get("loom_gain", "1"))
        except ValueError:
            raise LoraError("its loom_gain is not a number; export it again") from None
        factors = {}
        for key in header.tensors:
            match = WARP.fullmatch(key)
            if match is None:
                continue
            if match["attention"] not in ATTENTIONS or match["linear"] not in LINEARS:
                raise LoraError(f"{key!r} names no layer of Wan; train attention layers only")
            weft = f"{key.removesuffix('warp')}weft"
            if weft not in header.tensors:
                raise LoraError(f"{key!r} has no {weft!r}; export it again")
            module = f"blocks.{int(match['block'])}.{ATTENTIONS[match['attention']]}.{LINEARS[match['linear']]}"
            factors[module] = FactorKeys(down=key, up=weft, scale=gain)
        ignored = [IgnoredKey(key, "is the optimizer's") for key in header.tensors if key.startswith("loom/optimizer/")]
        return AdapterLayout(factors, ignored=tuple(ignored))


FORMAT = LoomFormat()
