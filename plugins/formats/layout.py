"""What an adapter format is: it says which tensors of a file change which modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from cinecat.plugins.errors import quoted
from cinecat.plugins.safetensors_header import SafetensorsHeader

# Some twice as long as the longest that trainers write for Wan.
MAX_KEY = 200


@dataclass(frozen=True)
class FactorKeys:
    """The tensors of one module's LoRA: the weight changes by scale * up @ down.

    Attributes:
        down: key of A [rank, in].
        up: key of B [out, rank].
        alpha: key of a single number, or empty. With one, the scale is alpha / rank.
        scale: what holds without `alpha`.
        bias: key of a change of the module's bias [out] that is scaled as the factors are (peft's lora_bias), or empty.
    """

    down: str
    up: str
    alpha: str = ""
    scale: float = 1.0
    bias: str = ""


@dataclass(frozen=True)
class IgnoredKey:
    """A tensor that is left out, and why. Whoever looks at the style is told."""

    key: str
    reason: str


@dataclass(frozen=True)
class AdapterLayout:
    """What each tensor of a file is for. A file is refused when one of them is not named here.

    Attributes:
        factors: LoRA tensors by module path in diffusers' WanTransformer3DModel, e.g. "blocks.0.attn2.to_q".
        differences: key of what is added to a parameter, by the parameter's path, e.g. "blocks.0.norm2.weight".
        ignored: the rest.
    """

    factors: Mapping[str, FactorKeys]
    differences: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[IgnoredKey, ...] = ()


@runtime_checkable
class AdapterFormat(Protocol):
    """A way of storing a LoRA in a safetensors file.

    A format sees the header alone: names, dtypes and shapes. Shapes, dtypes, ranks and values are checked by the
    caller, the same for every format.
    """

    @property
    def name(self) -> str:
        """What people call the format, e.g. "kohya"."""
        ...

    def claims(self, header: SafetensorsHeader) -> bool:
        """Whether the file is in this format, right or wrong: a claimed file with bad keys is for `read` to refuse."""
        ...

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        """Says what each tensor of a claimed file is for.

        Raises:
            LoraError: the file cannot be worn; the message names the key and the fix.
        """
        ...


def quoted_key(key: str) -> str:
    """A key as a message shows it: whole, unless it is absurdly long."""
    return quoted(key, MAX_KEY)
