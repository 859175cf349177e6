"""Reading the header of a safetensors file without its tensors, trusting nothing that it says.

The file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from cinecat.plugins.errors import LoraError, quoted

# Some 20 times the header of a LoRA on every linear of a 40-layer model.
MAX_HEADER_BYTES = 4 * 1024 * 1024

_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        dtype: as the format spells it, e.g. "BF16".
        shape: sizes of the dimensions; () for a scalar.
        offset: of its first byte, from the start of the file.
        size: in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A header whose tensors are known to fill the rest of the file exactly."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def read_header(file: BinaryIO) -> SafetensorsHeader:
    """Reads the header of an open file and checks it against the file's length.

    Raises:
        LoraError: the file is not safetensors, is truncated, or its header contradicts itself.
        OSError: the file cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length < 2:
        raise LoraError("it is not a safetensors file; convert it to safetensors")
    if length > MAX_HEADER_BYTES:
        raise LoraError(
            f"it is not a safetensors file: its header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    if length > size - 8:
        raise LoraError(f"it is truncated or not safetensors: the header has {length} bytes, the file {size}")
    fields = _parse(file.read(length))
    metadata = _metadata(fields.pop("__metadata__", {}))
    tensors = {name: _entry(name, field, 8 + length) for name, field in fields.items()}
    _check_layout(tensors, 8 + length, size)
    return SafetensorsHeader(metadata, tensors)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        fields = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text, and no answer holds it
    except (ValueError, RecursionError) as error:
        raise LoraError("it is not a safetensors file: its header is not JSON; convert it to safetensors") from error
    if not isinstance(fields, dict):
        raise LoraError("it is not a safetensors file: its header is not a JSON object; convert it to safetensors")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise LoraError("its header names a tensor twice; save it again")
    return unique


def _metadata(field: object) -> dict[str, str]:
    if not isinstance(field, dict) or not all(isinstance(value, str) for value in field.values()):
        raise LoraError("its __metadata__ is not a map of strings; save it again")
    return field


def _entry(name: str, field: object, data_start: int) -> TensorEntry:
    match field:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if (
            0 <= start <= end < 2**63
        ):
            pass
        case _:
            raise LoraError(f"{quoted(name)} lacks its dtype, shape or data_offsets; save the file again")
    if dtype not in _ITEM_BITS:
        raise LoraError(f"{quoted(name)} has the unknown dtype {quoted(dtype)}; save it as F32, F16 or BF16")
    sizes = tuple(item for item in shape if type(item) is int and 0 <= item < 2**48)
    # Eight dimensions below 2^48 keep the product small enough to compare at once.
    if len(sizes) != len(shape) or len(shape) > 8:
        raise LoraError(f"{quoted(name)} has the impossible shape {quoted(shape)}; save the file again")
    if end - start != math.prod(sizes) * _ITEM_BITS[dtype] // 8:
        raise LoraError(f"{quoted(name)} has {end - start} bytes, which its shape and dtype contradict")
    return TensorEntry(dtype, sizes, data_start + start, end - start)


def _check_layout(tensors: Mapping[str, TensorEntry], data_start: int, file_size: int) -> None:
    position = data_start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != position:
            raise LoraError("its tensors overlap or leave gaps; save it again")
        position += entry.size
    if position > file_size:
        raise LoraError(f"it is truncated: {position} bytes are announced, {file_size} are there; copy it again")
    if position < file_size:
        raise LoraError(f"it has {file_size - position} bytes after its last tensor; save it again")
