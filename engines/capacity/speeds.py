"""How fast a card and the links between cards are taken to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

Source: TypeAlias = Literal["measured", "given", "assumed"]


@dataclass(frozen=True)
class Speeds:
    """What is achieved, not what a data sheet promises.

    Attributes:
        linear_flops: FLOP/s of the blocks' matrix products, and of the encoders of text and image.
        attention_flops: FLOP/s of attention.
        vae_flops: FLOP/s of the VAE, which computes in float32.
        layer_seconds: of every block in every forward, however short: launches, and all that is not counted in FLOPs.
        link_bytes: bytes/s that a card sends to the others while it receives as much from them.
        message_seconds: before the first byte of an exchange arrives.
        sources: of each of them, by name.
    """

    linear_flops: float
    attention_flops: float
    vae_flops: float
    layer_seconds: float
    link_bytes: float
    message_seconds: float
    sources: Mapping[str, Source]

    def changed(self, source: Source, **values: float | None) -> Speeds:
        """With other values, of a source; None leaves one as it is."""
        known = {name: value for name, value in values.items() if value is not None}
        return replace(self, **known, sources={**self.sources, **dict.fromkeys(known, source)})

    def named(self) -> dict[str, float]:
        """The values without their sources."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "sources"}


def _assumed(**values: float) -> Speeds:
    return Speeds(**values, sources=dict.fromkeys(values, "assumed"))


ASSUMED = _assumed(
    linear_flops=400e12,
    attention_flops=400e12,
    vae_flops=30e12,
    layer_seconds=0.0,
    link_bytes=300e9,
    message_seconds=20e-6,
)
"""Of 80 GB Hopper cards behind one NVLink switch: some two fifths of the dense 16-bit peak of 990 TFLOP/s, half of the
float32 peak of 67, and two thirds of the 450 GB/s in each direction. Nothing of it was measured."""
