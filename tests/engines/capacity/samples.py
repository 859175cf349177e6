"""A clip's work and a card's speeds in round figures."""

from __future__ import annotations

from cinecat.engines.capacity.speeds import Speeds
from cinecat.engines.capacity.work import ClipWork, Steps
from cinecat.engines.tokens.flops import Layout as ModelLayout

WORK = ClipWork(
    model=ModelLayout(dim=5120, layers=40, ffn_dim=13824, text=64, image=257),
    heads=40,
    rows=2,
    steps=(Steps(count=10, tokens=32760, merged=False),),
    value_bytes=2,
    block_bytes=24 * 10**9,
    encoder_flops=12e12,
    encode_flops=40e12,
    decode_flops=260e12,
    latent_rows=60,
    video_bytes=388177920,
)

SPEEDS = Speeds(
    linear_flops=400e12,
    attention_flops=200e12,
    vae_flops=40e12,
    layer_seconds=1e-3,
    link_bytes=100e9,
    message_seconds=1e-5,
    sources={},
)
