"""A model far smaller than wan-tiny, for tests that ask how and not how well."""

from __future__ import annotations

from pathlib import Path

import pytest

from cinecat.engines.messages import CoreConfig
from cinecat.engines.tiny import TinyConfig, build_tiny

MICRO = TinyConfig(
    heads=2,
    head_dim=24,
    layers=2,
    ffn_dim=64,
    text_dim=32,
    image_dim=32,
    image_size=32,
    image_patch=16,
    vae_base_dim=8,
    encoder_layers=2,
)


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoints") / "micro"
    build_tiny(folder, MICRO)
    return folder


@pytest.fixture(scope="session")
def config(micro: Path) -> CoreConfig:
    return CoreConfig(
        model=str(micro),
        device="cpu",
        dtype="auto",
        threads=0,
        style_slots=2,
        max_rank=8,
        cache_bytes=2**24,
        style_cache_bytes=2**24,
    )
