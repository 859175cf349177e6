"""Finding a model: the bundled one, a local folder in the diffusers layout, or a hub id."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cinecat.engines.errors import ModelError

BUNDLED_MODEL = "wan-tiny"
_BUNDLED_FOLDER = Path(__file__).parent / "models" / BUNDLED_MODEL

_READ_BYTES = 32 * 2**20

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_WEIGHTED = ("text_encoder", "image_encoder", "transformer", "vae")
_REQUIRED_FILES = {
    "tokenizer": "tokenizer_config.json",
    "image_processor": "preprocessor_config.json",
    "scheduler": "scheduler_config.json",
    **dict.fromkeys(_WEIGHTED, "config.json"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete Wan2.1 I2V folder in the diffusers layout.

    Attributes:
        name: what requests call it: the last part of the folder's path or of the hub id.
        folder: where it is.
        family: what styles call it, e.g. "wan2.1-i2v-14b".
        fingerprint: 16 hexadecimal digits that change when a config or a weight file does.
    """

    name: str
    folder: Path
    family: str
    fingerprint: str


def find_checkpoint(model: str) -> Checkpoint:
    """Resolves a model setting to a checked folder.

    Args:
        model: "wan-tiny", a path, or a hub id such as "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", in this order of
            precedence; a hub id is downloaded by huggingface_hub into its own cache.

    Raises:
        ModelError: the folder is not a complete Wan2.1 I2V checkpoint, or the hub cannot be reached.
    """
    if model == BUNDLED_MODEL:
        return _describe(_BUNDLED_FOLDER)
    folder = Path(model).expanduser()
    if folder.exists():
        return _describe(folder.resolve())
    if _HUB_ID.fullmatch(model):
        return _describe(_download(model), name=model.rpartition("/")[2])
    raise ModelError(
        f"model: {model!r} is neither {BUNDLED_MODEL!r}, nor a folder that exists, nor a hub id (owner/name)"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt", "assets/*"]))
    except Exception as error:  # huggingface_hub raises its own, requests' and OSErrors
        raise ModelError(f"model: {hub_id!r} could not be downloaded from the hub: {error}") from error


def _describe(folder: Path, name: str = "") -> Checkpoint:
    missing = _missing(folder)
    if missing:
        raise ModelError(
            f"model: {folder} is not a complete Wan2.1 I2V checkpoint in the diffusers layout; missing: "
            + ", ".join(missing)
        )
    transformer = read_json(folder / "transformer" / "config.json")
    if not any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ModelError(f"model: {folder} is incomplete; missing: tokenizer/tokenizer.json (or spiece.model)")
    problem = _not_wan21_i2v(transformer)
    if problem:
        raise ModelError(f"model: {folder} is not Wan2.1 I2V: {problem}")
    return Checkpoint(name or folder.name, folder, _family(folder, transformer), _fingerprint(folder))


def _missing(folder: Path) -> list[str]:
    if not folder.is_dir():
        return ["the folder itself"]
    missing = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    for part, config in _REQUIRED_FILES.items():
        if not (folder / part / config).is_file():
            missing.append(f"{part}/{config}")
        elif part in _WEIGHTED:
            missing += _missing_weights(folder / part)
    return missing


def _missing_weights(part: Path) -> list[str]:
    """Shards that an index names, or any safetensors file at all. Pickled weights do not count."""
    files = weight_files(part)
    return [f"{part.name}/{file.name}" for file in files if not file.is_file()] or (
        [] if files else [f"{part.name}/*.safetensors"]
    )


def weight_files(part: Path) -> tuple[Path, ...]:
    """The files that hold a part's weights: the shards that its index names, there or not, or the file of the usual
    name, or else all safetensors files. Raises ModelError when the index cannot be read.
    """
    for stem in _WEIGHT_STEMS:
        index = part / f"{stem}.safetensors.index.json"
        if index.is_file():
            return tuple(part / shard for shard in sorted(set(read_json(index).get("weight_map", {}).values())))
        if (single := part / f"{stem}.safetensors").is_file():
            return (single,)
    return tuple(sorted(part.glob("*.safetensors")))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError when it is not one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"model: {path} must hold a JSON object")
    return value


def _not_wan21_i2v(transformer: dict[str, Any]) -> str:
    if transformer.get("_class_name") != "WanTransformer3DModel":
        return f"the transformer is a {transformer.get('_class_name')!r}, not a 'WanTransformer3DModel'"
    if transformer.get("in_channels") != 36:
        return f"the transformer takes {transformer.get('in_channels')} channels, image-to-video takes 36"
    sizes = ("num_layers", "num_attention_heads", "attention_head_dim")
    if not all(isinstance(transformer.get(size), int) for size in sizes):
        return f"the transformer's config does not give {', '.join(sizes)}"
    if transformer.get("image_dim") is None:
        return "the transformer reads no image embedding (image_dim is null)"
    return ""


def _family(folder: Path, transformer: dict[str, Any]) -> str:
    declared = folder / "cinecat.json"
    if declared.is_file():
        family = read_json(declared).get("family")
        if isinstance(family, str):
            return family
    layers = transformer["num_layers"]
    dim = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    return "wan2.1-i2v-14b" if (layers, dim) == (40, 5120) else f"wan2.1-i2v-{layers}x{dim}"


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("**/*")):
        if path.suffix == ".json":
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(f"{path.relative_to(folder).as_posix()} {_content(path)}".encode())
    return digest.hexdigest()[:16]


def _content(weights: Path) -> str:
    """What a file of weights holds, the same on all machines where that can be told. 14B are too long to read for a
    name; in the hub's cache, they are links to files that are called by the hash of their content. Others are known by
    size and time.
    """
    if weights.is_symlink() and _SHA256.fullmatch(target := weights.readlink().name):
        return target
    stat = weights.stat()
    if stat.st_size <= _READ_BYTES:
        return hashlib.sha256(weights.read_bytes()).hexdigest()
    return f"{stat.st_size} {stat.st_mtime_ns}"
