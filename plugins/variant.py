"""Model variants: files whose changes are fused into the weights when a model is loaded, such as step-distill LoRAs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cinecat.plugins.adapter_file import LoraShape, open_adapter
from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats.layout import IgnoredKey

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VariantHeader:
    """What a variant file changes.

    Attributes:
        targets: shape of the LoRA factors by module path in diffusers' transformer.
        differences: shape of what is added, by parameter path, e.g. "blocks.0.norm2.weight".
        format: name of the file's format, e.g. "step-distill".
        ignored: tensors that change nothing in the transformer, and why.
    """

    targets: Mapping[str, LoraShape]
    differences: Mapping[str, tuple[int, ...]]
    format: str
    ignored: tuple[IgnoredKey, ...]

    @property
    def parameters(self) -> frozenset[str]:
        """Paths of the parameters that change."""
        return frozenset({f"{module}.weight" for module in self.targets} | set(self.differences))


@dataclass(frozen=True)
class ParameterChange:
    """A change of one parameter. Two may be of the same one: both are added.

    Attributes:
        parameter: path in diffusers' transformer, e.g. "blocks.0.attn2.to_q.weight".
        values: float32 on the CPU: the change itself, or its factors A [rank, in] and B [out, rank], scaling folded in,
            whose product B @ A it is.
    """

    parameter: str
    values: Tensor | tuple[Tensor, Tensor]

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """The change in the shape of its parameter, float32.

        Raises:
            LoraError: the parameter has another shape than the file was made for.
        """
        made_for: tuple[int, ...]
        if isinstance(self.values, tuple):
            a, b = self.values
            made_for = (b.shape[0], a.shape[1])
            if made_for == (*shape[:1], math.prod(shape[1:])):
                return (b @ a).reshape(shape)
        else:
            made_for = tuple(self.values.shape)
            if [size for size in made_for if size != 1] == [size for size in shape if size != 1]:
                return self.values.reshape(shape)
        raise LoraError(
            f"{self.parameter} has shape {list(shape)}, the file was made for {list(made_for)}; "
            "choose one made for this model"
        )


def read_variant(path: Path) -> VariantHeader:
    """Reads what a file changes from its header alone. A plain LoRA is a variant too.

    Raises:
        LoraError: the file is in no known format or contradicts itself; the message names the key and the fix.
    """
    with open_adapter(path) as adapter:
        differences = {parameter: adapter.shape(key) for parameter, key in adapter.differences.items()}
        for module, key in adapter.biases.items():
            differences[f"{module}.bias"] = adapter.shape(key)
        return VariantHeader(adapter.shapes, differences, adapter.format, adapter.ignored)


def load_variant(path: Path, sha256: str = "") -> Iterator[ParameterChange]:
    """Reads a file's changes one after another, so that no more than one is in memory.

    Args:
        sha256: that the contents must have, in hexadecimal; empty to take what is there.

    Raises:
        LoraError: as `read_variant`, or the contents are not what they must be, at the first step; or, when it is
            reached, a tensor holds NaN or infinity.
    """
    with open_adapter(path, sha256) as adapter:
        for module in adapter.shapes:
            yield ParameterChange(f"{module}.weight", adapter.factors(module))
        for module in adapter.biases:
            yield ParameterChange(f"{module}.bias", adapter.bias(module))
        for parameter in adapter.differences:
            yield ParameterChange(parameter, adapter.difference(parameter))
