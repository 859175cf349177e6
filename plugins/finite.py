"""NaN, infinity and what would become that in a safetensors file, without torch and without the file in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cinecat.plugins.errors import LoraError, quoted
from cinecat.plugins.safetensors_header import TensorEntry, read_header

_CHUNK_BYTES = 16 * 1024 * 1024

# Of each float type: the integer of its width, the bits of its exponent, and the least of them that is refused: 2^40,
# which no training gives and of which a product of three is still finite; in float16 infinity.
_EXPONENTS: dict[str, tuple[np.dtype[Any], int, int]] = {
    "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000, (1023 + 40) << 52),
    "F32": (np.dtype("<u4"), 0x7F80_0000, (127 + 40) << 23),
    "F16": (np.dtype("<u2"), 0x7C00, 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80, (127 + 40) << 7),
}


def check_finite(path: Path) -> None:
    """Reads every float of a file.

    Raises:
        LoraError: one is NaN, infinite or 2^40 and beyond, or the file is not safetensors.
    """
    try:
        with path.open("rb") as file:
            for name, entry in read_header(file).tensors.items():
                if entry.dtype in _EXPONENTS and not _is_finite(file, entry):
                    raise LoraError(
                        f"{path.name}: {quoted(name)} holds NaN, infinity or values beyond 2^40; "
                        "train or export it again"
                    )
    except OSError as error:
        raise LoraError(f"{path.name}: cannot be read ({error.strerror})") from error


def _is_finite(file: BinaryIO, entry: TensorEntry) -> bool:
    integer, exponent, refused = _EXPONENTS[entry.dtype]
    mask, least = integer.type(exponent), integer.type(refused)
    file.seek(entry.offset)
    left = entry.size
    while left:
        size = min(left, _CHUNK_BYTES)
        data = file.read(size)
        if len(data) < size:
            raise LoraError("it became shorter while it was read; copy it again")
        left -= size
        if ((np.frombuffer(data, integer) & mask) >= least).any():
            return False
    return True
