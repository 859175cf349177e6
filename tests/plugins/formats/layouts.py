"""The key lists of real LoRA files, written down by name pattern, and files and headers that hold them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from cinecat.plugins.safetensors_header import SafetensorsHeader, TensorEntry

Shapes = dict[str, tuple[int, ...]]

RANK = 4


@dataclass(frozen=True)
class Sizes:
    dim: int
    ffn: int
    text: int
    time: int
    image: int
    layers: int


I2V_14B = Sizes(dim=5120, ffn=13824, text=4096, time=256, image=1280, layers=40)
SMALL = Sizes(dim=6, ffn=8, text=5, time=4, image=3, layers=2)


def original_parameters(sizes: Sizes, blocks: Iterable[int] | None = None) -> Shapes:
    """Every parameter of Wan2.1 I2V as Wan's own repository names it, with its shape."""
    dim, image = sizes.dim, sizes.image
    shapes: Shapes = {}
    for block in range(sizes.layers) if blocks is None else blocks:
        at = f"blocks.{block}"
        for attention in ("self_attn", "cross_attn"):
            for linear in "qkvo":
                shapes |= _linear(f"{at}.{attention}.{linear}", dim, dim)
            shapes |= {f"{at}.{attention}.norm_q.weight": (dim,), f"{at}.{attention}.norm_k.weight": (dim,)}
        shapes |= _linear(f"{at}.cross_attn.k_img", dim, dim) | _linear(f"{at}.cross_attn.v_img", dim, dim)
        shapes |= {f"{at}.cross_attn.norm_k_img.weight": (dim,), f"{at}.modulation": (1, 6, dim)}
        shapes |= {f"{at}.norm3.weight": (dim,), f"{at}.norm3.bias": (dim,)}
        shapes |= _linear(f"{at}.ffn.0", sizes.ffn, dim) | _linear(f"{at}.ffn.2", dim, sizes.ffn)
    return (
        shapes
        | {"patch_embedding.weight": (dim, 36, 1, 2, 2), "patch_embedding.bias": (dim,)}
        | _linear("text_embedding.0", dim, sizes.text)
        | _linear("text_embedding.2", dim, dim)
        | _linear("time_embedding.0", dim, sizes.time)
        | _linear("time_embedding.2", dim, dim)
        | _linear("time_projection.1", 6 * dim, dim)
        | {"img_emb.proj.0.weight": (image,), "img_emb.proj.0.bias": (image,)}
        | _linear("img_emb.proj.1", image, image)
        | _linear("img_emb.proj.3", dim, image)
        | {"img_emb.proj.4.weight": (dim,), "img_emb.proj.4.bias": (dim,)}
        | _linear("head.head", 64, dim)
        | {"head.modulation": (1, 2, dim)}
    )


def _linear(name: str, out_features: int, in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def projections(parameters: Shapes) -> Shapes:
    """The weights that a LoRA can change, by module name."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in parameters.items()
        if name.endswith(".weight") and len(shape) > 1
    }


def lora_keys(
    weights: Shapes, prefix: str = "", down: str = "lora_A.weight", up: str = "lora_B.weight", alpha: bool = False
) -> Shapes:
    keys: Shapes = {}
    for name, (out_features, *rest) in weights.items():
        keys[f"{prefix}{name}.{down}"] = (RANK, *rest)
        keys[f"{prefix}{name}.{up}"] = (out_features, RANK, *(1 for _ in rest[1:]))
        if alpha:
            keys[f"{prefix}{name}.alpha"] = ()
    return keys


def comfy_keys(parameters: Shapes, alpha: bool = False) -> Shapes:
    return lora_keys(projections(parameters), "diffusion_model.", "lora_down.weight", "lora_up.weight", alpha)


def diffsynth_keys(parameters: Shapes) -> Shapes:
    return lora_keys(projections(parameters), "", "lora_A.default.weight", "lora_B.default.weight")


def kohya_keys(parameters: Shapes, prefix: str = "lora_unet_") -> Shapes:
    flat = {name.replace(".", "_"): shape for name, shape in projections(parameters).items()}
    return lora_keys(flat, prefix, "lora_down.weight", "lora_up.weight", alpha=True)


def difference_keys(parameters: Shapes, prefix: str = "diffusion_model.") -> Shapes:
    """lightx2v's differences: of every bias, norm and modulation, and of the patch embedding's whole weight."""
    endings = {"modulation": "diff_m", "weight": "diff", "bias": "diff_b"}
    keys = {}
    for name, shape in parameters.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or len(shape) == 1 or module == "patch_embedding":
            keys[f"{prefix}{module}.{endings[parameter]}"] = shape
    return keys


def step_distill_keys(parameters: Shapes) -> Shapes:
    weights = {name: shape for name, shape in projections(parameters).items() if name != "patch_embedding"}
    factors = lora_keys(weights, "diffusion_model.", "lora_down.weight", "lora_up.weight")
    return factors | difference_keys(parameters)


def header_of(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> SafetensorsHeader:
    """A header without a file."""
    return SafetensorsHeader(
        metadata or {}, {key: TensorEntry("F32", shape, 0, 4 * math.prod(shape)) for key, shape in shapes.items()}
    )


def write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A bfloat16 file whose tensors are a hole: any size costs nothing, and every value is 0."""
    fields = {}
    position = 0
    for key, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        fields[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(fields).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    return path


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values that differ from key to key, so that a tensor in a wrong place shows; an alpha is 1 to 8."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) if shape else torch.rand((), generator=generator) * 7 + 1
        for key, shape in shapes.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path
