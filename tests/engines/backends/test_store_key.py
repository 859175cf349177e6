"""Keys of stored engines: what differs has another digest, and what does not has not, in every process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.backends.store_key import EngineKey, KeyValue

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
VALUES = st.recursive(
    TEXT | st.integers() | st.booleans(), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)
FIELDS: st.SearchStrategy[dict[str, KeyValue]] = st.dictionaries(TEXT, VALUES, min_size=1, max_size=4)


def spelt(fields: dict[str, KeyValue]) -> str:
    """Tells 1, True and "1" apart, which == does not."""
    return repr(sorted(fields.items(), key=lambda item: item[0]))


@given(FIELDS, FIELDS)
def test_two_keys_have_one_digest_exactly_when_their_fields_are_the_same(
    one: dict[str, KeyValue], two: dict[str, KeyValue]
) -> None:
    same = spelt(one) == spelt(two)
    assert (EngineKey.of(one).digest == EngineKey.of(two).digest) is same
    assert (EngineKey.of(one) == EngineKey.of(two)) is same


@given(FIELDS, st.data())
def test_every_field_changes_the_digest(fields: dict[str, KeyValue], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(fields)))
    other = data.draw(VALUES.filter(lambda value: repr(value) != repr(fields[name])))
    digest = EngineKey.of(fields).digest
    assert EngineKey.of({**fields, name: other}).digest != digest
    assert EngineKey.of({**fields, f"{name}.": fields[name]}).digest != digest


@given(FIELDS)
def test_a_key_survives_json_and_any_order_of_its_fields(fields: dict[str, KeyValue]) -> None:
    key = EngineKey.of(fields)
    assert EngineKey.from_json(json.loads(json.dumps(key.fields))) == key
    assert EngineKey.of(dict(reversed(fields.items()))) == key
    assert spelt(key.fields) == spelt(fields)


@given(FIELDS)
def test_a_key_is_described_in_one_printable_line(fields: dict[str, KeyValue]) -> None:
    assert EngineKey.of(fields).describe().isprintable()


@pytest.mark.parametrize(("one", "two"), [(1, True), (0, False), (1, "1"), (True, "true"), ((), ""), ((1, 2), "1,2")])
def test_values_that_look_alike_are_different(one: KeyValue, two: KeyValue) -> None:
    assert EngineKey.of({"value": one}) != EngineKey.of({"value": two})


@pytest.mark.parametrize("value", [1.5, None, [1], {"a": 1}, b"a", (1, 2.0), "\ud83d", ("\ude00",)])
def test_a_value_with_several_spellings_is_refused_by_the_name_of_its_field(value: Any) -> None:
    with pytest.raises(ValueError, match="'shape'"):
        EngineKey.of({"dtype": "bfloat16", "shape": value})


def test_a_key_without_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one field"):
        EngineKey.of({})


@pytest.mark.parametrize("text", ["{}", '{"b":1,"a":2}', '{"a": 1}', '{"a":1.0}'])
def test_text_that_is_not_canonical_makes_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"canonical|field"):
        EngineKey(text)


def test_other_processes_come_to_the_same_digest() -> None:
    fields = "{'backend': 'tensorrt', 'bucket': ((1, 320), (2, 320)), 'slots': 8, 'refit': False, 'note': 'é😀'}"
    script = f"from cinecat.engines.backends.store_key import EngineKey; print(EngineKey.of({fields}).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert digests == {EngineKey.of(eval(fields)).digest}
    # Engines outlive the version of Cinecat that built them: this changes only with a reason to build all anew.
    assert EngineKey.of({"backend": "tensorrt", "bucket": (2, 320), "slots": 8, "refit": False}).digest == (
        "38fba8ef6a7d7ce82a53bf9d65e02ccbd5a249be436dcc9129f44355b90ca36c"
    )
