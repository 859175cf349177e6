from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinecat.plugins.errors import StyleError
from cinecat.plugins.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_PREVIEW_BYTES,
    BaseDims,
    ManifestError,
    SamplerDefaults,
    StyleManifest,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from tests.plugins.samples import MANIFEST, toml, write_style

_text = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=60)
_number = st.integers(0, 10**9 - 1)
_manifests = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True),
        "version": st.tuples(_number, _number, _number).map(lambda parts: ".".join(map(str, parts))),
        "title": _text.filter(bool),
        "base_model": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True),
        "weights": st.just(MANIFEST["weights"]),
    },
    optional={
        "description": _text,
        "sha256": st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        "trigger_words": st.lists(_text.filter(bool), max_size=5),
        "default_strength": st.floats(-4, 4) | st.integers(-4, 4),
        "license": _text,
        "author": _text,
        "prompt_template": _text.map("{{prompt}} {}".format),
    },
)
_steps = st.integers(1, 10_000)
_described = st.builds(
    StyleManifest,
    name=st.just("sepia"),
    version=st.just("1.0.0"),
    title=_text.filter(bool),
    base_model=st.just("wan2.1-i2v-tiny"),
    weights=st.just("sepia.safetensors"),
    description=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    trigger_words=st.lists(_text.filter(bool), max_size=3).map(tuple),
    prompt_template=st.sampled_from(["", "{prompt}, sepia", 'a "{prompt}" \\ {prompt}']),
    default_strength=st.floats(-4, 4),
    author=_text,
    preview=st.sampled_from(["", "sepia.webp"]),
    base_dims=st.builds(BaseDims, dim=st.none() | _steps, layers=st.none() | st.integers(1, 1000)),
    sampler=st.builds(
        SamplerDefaults, steps=st.none() | _steps, guidance_scale=st.none() | st.floats(0, 30), shift=st.just(3.0)
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_style(tmp_path_factory.mktemp("style"))


@given(table=_manifests)
@settings(deadline=None)
def test_every_allowed_manifest_is_read_as_written(folder: Path, table: dict[str, Any]) -> None:
    (folder / "style.toml").write_text(toml(table))

    manifest = read_manifest(folder)

    expected = {**table, "trigger_words": tuple(table.get("trigger_words", ()))}
    assert {key: getattr(manifest, key) for key in expected} == expected


@given(manifest=_described)
@settings(deadline=None)
def test_what_is_written_reads_as_it_was(manifest: StyleManifest) -> None:
    assert parse_manifest(write_manifest(manifest)) == manifest


@given(data=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_a_manifest_are_an_error_and_never_a_crash(folder: Path, data: bytes) -> None:
    (folder / "style.toml").write_bytes(data)

    with pytest.raises(StyleError, match=r"style\.toml: "):
        read_manifest(folder)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    manifest = read_manifest(write_style(tmp_path))

    assert (manifest.default_strength, manifest.trigger_words, manifest.sha256) == (1.0, (), "")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("name", None, "name is missing; it must be 1 to 64 lower-case letters"),
        ("name", "Film Noir", "name is 'Film Noir'; it must be 1 to 64 lower-case letters"),
        ("name", "-noir", "lower-case letters, digits and dashes, not starting with a dash"),
        ("name", "n" * 65, "1 to 64"),
        ("name", 7, "name is 7; it must be"),
        ("version", "1.0", "version is '1.0'; it must be three numbers"),
        ("version", "01.0.0", "three numbers"),
        ("version", 1.0, "version is 1.0; it must be three numbers as a string"),
        ("title", "", "one line of 1 to 80 characters"),
        ("title", "two\nlines", "one line"),
        ("base_model", "Wan 2.1", "a model family"),
        ("default_strength", 4.5, "default_strength is 4.5; it must be a number from -4 to 4"),
        ("default_strength", "1", "a number from -4 to 4"),
        ("default_strength", True, "a number from -4 to 4"),
        ("trigger_words", "noir", "trigger_words is 'noir'; it must be a list"),
        ("trigger_words", ["noir", 3], "a list of at most 32 strings"),
        ("trigger_words", ["noir", ""], "strings of 1 to 64 characters"),
        ("sha256", "abc", "64 hexadecimal digits"),
        ("weights", "../other/sepia.safetensors", "a .safetensors file in the style's own folder, without a path"),
        ("weights", "/etc/sepia.safetensors", "without a path"),
        ("weights", "..\\sepia.safetensors", "without a path"),
        ("weights", "sepia.bin", "a .safetensors file"),
        ("weights", "absent.safetensors", "weights: there is no file 'absent.safetensors' in the folder"),
        ("prompt_template", "sepia", "one line of at most 1000 characters that holds {prompt}"),
        ("prompt_template", "{prompt}\nsepia", "one line"),
        ("preview", "../sepia.png", "without a path"),
        ("preview", "/etc/sepia.png", "without a path"),
        ("preview", ".sepia.png", "a .png, .jpg"),
        ("preview", "sepia.svg", "a .png, .jpg"),
        ("preview", "absent.png", "preview: there is no file 'absent.png' in the folder"),
        ("sampler", 4, "sampler is 4; it must be a table with steps, guidance_scale and shift"),
        ("base_dims", [5120], "base_dims is [5120]; it must be a table with dim, ffn_dim and layers"),
        ("strenght", 1.0, "'strenght' is not a key"),
        ("defualt_strength", 1.0, "'defualt_strength' is not a key; did you mean default_strength"),
    ],
)
def test_a_wrong_key_is_named_with_what_it_allows(tmp_path: Path, key: str, value: object, allowed: str) -> None:
    write_style(tmp_path, **{key: value})

    with pytest.raises(StyleError) as caught:
        read_manifest(tmp_path)

    assert key in f"{caught.value}"
    assert allowed in f"{caught.value}"


@pytest.mark.parametrize(
    ("lines", "key", "problem"),
    [
        ("[sampler]\nsteps = 0", "sampler.steps", "is 0; it must be a whole number from 1 to 10000"),
        ("[sampler]\nsteps = 4.0", "sampler.steps", "is 4.0; it must be a whole number"),
        ("[sampler]\nguidance_scale = 31", "sampler.guidance_scale", "a number from 0 to 30"),
        ("[sampler]\nguidance_scale = nan", "sampler.guidance_scale", "a number from 0 to 30"),
        ("[sampler]\nshift = 0", "sampler.shift", "a number from 0.01 to 100"),
        ("[sampler]\nshift = inf", "sampler.shift", "a number from 0.01 to 100"),
        ("[sampler]\nstep = 4", "'sampler.step'", "is not a key; did you mean steps?"),
        ("[base_dims]\ndim = -1", "base_dims.dim", "is -1; it must be a whole number from 1"),
        ("[base_dims]\nheads = 40", "'base_dims.heads'", "is not a key; the keys are dim, ffn_dim, layers"),
        ("x = 1" + "0" * 5000, "", "is not valid TOML"),
    ],
)
def test_a_wrong_key_of_a_table_is_named(lines: str, key: str, problem: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(f"{toml(MANIFEST)}{lines}\n")

    assert caught.value.key == key
    assert problem in caught.value.problem


def test_a_preview_lies_in_the_folder_and_is_small(tmp_path: Path) -> None:
    folder = write_style(tmp_path / "sepia", preview="sepia.png")
    (folder / "sepia.png").write_bytes(bytes(MAX_PREVIEW_BYTES))
    assert read_manifest(folder).preview == "sepia.png"

    (folder / "sepia.png").write_bytes(bytes(MAX_PREVIEW_BYTES + 1))
    with pytest.raises(StyleError, match=f"preview has more than {MAX_PREVIEW_BYTES} bytes"):
        read_manifest(folder)

    (folder / "sepia.png").rename(tmp_path / "sepia.png")
    (folder / "sepia.png").symlink_to(tmp_path / "sepia.png")
    with pytest.raises(StyleError, match=r"preview: 'sepia\.png' is a link out of the style's folder"):
        read_manifest(folder)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_strength_that_is_not_finite_is_refused(tmp_path: Path, number: str) -> None:
    write_style(tmp_path)
    (tmp_path / "style.toml").write_text(f"{toml(MANIFEST)}default_strength = {number}\n")

    with pytest.raises(StyleError, match=r"default_strength is .*a number from -4 to 4"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["style.toml", "sepia.safetensors"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_style(tmp_path / "sepia")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)

    with pytest.raises(StyleError, match=f"'{name}' is a link out of the style's folder"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["style.toml", "sepia.safetensors"])
def test_a_link_to_itself_is_refused(tmp_path: Path, name: str) -> None:
    write_style(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)

    with pytest.raises(StyleError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["style.toml", "sepia.safetensors"])
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path, name: str) -> None:
    write_style(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)

    with pytest.raises(StyleError, match="is not a regular file"):
        read_manifest(tmp_path)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    write_style(tmp_path)
    (tmp_path / "sepia.safetensors").rename(tmp_path / "v1.safetensors")
    (tmp_path / "sepia.safetensors").symlink_to("v1.safetensors")

    assert read_manifest(tmp_path).weights == "sepia.safetensors"


def test_an_endless_manifest_is_refused(tmp_path: Path) -> None:
    write_style(tmp_path)
    (tmp_path / "style.toml").write_text("#" * (MAX_MANIFEST_BYTES + 1))

    with pytest.raises(StyleError, match=f"more than {MAX_MANIFEST_BYTES} bytes"):
        read_manifest(tmp_path)


def test_deeply_nested_toml_is_refused(tmp_path: Path) -> None:
    write_style(tmp_path)
    (tmp_path / "style.toml").write_text("name = " + "[" * 20_000)

    with pytest.raises(StyleError, match="not valid TOML"):
        read_manifest(tmp_path)
