"""Model variants: a file's changes, fused into the transformer's weights when the model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cinecat.engines.errors import ModelError
from cinecat.engines.messages import VariantFused
from cinecat.plugins.errors import LoraError
from cinecat.plugins.fingerprint import fingerprint
from cinecat.plugins.variant import ParameterChange, VariantHeader, load_variant, read_variant

if TYPE_CHECKING:
    from torch import Tensor, nn

_FIRST = 3


@dataclass(frozen=True)
class Variant:
    """A variant file that can be read.

    Attributes:
        path: where it is.
        header: what it changes.
        sha256: of the file, in hexadecimal.
    """

    path: Path
    header: VariantHeader
    sha256: str

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem.encode(errors="replace").decode()

    def fingerprint(self, model: str) -> str:
        """16 hexadecimal digits for a model of that fingerprint with the variant fused into it."""
        return hashlib.sha256(f"{model} {self.sha256}".encode()).hexdigest()[:16]


def find_variant(setting: str) -> Variant | None:
    """Reads a variant's header and hashes the file; None when the setting is empty. Needs no torch.

    Raises:
        ModelError: the file cannot be read, or is in no known format.
    """
    if not setting:
        return None
    path = Path(setting).expanduser()
    try:
        return Variant(path, read_variant(path), fingerprint(path))
    except LoraError as error:
        raise ModelError(f"model_variant: {error}") from error
    except OSError as error:
        raise ModelError(f"model_variant: {path} cannot be read: {error.strerror}") from error


def fuse_variant(transformer: nn.Module, variant: Variant) -> VariantFused:
    """Adds a variant's changes to the parameters, one after another, in float32, and rounds to each one's own dtype.

    Args:
        transformer: diffusers' WanTransformer3DModel as it was loaded, before its linears are replaced.

    Raises:
        ModelError: a parameter that the file changes is not there or has another size, or a value is not finite. The
            transformer is not to be used then.
    """
    parameters = dict(transformer.named_parameters())
    missing = sorted(variant.header.parameters - parameters.keys())
    if missing:
        raise ModelError(
            f"model_variant: {variant.path.name} changes {_some(missing)}, which the model does not have; "
            "choose one made for this model"
        )
    try:
        for change in load_variant(variant.path, variant.sha256):
            _add(change, parameters[change.parameter].data, variant.path.name)
    except LoraError as error:
        raise ModelError(f"model_variant: {error}") from error
    return VariantFused(variant.name, len(variant.header.parameters), len(variant.header.ignored))


def _add(change: ParameterChange, parameter: Tensor, file: str) -> None:
    try:
        delta = change.delta(tuple(parameter.shape))
    except LoraError as error:
        raise ModelError(f"model_variant: {file}: {error}") from error
    parameter.copy_(parameter.float() + delta.to(parameter.device))
    if not parameter.isfinite().all():
        raise ModelError(f"model_variant: {file}: {change.parameter} becomes NaN or infinity with it; export it again")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FIRST} more" if len(names) > _FIRST else ""
    return ", ".join(names[:_FIRST]) + more
