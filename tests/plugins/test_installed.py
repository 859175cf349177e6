"""What is uploaded becomes a whole style or nothing."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cinecat.plugins.errors import LoraError
from cinecat.plugins.finite import check_finite
from cinecat.plugins.installed import InstalledStyles, StagedStyle, UploadError, VersionTaken
from cinecat.plugins.manifest import MAX_PREVIEW_BYTES, StyleManifest
from cinecat.plugins.registry import StyleRegistry
from tests.plugins.samples import MANIFEST, write_lora

DESCRIPTION = StyleManifest(**MANIFEST)
MAX_BYTES = 10_000


@pytest.fixture
def installed(tmp_path: Path) -> InstalledStyles:
    return InstalledStyles(tmp_path / "styles")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_lora(tmp_path_factory.mktemp("lora") / "sepia.safetensors").read_bytes()


def send(staged: StagedStyle, data: bytes, chunk: int) -> None:
    for start in range(0, len(data), chunk):
        staged.write_weights(data[start : start + chunk])


def install(installed: InstalledStyles, data: bytes, manifest: StyleManifest = DESCRIPTION, chunk: int = 700) -> Path:
    with installed.begin(MAX_BYTES) as staged:
        send(staged, data, chunk)
        staged.check(manifest)
        return staged.publish(manifest)


def on_disk(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "styles").iterdir())


def test_what_is_published_is_offered_with_its_checksum(
    tmp_path: Path, installed: InstalledStyles, weights: bytes
) -> None:
    folder = install(installed, weights)

    (style,) = StyleRegistry([installed.source]).styles()
    assert (style.folder, style.place.origin) == (folder, "installed")
    assert style.manifest == replace(DESCRIPTION, sha256=style.fingerprint)
    assert style.weights_path.read_bytes() == weights
    assert on_disk(tmp_path) == ["sepia@1.0.0"]


def test_nothing_is_offered_before_it_is_published(installed: InstalledStyles, weights: bytes) -> None:
    registry = StyleRegistry([installed.source])
    with installed.begin(MAX_BYTES) as staged:
        staged.write_weights(weights)
        staged.check(DESCRIPTION)
        assert (registry.styles(), registry.problems()) == ((), ())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_leaves_nothing_or_a_whole_style(
    tmp_path: Path, installed: InstalledStyles, weights: bytes, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(weights)))
    end = data.draw(st.integers(start, len(weights)))
    damaged = weights[:start] + data.draw(st.binary(max_size=16)) + weights[end:]

    try:
        folder = install(installed, damaged, chunk=data.draw(st.integers(1, 3000)))
    except UploadError as error:
        assert error.part == "weights"  # noqa: PT017
        assert on_disk(tmp_path) == []
    else:
        assert [style.folder for style in StyleRegistry([installed.source]).styles()] == [folder]
        installed.remove(folder)


def test_a_version_is_never_written_over(tmp_path: Path, installed: InstalledStyles, weights: bytes) -> None:
    folder = install(installed, weights)
    before = (folder / "style.toml").read_text()

    with pytest.raises(VersionTaken, match=r"sepia 1\.0\.0 is installed"):
        install(installed, weights, replace(DESCRIPTION, title="Another"))

    assert (folder / "style.toml").read_text() == before
    assert on_disk(tmp_path) == ["sepia@1.0.0"]


def test_weights_above_the_limit_are_refused_as_they_arrive(installed: InstalledStyles, weights: bytes) -> None:
    with installed.begin(500) as staged, pytest.raises(UploadError, match="has more than 500 bytes"):
        send(staged, weights, 100)
    assert staged.size_bytes == 600


@pytest.mark.parametrize("chunk", [1, 8, 9, 100])
def test_what_cannot_become_weights_is_refused_by_its_first_bytes(installed: InstalledStyles, chunk: int) -> None:
    data = struct.pack("<Q", 2**60) + b"{" + bytes(91)
    with installed.begin(MAX_BYTES) as staged, pytest.raises(UploadError, match=f"header claims {2**60} bytes"):
        send(staged, data, chunk)
    assert staged.size_bytes < 9 + chunk


def test_a_preview_above_the_limit_is_refused(installed: InstalledStyles) -> None:
    with installed.begin(MAX_BYTES) as staged, pytest.raises(UploadError, match="preview: has more than"):
        staged.write_preview(bytes(MAX_PREVIEW_BYTES + 1))


def test_a_removed_style_is_gone_at_once(tmp_path: Path, installed: InstalledStyles, weights: bytes) -> None:
    registry = StyleRegistry([installed.source])
    folder = install(installed, weights)
    assert registry.find("sepia").folder == folder == installed.folder("sepia", "1.0.0")

    installed.remove(folder)

    assert (registry.styles(), on_disk(tmp_path)) == ((), [])
    assert installed.folder("sepia", "1.0.0") is None
    with pytest.raises(FileNotFoundError):
        installed.remove(folder)


def test_what_a_killed_server_left_is_cleared_and_styles_stay(
    tmp_path: Path, installed: InstalledStyles, weights: bytes
) -> None:
    install(installed, weights)
    for name in (".incoming-0", ".removed-0"):
        (tmp_path / "styles" / name).mkdir()
        (tmp_path / "styles" / name / "weights").write_bytes(b"half")

    InstalledStyles(tmp_path / "styles").clear_leftovers()

    assert on_disk(tmp_path) == ["sepia@1.0.0"]


_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: float
) -> None:
    monkeypatch.setattr("cinecat.plugins.finite._CHUNK_BYTES", 16)
    tensor = torch.ones(5, 7, dtype=dtype)
    save_file({"fine": tensor}, tmp_path / "fine.safetensors")
    check_finite(tmp_path / "fine.safetensors")

    for index in (0, 17, 34):
        broken = tensor.clone()
        broken.view(-1)[index] = value
        save_file({"broken": broken, "fine": tensor}, tmp_path / "broken.safetensors")
        with pytest.raises(LoraError, match=r"broken\.safetensors: 'broken' holds NaN, infinity or values"):
            check_finite(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("dtype", _DTYPES)
def test_the_largest_and_smallest_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    largest = min(limits.max, 2.0**39)
    numbers = torch.tensor([largest, -largest, limits.tiny, limits.smallest_normal / 2, -0.0], dtype=dtype)
    save_file({"numbers": numbers}, tmp_path / "numbers.safetensors")

    check_finite(tmp_path / "numbers.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_whose_products_would_overflow_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"wild": torch.tensor([0.5, -(2.0**40)], dtype=dtype)}, tmp_path / "wild.safetensors")

    with pytest.raises(LoraError, match=r"'wild' holds NaN, infinity or values beyond 2\^40"):
        check_finite(tmp_path / "wild.safetensors")


def test_numbers_that_are_no_floats_are_left_alone(tmp_path: Path) -> None:
    save_file({"steps": torch.tensor([-1, 2**31 - 1], dtype=torch.int32)}, tmp_path / "steps.safetensors")

    check_finite(tmp_path / "steps.safetensors")
