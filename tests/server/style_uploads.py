"""Styles on their way to a server: LoRA files that the samples' model can wear, and uploads of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from cinecat.v1 import styles_pb2

TARGET = "blocks.0.attn2.to_q"


def weights(seed: int = 0, rank: int = 2, target: str = TARGET, size: int = 256, **tensors: Any) -> bytes:
    """A LoRA file; `tensors` replace "A" [rank, size] and "B" [size, rank]."""
    random = np.random.default_rng(seed)
    factors: Mapping[str, Any] = {
        "A": random.standard_normal((rank, size), np.float32),
        "B": random.standard_normal((size, rank), np.float32),
        **tensors,
    }
    return save({f"transformer.{target}.lora_{name}.weight": tensor for name, tensor in factors.items()})


def with_nan(dtype: type[np.floating[Any]]) -> bytes:
    factor = np.ones((256, 2), dtype)
    factor[-1, -1] = np.nan
    return weights(B=factor)


def with_huge_header() -> bytes:
    return struct.pack("<Q", 2**60) + b"{}" + bytes(1000)


def upload(
    data: bytes, *, chunk: int = 1000, sha256: str = "", size_bytes: int = 0, toml: str = "", **fields: Any
) -> Iterator[styles_pb2.InstallStyleRequest]:
    """The messages of an upload, as a client sends them."""
    first = styles_pb2.StyleUpload(sha256=sha256, size_bytes=size_bytes)
    if toml:
        first.toml = toml
    else:
        first.fields.CopyFrom(styles_pb2.StyleManifest(**{"name": "dusk", **fields}))
    yield styles_pb2.InstallStyleRequest(upload=first)
    for start in range(0, len(data), chunk):
        yield styles_pb2.InstallStyleRequest(weights=data[start : start + chunk])


def toml(**keys: str | None) -> str:
    """A style.toml; None drops a key."""
    table: dict[str, str | None] = {
        "name": "dusk",
        "version": "1.0.0",
        "title": "Dusk",
        "base_model": "wan2.1-i2v-tiny",
        **keys,
    }
    table.setdefault("weights", "dusk.safetensors")
    return "".join(f'{key} = "{value}"\n' for key, value in table.items() if value is not None)
