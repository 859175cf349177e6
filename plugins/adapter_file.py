"""A LoRA file of any format, checked: the sizes of what it changes, and its tensors read one by one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats.layout import FactorKeys, IgnoredKey, quoted_key
from cinecat.plugins.formats.registry import installed_formats
from cinecat.plugins.safetensors_header import SafetensorsHeader, TensorEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE_NUMBERS = ("I64", "I32")  # as torch.tensor(16) is saved
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class LoraShape:
    """Sizes of one target: A is [rank, in_features], B is [out_features, rank].

    For a convolution, in_features counts the weights of one output: channels times the sizes of the kernel.
    """

    rank: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class AdapterFile:
    """An open file whose header has been checked.

    Attributes:
        format: its format's name.
        shapes: by module path in diffusers' transformer.
        differences: the key of what is added to a parameter, by the parameter's path.
    """

    format: str
    shapes: Mapping[str, LoraShape]
    differences: Mapping[str, str]
    ignored: tuple[IgnoredKey, ...]
    _factors: Mapping[str, FactorKeys]
    _tensors: Mapping[str, TensorEntry]
    _file: BufferedReader

    @property
    def biases(self) -> dict[str, str]:
        """The key of a bias's change that comes with a module's factors, by module path."""
        return {module: keys.bias for module, keys in self._factors.items() if keys.bias}

    @property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """The keys of a module's factors, by module path."""
        return {
            module: tuple(key for key in (keys.down, keys.up, keys.alpha, keys.bias) if key)
            for module, keys in self._factors.items()
        }

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of a module, float32 on the CPU, the scale folded into B.

        Raises:
            LoraError: one holds NaN or infinity.
        """
        keys = self._factors[module]
        shape = self.shapes[module]
        a = self._read(keys.down).reshape(shape.rank, shape.in_features)
        b = self._read(keys.up, self._scale(module)).reshape(shape.out_features, shape.rank)
        return a, b

    def bias(self, module: str) -> Tensor:
        """The change of a module's bias [out] that comes with its factors, float32 on the CPU, scaled as they are.

        Raises:
            LoraError: it holds NaN or infinity.
        """
        return self._read(self._factors[module].bias, self._scale(module))

    def difference(self, parameter: str) -> Tensor:
        """What is added to a parameter, float32 on the CPU, in the shape that it has in the file.

        Raises:
            LoraError: it holds NaN or infinity.
        """
        return self._read(self.differences[parameter])

    def _scale(self, module: str) -> float:
        keys = self._factors[module]
        return self._read(keys.alpha).item() / self.shapes[module].rank if keys.alpha else keys.scale

    def _read(self, key: str, scale: float = 1.0) -> Tensor:
        """A tensor's values as float32, times a scale.

        It is read rather than mapped: a mapped file that shrinks under the reader kills the process.
        """
        import torch

        entry = self._tensors[key]
        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        dtypes |= {"I64": torch.int64, "I32": torch.int32}
        data = bytearray(entry.size)
        self._file.seek(entry.offset)
        if self._file.readinto(data) != entry.size:
            raise LoraError("it became shorter while it was read; copy it again")
        tensor = torch.frombuffer(data, dtype=dtypes[entry.dtype]).reshape(entry.shape).float().mul_(scale)
        if not torch.isfinite(tensor).all():
            raise LoraError(f"{quoted_key(key)} holds NaN or infinity; train or export it again")
        return tensor


@contextmanager
def open_adapter(path: Path, sha256: str = "") -> Iterator[AdapterFile]:
    """Opens a file and checks its header; its name precedes whatever is found wrong with it, later on too.

    Args:
        sha256: that the contents must have, in hexadecimal; empty to take what is there.

    Raises:
        LoraError: the file cannot be read, is not that one, is in no known format, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise LoraError("it was replaced meanwhile; try again")
            yield _checked(file)
    except LoraError as error:
        raise LoraError(f"{path.name}: {error}") from error
    except OSError as error:
        raise LoraError(f"{path.name}: cannot be read ({error.strerror})") from error


def _checked(file: BufferedReader) -> AdapterFile:
    header = read_header(file)
    name, layout = installed_formats().read(header)
    used = [key for keys in layout.factors.values() for key in (keys.down, keys.up, keys.alpha, keys.bias) if key]
    alphas = {keys.alpha for keys in layout.factors.values()}
    for key in (*used, *layout.differences.values()):
        entry = header.tensors[key]
        if entry.dtype not in _FLOATS and not (key in alphas and entry.dtype in _WHOLE_NUMBERS):
            raise LoraError(f"{quoted_key(key)} has dtype {entry.dtype}; save it as F32, F16 or BF16")
        if 0 in entry.shape:
            raise LoraError(f"{quoted_key(key)} has shape {list(entry.shape)}, which holds nothing; export it again")
    shapes = {module: _shape(keys, header) for module, keys in layout.factors.items()}
    return AdapterFile(name, shapes, layout.differences, layout.ignored, layout.factors, header.tensors, file)


def _shape(keys: FactorKeys, header: SafetensorsHeader) -> LoraShape:
    a, b = header.tensors[keys.down].shape, header.tensors[keys.up].shape
    if len(a) != len(b) or len(a) < 2 or math.prod(b[2:]) != 1:
        raise LoraError(
            f"{quoted_key(keys.down)} and {quoted_key(keys.up)} have shapes {list(a)} and {list(b)}; "
            "they must be [rank, in] and [out, rank]"
        )
    if a[0] != b[1]:
        raise LoraError(f"{quoted_key(keys.down)} has rank {a[0]}, {quoted_key(keys.up)} {b[1]}; export them again")
    if keys.alpha and math.prod(header.tensors[keys.alpha].shape) != 1:
        shown = list(header.tensors[keys.alpha].shape)
        raise LoraError(f"{quoted_key(keys.alpha)} has shape {shown}; it must be one number")
    if keys.bias and header.tensors[keys.bias].shape != b[:1]:
        shown = list(header.tensors[keys.bias].shape)
        raise LoraError(f"{quoted_key(keys.bias)} has shape {shown}; it must be [{b[0]}]")
    return LoraShape(a[0], math.prod(a[1:]), b[0])
