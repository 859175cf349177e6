"""How a caller names the styles of a clip."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cinecat.errors import FieldViolation
from cinecat.v1 import clip_pb2

MAX_STRENGTH = 4.0

_SPELLING = re.compile(r"(?P<name>[^@:]+)(@(?P<version>[^@:]+))?(:(?P<strength>[^@:]+))?", re.DOTALL)


@dataclass(frozen=True)
class Style:
    """A style to wear. `strength` multiplies its effect, -4 to 4; None means the style's own default. `version` is
    empty for the newest one. `fingerprint` is the SHA-256 of the weights that it must have; empty for whatever it has.
    """

    name: str
    strength: float | None = None
    version: str = ""
    fingerprint: str = ""

    @classmethod
    def parse(cls, text: str) -> "Style":
        """Reads "name", "name:strength", "name@version" or "name@version:strength". Raises ValueError."""
        match = _SPELLING.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a style; write NAME, NAME:STRENGTH or NAME@VERSION:STRENGTH")
        strength = match["strength"]
        try:
            number = None if strength is None else float(strength)
        except ValueError:
            raise ValueError(f"{text!r} has the strength {strength!r}, which is not a number") from None
        return cls(match["name"].strip(), number, (match["version"] or "").strip())

    @classmethod
    def from_proto(cls, ref: clip_pb2.StyleRef) -> "Style":
        return cls(ref.name, ref.strength if ref.HasField("strength") else None, ref.version, ref.fingerprint)

    def __str__(self) -> str:
        version = f"@{self.version}" if self.version else ""
        strength = "" if self.strength is None else ":" + repr(float(self.strength)).removesuffix(".0")
        return f"{self.name}{version}{strength}"


StyleArgument = str | Style
StylesArgument = StyleArgument | Sequence[StyleArgument] | None


def display(styles: Iterable[Style]) -> str:
    """The styles in one string for people, e.g. "noir:0.8+amber:0.5", or "none"."""
    return "+".join(str(Style(style.name, style.strength)) for style in styles) or "none"


def to_protos(styles: StylesArgument, violations: list[FieldViolation]) -> list[clip_pb2.StyleRef]:
    """The wire form of `styles`; what is wrong with them is appended to `violations`."""
    if styles is None:
        return []
    chosen = [styles] if isinstance(styles, str | Style) else styles
    refs = []
    for index, style in enumerate(chosen):
        field = f"clip.styles[{index}]"
        try:
            refs.append(_to_proto(_style(style), field, violations))
        except (TypeError, ValueError) as error:
            violations.append(FieldViolation(field, str(error)))
    return refs


def _style(value: object) -> Style:
    if isinstance(value, Style):
        return value
    if isinstance(value, str):
        return Style.parse(value)
    raise TypeError(f"{value!r} is not a style; give a string or a cinecat.Style")


def _to_proto(style: Style, field: str, violations: list[FieldViolation]) -> clip_pb2.StyleRef:
    if not style.name:
        violations.append(FieldViolation(f"{field}.name", "is empty; give the name of a style"))
    ref = clip_pb2.StyleRef(name=style.name, version=style.version, fingerprint=style.fingerprint)
    if style.strength is None:
        return ref
    # NaN fails every comparison, so it is refused here too.
    if not -MAX_STRENGTH <= style.strength <= MAX_STRENGTH:
        description = f"{style.strength} is out of range; allowed: -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
        violations.append(FieldViolation(f"{field}.strength", description))
        return ref
    ref.strength = style.strength
    return ref
