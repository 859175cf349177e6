"""The example package of docs/adapter-formats.md, installed by pip as a user would install it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats import IgnoredKey
from cinecat.plugins.formats.registry import ENTRY_POINT_GROUP, installed_formats
from cinecat.plugins.lora import inspect_lora, load_lora
from tests.plugins.formats.layouts import write_tensors

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "tests" / "plugins" / "example_format"

A, B = torch.ones(2, 6), torch.ones(8, 2)
FILE = {"loom/7/text/query/warp": A, "loom/7/text/query/weft": B, "loom/optimizer/step": torch.tensor(900)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the example into."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source")  # a build writes beside the sources
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", folder / "site", source], check=True)
    return folder / "site"


@pytest.fixture(autouse=True)
def _installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    installed_formats.cache_clear()
    yield
    installed_formats.cache_clear()
    sys.modules.pop("loom_lora", None)


def test_the_package_declares_its_format(site: Path) -> None:
    (found,) = distributions(path=[str(site)])

    assert [(each.name, each.value) for each in found.entry_points.select(group=ENTRY_POINT_GROUP)] == [
        ("loom", "loom_lora:FORMAT")
    ]


def test_a_file_is_read_once_the_package_is_installed(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "film.safetensors", FILE, {"loom_gain": "0.25"})

    header = inspect_lora(path)
    (a, b) = load_lora(path)["blocks.7.attn2.to_q"]

    assert (header.format, list(header.targets)) == ("loom", ["blocks.7.attn2.to_q"])
    assert header.ignored == (IgnoredKey("loom/optimizer/step", "is the optimizer's"),)
    torch.testing.assert_close(b @ a, 0.25 * B @ A)


def test_the_checks_of_every_format_hold_for_it_too(tmp_path: Path) -> None:
    nan = FILE | {"loom/7/text/query/weft": B * float("nan")}
    stray = FILE | {"loom/7/text/query/woof": B}

    with pytest.raises(LoraError, match="'loom/7/text/query/weft' holds NaN"):
        load_lora(write_tensors(tmp_path / "nan.safetensors", nan))
    with pytest.raises(LoraError, match="the format loom says nothing of 'loom/7/text/query/woof'"):
        load_lora(write_tensors(tmp_path / "stray.safetensors", stray))


def test_its_own_refusals_reach_the_user(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"film\.safetensors: its loom_gain is not a number; export it again"):
        inspect_lora(write_tensors(tmp_path / "film.safetensors", FILE, {"loom_gain": "much"}))


@pytest.mark.parametrize("name", ["pyproject.toml", "loom_lora/__init__.py"])
def test_the_tutorial_shows_the_package_as_it_is(name: str) -> None:
    assert (EXAMPLE / name).read_text() in (ROOT / "docs" / "adapter-formats.md").read_text()
