"""Formats of installed packages: found, asked after the built-in ones, and harmless when broken."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats import AdapterFormat, AdapterLayout, FactorKeys, IgnoredKey, SafetensorsHeader
from cinecat.plugins.formats.registry import BUILT_IN, ENTRY_POINT_GROUP, AdapterFormats, load_formats
from tests.plugins.formats.layouts import header_of, lora_keys

KEYS = {"reel.down": (4, 6), "reel.up": (8, 4)}
REEL = FactorKeys("reel.down", "reel.up", scale=0.5)
PATH = "blocks.0.attn1.to_q"


class Scripted:
    """A format that claims what it is told to and reads every file alike."""

    def __init__(self, name: str, layout: AdapterLayout | Exception | None, claims: bool | Exception = True) -> None:
        self.name = name
        self._layout = layout
        self._claims = claims

    def claims(self, header: SafetensorsHeader) -> bool:
        if isinstance(self._claims, Exception):
            raise self._claims
        return self._claims

    def read(self, header: SafetensorsHeader) -> AdapterLayout:
        if isinstance(self._layout, Exception):
            raise self._layout
        return self._layout  # type: ignore[return-value]  # packages may return anything


GOOD = Scripted("reel", AdapterLayout({PATH: REEL}))
TAKEN = Scripted("kohya", AdapterLayout({PATH: REEL}))
NAMELESS = Scripted("", AdapterLayout({PATH: REEL}))
HALF = object()


def _entry_point(name: str, attribute: str, module: str = __name__) -> EntryPoint:
    return EntryPoint(name, f"{module}:{attribute}", ENTRY_POINT_GROUP)


def test_the_built_in_formats_keep_to_the_protocol() -> None:
    assert [each.name for each in BUILT_IN if isinstance(each, AdapterFormat)] == [
        "diffusers",
        "wan",
        "kohya",
        "step-distill",
    ]


def test_a_file_that_no_built_in_format_claims_is_offered_to_the_installed_ones() -> None:
    formats = load_formats([_entry_point("reel", "GOOD")])

    assert formats.problems == ()
    assert formats.read(header_of(KEYS)) == ("reel", AdapterLayout({PATH: REEL}))


def test_the_built_in_formats_are_asked_first() -> None:
    formats = load_formats([_entry_point("reel", "GOOD")])

    assert formats.read(header_of(lora_keys({PATH: (8, 6)})))[0] == "diffusers"


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        (_entry_point("broken", "FORMAT", "no_such_package"), "cannot be imported (ModuleNotFoundError("),
        (_entry_point("broken", "MISSING"), "cannot be imported (AttributeError("),
        (_entry_point("broken", "HALF"), "it must be an object with name, claims and read"),
        (_entry_point("broken", "Scripted"), "it must be an object with name, claims and read"),
        (_entry_point("broken", "NAMELESS"), "has the name ''; it must be a word"),
        (_entry_point("broken", "TAKEN"), "has the name 'kohya', which is taken; choose another"),
    ],
)
def test_a_broken_format_is_reported_and_leaves_the_others_be(entry_point: EntryPoint, reason: str) -> None:
    formats = load_formats([entry_point, _entry_point("reel", "GOOD")])

    (problem,) = formats.problems
    assert problem.entry_point == f"broken = {entry_point.value}"
    assert reason in problem.reason
    assert formats.installed == (GOOD,)
    assert formats.read(header_of(KEYS))[0] == "reel"


def test_a_file_that_nobody_claims_is_refused_with_the_formats_that_could_not_be_asked() -> None:
    formats = load_formats([_entry_point("broken", "FORMAT", "no_such_package")])

    with pytest.raises(LoraError) as caught:
        formats.read(header_of(KEYS))

    assert "the formats are diffusers, wan, kohya, step-distill; broken = no_such_package:FORMAT: cannot be" in (
        f"{caught.value}"
    )


def test_a_format_that_fails_to_look_does_not_keep_a_file_from_the_next() -> None:
    formats = AdapterFormats((Scripted("torn", AdapterLayout({}), claims=ZeroDivisionError("0")), GOOD))

    assert formats.read(header_of(KEYS))[0] == "reel"


def test_a_format_that_fails_to_look_is_named_when_nobody_else_claims_the_file() -> None:
    formats = AdapterFormats((Scripted("torn", AdapterLayout({}), claims=ZeroDivisionError("0")),))

    with pytest.raises(LoraError, match=r"the format torn failed to look at it \(ZeroDivisionError\('0'\)\)"):
        formats.read(header_of(KEYS))


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (AdapterLayout({}), "the format reel says nothing of 'reel.down'"),
        (
            AdapterLayout({PATH: FactorKeys("reel.down", "reel.over")}),
            "names 'reel.over', which the file does not hold",
        ),
        (AdapterLayout({PATH: FactorKeys("reel.down", "reel.down")}), "the format reel has two uses for 'reel.down'"),
        (AdapterLayout({PATH: REEL}, ignored=(IgnoredKey("reel.up", ""),)), "has two uses for 'reel.up'"),
        (AdapterLayout({}, ignored=tuple(IgnoredKey(key, "") for key in KEYS)), "all of its tensors are ignored"),
        (AdapterLayout({PATH: replace(REEL, scale=float("nan"))}), "gives 'reel.down' the scale nan"),
        (None, "the format reel failed to read it (AttributeError("),
        (KeyError("reel.up"), r"the format reel failed to read it (KeyError('reel.up'))"),
        (LoraError("reel.up is torn"), "reel.up is torn"),
    ],
)
def test_a_layout_that_does_not_say_what_each_tensor_is_for_is_refused(
    layout: AdapterLayout | Exception | None, reason: str
) -> None:
    with pytest.raises(LoraError) as caught:
        AdapterFormats((Scripted("reel", layout),)).read(header_of(KEYS))

    assert reason in f"{caught.value}"
