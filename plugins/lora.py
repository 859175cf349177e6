"""LoRA files as styles wear them: two factors per layer, in any of the formats of `cinecat.plugins.formats`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cinecat.plugins.adapter_file import AdapterFile, LoraShape, open_adapter
from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats.layout import IgnoredKey, quoted_key

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IgnoredKey", "LoraHeader", "LoraShape", "inspect_lora", "load_lora"]


@dataclass(frozen=True)
class LoraHeader:
    """What a LoRA file changes.

    Attributes:
        targets: shape by module path in diffusers' transformer, e.g. "blocks.0.attn2.to_q".
        format: name of the file's format, e.g. "kohya".
        ignored: tensors that change nothing in the transformer, and why.
        keys: names of each target's tensors, by module path.
    """

    targets: Mapping[str, LoraShape]
    format: str = ""
    ignored: tuple[IgnoredKey, ...] = ()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        return max(shape.rank for shape in self.targets.values())


def inspect_lora(path: Path) -> LoraHeader:
    """Reads which modules a LoRA file changes from its header alone.

    Raises:
        LoraError: the file cannot be worn; the message names the key and the fix.
    """
    with open_adapter(path) as adapter:
        _refuse_variant(adapter)
        return LoraHeader(adapter.shapes, adapter.format, adapter.ignored, adapter.keys)


def load_lora(path: Path, sha256: str = "") -> dict[str, tuple[Tensor, Tensor]]:
    """Reads a LoRA file, its scaling folded into B.

    Args:
        sha256: that the contents must have, in hexadecimal; empty to take what is there.

    Returns:
        A [rank, in] and B [out, rank], float32 on the CPU, by module path in diffusers' transformer, e.g.
        "blocks.0.attn2.to_q". The weight's change is B @ A.

    Raises:
        LoraError: as `inspect_lora`, or the contents are not what they must be, or a tensor holds NaN or infinity.
    """
    with open_adapter(path, sha256) as adapter:
        _refuse_variant(adapter)
        return {module: adapter.factors(module) for module in adapter.shapes}


def _refuse_variant(adapter: AdapterFile) -> None:
    outside = [*adapter.differences.values(), *adapter.biases.values()]
    if outside:
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        raise LoraError(
            f"it changes biases, norms or whole weights ({quoted_key(outside[0])}{more}), which makes it a variant "
            "of the model, not a style; start the server with --model-variant FILE instead"
        )
