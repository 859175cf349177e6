"""Which format a file is in: the built-in ones first, then those of installed packages."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from cinecat.plugins.errors import LoraError, quoted
from cinecat.plugins.formats.diffusers import DiffusersFormat
from cinecat.plugins.formats.kohya import KohyaFormat
from cinecat.plugins.formats.layout import AdapterFormat, AdapterLayout, quoted_key
from cinecat.plugins.formats.parts import unknown_keys
from cinecat.plugins.formats.step_distill import StepDistillFormat
from cinecat.plugins.formats.wan import WanFormat
from cinecat.plugins.safetensors_header import SafetensorsHeader

ENTRY_POINT_GROUP = "cinecat.adapter_formats"

BUILT_IN: tuple[AdapterFormat, ...] = (DiffusersFormat(), WanFormat(), KohyaFormat(), StepDistillFormat())


@dataclass(frozen=True)
class FormatProblem:
    """An installed format that cannot be used, and why.

    Attributes:
        entry_point: as the package declares it, e.g. "loom = loom_lora:FORMAT".
    """

    entry_point: str
    reason: str


@dataclass(frozen=True)
class AdapterFormats:
    """The formats that files may be in.

    Attributes:
        installed: of packages, in the order in which they are asked.
        problems: of packages whose format is left out.
    """

    installed: tuple[AdapterFormat, ...] = ()
    problems: tuple[FormatProblem, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in (*BUILT_IN, *self.installed))

    def read(self, header: SafetensorsHeader) -> tuple[str, AdapterLayout]:
        """Finds a file's format and what each of its tensors is for.

        Returns:
            The format's name and the layout, in which every key of the file is named once.

        Raises:
            LoraError: no format or several claim the file, or its format refuses it.
        """
        adapter_format = self._claimant(header)
        try:
            layout = adapter_format.read(header)
            _check_complete(adapter_format.name, layout, header)
        except LoraError:
            raise
        except Exception as error:
            raise LoraError(f"the format {adapter_format.name} failed to read it ({error!r})") from error
        return adapter_format.name, layout

    def _claimant(self, header: SafetensorsHeader) -> AdapterFormat:
        built_in = [each for each in BUILT_IN if each.claims(header)]
        if len(built_in) > 1:
            names = " and ".join(each.name for each in built_in)
            raise LoraError(f"it mixes keys of the formats {names}; save it in one")
        if built_in:
            return built_in[0]
        failed = [f"{each.entry_point}: {each.reason}" for each in self.problems]
        for each in self.installed:
            try:
                if each.claims(header):
                    return each
            except Exception as error:
                failed.append(f"the format {each.name} failed to look at it ({error!r})")
        reasons = [unknown_keys(list(header.tensors)) if header.tensors else "it holds no LoRA: it has no tensors"]
        raise LoraError("; ".join([*reasons, f"the formats are {', '.join(self.names)}", *failed]))


def load_formats(found: Iterable[EntryPoint]) -> AdapterFormats:
    """Loads the formats of packages. One that cannot be loaded is reported and leaves the others be."""
    formats: list[AdapterFormat] = []
    problems = []
    taken = {each.name for each in BUILT_IN}
    for entry_point in sorted(found, key=lambda each: (each.name, each.value)):
        shown = f"{entry_point.name} = {entry_point.value}"
        try:
            loaded = entry_point.load()
        except Exception as error:
            problems.append(FormatProblem(shown, f"cannot be imported ({error!r})"))
            continue
        reason = _defect(loaded, taken)
        if reason:
            problems.append(FormatProblem(shown, reason))
            continue
        taken.add(loaded.name)
        formats.append(loaded)
    return AdapterFormats(tuple(formats), tuple(problems))


@functools.cache
def installed_formats() -> AdapterFormats:
    """The formats of the packages that were installed when this was first called."""
    return load_formats(entry_points(group=ENTRY_POINT_GROUP))


def _defect(loaded: object, taken: set[str]) -> str:
    if isinstance(loaded, type) or not isinstance(loaded, AdapterFormat):
        return f"is {quoted(loaded)}; it must be an object with name, claims and read"
    if not isinstance(loaded.name, str) or not loaded.name:
        return f"has the name {quoted(loaded.name)}; it must be a word"
    if loaded.name in taken:
        return f"has the name {quoted(loaded.name)}, which is taken; choose another"
    return ""


def _check_complete(name: str, layout: AdapterLayout, header: SafetensorsHeader) -> None:
    used = [
        *(key for keys in layout.factors.values() for key in (keys.down, keys.up, keys.alpha, keys.bias) if key),
        *layout.differences.values(),
        *(each.key for each in layout.ignored),
    ]
    for key in used:
        if key not in header.tensors:
            raise LoraError(f"the format {name} names {quoted_key(key)}, which the file does not hold")
    counts = Counter(used)
    for key in header.tensors:
        if counts[key] != 1:
            said = "says nothing of" if not counts[key] else "has two uses for"
            raise LoraError(f"the format {name} {said} {quoted_key(key)}")
    for keys in layout.factors.values():
        if not math.isfinite(keys.scale):
            raise LoraError(f"the format {name} gives {quoted_key(keys.down)} the scale {keys.scale}; export it again")
    if not layout.factors and not layout.differences:
        raise LoraError("it holds no LoRA of the transformer: all of its tensors are ignored")
