"""What a stored engine is known by: everything that changes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

KeyValue: TypeAlias = "str | int | bool | tuple[KeyValue, ...]"


@dataclass(frozen=True)
class EngineKey:
    """Named values, whose order does not matter. Make one with `of`.

    Two keys are equal exactly when their digests are: 1, True and "1" are three values, which `==` on them would not
    tell apart. There are no floats, which have several spellings.

    Attributes:
        canonical: the fields as JSON in UTF-8's characters, sorted by name, without spaces.
    """

    canonical: str

    def __post_init__(self) -> None:
        if _canonical(self.fields) != self.canonical:
            raise ValueError(f"not in canonical form: {self.canonical[:80]}")

    @classmethod
    def of(cls, fields: Mapping[str, KeyValue]) -> EngineKey:
        """Raises ValueError naming the field that is not a string, a whole number, a bool or a tuple of such."""
        return cls(_canonical(fields))

    @classmethod
    def from_json(cls, value: object) -> EngineKey:
        """The key that `json.loads` read. Raises ValueError."""
        if not isinstance(value, dict):
            raise ValueError("a key is an object")
        return cls.of({name: _tupled(part) for name, part in value.items()})

    @property
    def fields(self) -> dict[str, KeyValue]:
        return {name: _tupled(part) for name, part in json.loads(self.canonical).items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, in hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def describe(self) -> str:
        """One line for people, e.g. `backend=tensorrt bucket=(2, 320) dtype=bfloat16`."""
        return " ".join(f"{_printable(name)}={_phrase(value)}" for name, value in self.fields.items())


def _canonical(fields: Mapping[str, KeyValue]) -> str:
    if not fields:
        raise ValueError("an engine's key needs at least one field")
    for name, value in fields.items():
        if not isinstance(name, str) or not _storable(name) or not _storable(value):
            raise ValueError(
                f"the engine key's field {name!r} is {value!r}; allowed are str, int, bool and tuples of them"
            )
    return json.dumps(dict(sorted(fields.items())), separators=(",", ":"), ensure_ascii=False)


def _storable(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_storable, value))
    if isinstance(value, str):
        # Half a surrogate pair has no UTF-8, and two halves would be spelt like the character they make.
        return not any("\ud800" <= char <= "\udfff" for char in value)
    return isinstance(value, int)


def _tupled(value: object) -> KeyValue:
    # What is neither is refused by `_canonical`.
    return tuple(map(_tupled, value)) if isinstance(value, list) else value  # type: ignore[return-value]


def _phrase(value: KeyValue) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_phrase, value))})"
    return _printable(value) if isinstance(value, str) else str(value)


def _printable(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)
