"""Style folders and LoRA files for the tests."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DIM = 24
LINEARS = (
    *(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in ("to_q", "to_k", "to_v", "to_out.0")),
    "attn2.add_k_proj",
    "attn2.add_v_proj",
)
TARGETS = tuple(f"blocks.{block}.{linear}" for block in range(2) for linear in LINEARS)

MANIFEST = {
    "name": "sepia",
    "version": "1.0.0",
    "title": "Sepia",
    "base_model": "wan2.1-i2v-tiny",
    "weights": "sepia.safetensors",
}


@dataclass(frozen=True)
class Factors:
    """One target's LoRA: A [rank, in], B [out, rank], and alpha, which counts as the rank when it is None."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float | None = None

    @property
    def delta(self) -> torch.Tensor:
        """[out, in], float64."""
        scale = 1.0 if self.alpha is None else self.alpha / self.a.shape[0]
        return scale * self.b.double() @ self.a.double()


def random_factors(
    rank: int,
    alpha: float | None = None,
    in_features: int = DIM,
    out_features: int = DIM,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_features, generator=generator)
    b = torch.randn(out_features, rank, generator=generator)
    return Factors(a.to(dtype), b.to(dtype), alpha)


def lora_tensors(lora: Mapping[str, Factors], prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    tensors = {}
    for target, factors in lora.items():
        tensors[f"{prefix}{target}.lora_A.weight"] = factors.a
        tensors[f"{prefix}{target}.lora_B.weight"] = factors.b
        if factors.alpha is not None:
            tensors[f"{prefix}{target}.alpha"] = torch.tensor(factors.alpha)
    return tensors


def write_lora(
    path: Path,
    lora: Mapping[str, Factors] | None = None,
    prefix: str = "transformer.",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a LoRA file; without `lora`, of one target and rank 4. `config` goes where diffusers keeps LoraConfig."""
    lora = {TARGETS[0]: random_factors(4)} if lora is None else lora
    metadata = {} if config is None else {"lora_adapter_metadata": json.dumps(config)}
    save_file(lora_tensors(lora, prefix), path, metadata={"format": "pt", **metadata})
    return path


def write_raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def toml(table: Mapping[str, Any]) -> str:
    # A JSON string, list or finite number is TOML too, apart from the DEL character and surrogate escapes.
    return "".join(f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items())


def write_style(folder: Path, seed: int = 0, **keys: Any) -> Path:
    """Writes a style folder with a LoRA of rank 4; `keys` change its manifest, None drops a key."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {key: value for key, value in {**MANIFEST, **keys}.items() if value is not None}
    write_lora(folder / MANIFEST["weights"], {TARGETS[0]: random_factors(4, seed=seed)})
    (folder / "style.toml").write_text(toml(table))
    return folder
