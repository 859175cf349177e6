"""LoRA files in the diffusers/peft layout: safetensors with `<module>.lora_A.weight`, `.lora_B.weight` and `.alpha`.

How strongly a target's B A counts, in the order in which it is looked up:
    1. its own `<module>.alpha` scalar: alpha / rank (diffusers takes these only as its argument `network_alphas`);
    2. diffusers' "lora_adapter_metadata" in the file's header: lora_alpha / r, or lora_alpha / sqrt(r) under rsLoRA,
       with alpha_pattern and rank_pattern;
    3. neither: 1, which is diffusers' convention.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinecat.plugins.errors import LoraError, quoted
from cinecat.plugins.safetensors_header import SafetensorsHeader, TensorEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?(?P<target>\w+(?:\.\w+)*?)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)",
    re.ASCII,
)
_LAYOUT = "<module>.lora_A.weight, <module>.lora_B.weight and <module>.alpha (diffusers/peft)"
_FLOATS = ("F32", "F16", "BF16", "F64")
_METADATA_KEY = "lora_adapter_metadata"
# peft reads pattern keys as regular expressions, which in a file from elsewhere can take for ever to match. Module
# names, plain or escaped, anchored or not, are what diffusers and peft write.
_PATTERN_KEY = re.compile(r"\^?\w+(?:\\?\.\w+)*\$?", re.ASCII)


@dataclass(frozen=True)
class LoraShape:
    """Sizes of one target: A is [rank, in_features], B is [out_features, rank]."""

    rank: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LoraHeader:
    """What a LoRA file changes.

    Attributes:
        targets: shape by module path in diffusers' transformer, e.g. "blocks.0.attn2.to_q".
    """

    targets: Mapping[str, LoraShape]

    @property
    def max_rank(self) -> int:
        return max(shape.rank for shape in self.targets.values())


@dataclass(frozen=True)
class _Target:
    """One target's tensors. `scale` is what holds when there is no `alpha`."""

    shape: LoraShape
    a: TensorEntry
    b: TensorEntry
    alpha: TensorEntry | None
    scale: float


def inspect_lora(path: Path) -> LoraHeader:
    """Reads which modules a LoRA file changes from its header alone.

    Raises:
        LoraError: the file cannot be worn; the message names the key and the fix.
    """
    with _opened(path) as file:
        targets = _targets(read_header(file))
    return LoraHeader({name: target.shape for name, target in targets.items()})


def load_lora(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads a LoRA file, its scaling folded into B.

    Returns:
        A [rank, in] and B [out, rank], float32 on the CPU, by module path in diffusers' transformer, e.g.
        "blocks.0.attn2.to_q". The weight's change is B @ A.

    Raises:
        LoraError: as `inspect_lora`, or a tensor holds NaN or infinity.
    """
    import torch

    factors = {}
    with _opened(path) as file:
        for name, target in _targets(read_header(file)).items():
            scale = target.scale
            if target.alpha is not None:
                scale = _read_tensor(file, target.alpha).item() / target.shape.rank
            a = _read_tensor(file, target.a)
            b = _read_tensor(file, target.b).mul_(scale)
            if not (math.isfinite(scale) and torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise LoraError(f"{name} holds NaN or infinity; train or export it again")
            factors[name] = (a, b)
    return factors


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a file and gives its name to whatever is found wrong with it."""
    try:
        with path.open("rb") as file:
            yield file
    except LoraError as error:
        raise LoraError(f"{path.name}: {error}") from error
    except OSError as error:
        raise LoraError(f"{path.name}: cannot be read ({error.strerror})") from error


def _targets(header: SafetensorsHeader) -> dict[str, _Target]:
    parts = _parts(header.tensors)
    if not parts:
        raise LoraError(f"it holds no LoRA; supported are {_LAYOUT}")
    scaling = _Scaling.of(header.metadata)
    return {target: _target(target, entries, scaling) for target, entries in parts.items()}


def _parts(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """The tensors by target, then by "lora_A.weight", "lora_B.weight" or "alpha"."""
    parts: dict[str, dict[str, TensorEntry]] = {}
    strange = []
    for key, entry in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(quoted(key))
            continue
        entries = parts.setdefault(match["target"], {})
        if match["part"] in entries:
            raise LoraError(f"{match['target']}.{match['part']} is there twice, with and without a prefix; drop one")
        entries[match["part"]] = entry
    if strange:
        shown = ", ".join(strange[:3]) + (" and others" if len(strange) > 3 else "")
        raise LoraError(f"{len(strange)} of its keys are not supported ({shown}); supported are {_LAYOUT}")
    return parts


def _target(name: str, entries: Mapping[str, TensorEntry], scaling: _Scaling) -> _Target:
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in entries:
            raise LoraError(f"{name} has {' and '.join(sorted(entries))} but no {part}; export it again")
    a, b, alpha = entries["lora_A.weight"], entries["lora_B.weight"], entries.get("alpha")
    for part, entry in entries.items():
        if entry.dtype not in _FLOATS:
            raise LoraError(f"{name}.{part} has dtype {entry.dtype}; save it as F32, F16 or BF16")
    for part, entry in (("lora_A.weight", a), ("lora_B.weight", b)):
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise LoraError(f"{name}.{part} has shape {list(entry.shape)}; only LoRAs of linear layers are supported")
    if alpha is not None and math.prod(alpha.shape) != 1:
        raise LoraError(f"{name}.alpha has shape {list(alpha.shape)}; it must be one number")
    rank, in_features = a.shape
    if b.shape[1] != rank:
        raise LoraError(f"{name} has rank {rank} in lora_A and {b.shape[1]} in lora_B; export it again")
    shape = LoraShape(rank, in_features, b.shape[0])
    return _Target(shape, a, b, alpha, scaling.scale(name, rank))


@dataclass(frozen=True)
class _Scaling:
    """The part of peft's LoraConfig that diffusers writes into a file and that decides the scale of a target."""

    r: float
    lora_alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    given: bool = True

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> _Scaling:
        if not metadata.get(_METADATA_KEY):
            return cls(r=1, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}, use_rslora=False, given=False)
        try:
            config = json.loads(metadata[_METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise LoraError(f"its {_METADATA_KEY} is not JSON; export it again") from error
        if not isinstance(config, dict):
            raise LoraError(f"its {_METADATA_KEY} is not a JSON object; export it again")
        # Pipelines write "transformer.r", a transformer alone writes "r".
        fields = {key.removeprefix("transformer."): value for key, value in config.items()}
        if fields.get("use_dora"):
            raise LoraError(f"its {_METADATA_KEY} says DoRA, which is not supported; train a plain LoRA")
        return cls(
            r=_number(fields, "r"),
            lora_alpha=_number(fields, "lora_alpha"),
            rank_pattern=_pattern(fields, "rank_pattern"),
            alpha_pattern=_pattern(fields, "alpha_pattern"),
            use_rslora=bool(fields.get("use_rslora")),
        )

    def scale(self, target: str, rank: int) -> float:
        """What B A of a target is multiplied by.

        Raises:
            LoraError: the file's tensors have another rank than its metadata.
        """
        if not self.given:
            return 1.0
        expected = _lookup(self.rank_pattern, target, self.r)
        if expected != rank:
            raise LoraError(f"{target} has rank {rank}, but {_METADATA_KEY} says {expected:g}; export it again")
        alpha = _lookup(self.alpha_pattern, target, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _number(fields: Mapping[str, Any], key: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:  # false for NaN too
        raise LoraError(f"{key} in its {_METADATA_KEY} is {quoted(value)}; it must be a number")
    return value


def _pattern(fields: Mapping[str, Any], key: str) -> dict[str, float]:
    pattern = fields.get(key) or {}
    if not isinstance(pattern, dict):
        raise LoraError(f"{key} in its {_METADATA_KEY} is {quoted(pattern)}; it must map module names to numbers")
    for name in pattern:
        if not _PATTERN_KEY.fullmatch(name):
            raise LoraError(f"{key} in its {_METADATA_KEY} has the pattern {quoted(name)}; only module names are read")
    return {name: _number(pattern, name) for name in pattern}


def _lookup(pattern: Mapping[str, float], target: str, default: float) -> float:
    """The value of the first pattern that is the target or, unless anchored, its last components."""
    for key, value in pattern.items():
        name = key.removesuffix("$").replace("\\.", ".")
        if target == name.removeprefix("^") or (not name.startswith("^") and target.endswith(f".{name}")):
            return value
    return default


def _read_tensor(file: BufferedReader, entry: TensorEntry) -> Tensor:
    """A tensor's values as float32.

    It is read rather than mapped: a mapped file that shrinks under the reader kills the process.
    """
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    data = bytearray(entry.size)
    file.seek(entry.offset)
    if file.readinto(data) != entry.size:
        raise LoraError("it became shorter while it was read; copy it again")
    return torch.frombuffer(data, dtype=dtypes[entry.dtype]).reshape(entry.shape).float()
