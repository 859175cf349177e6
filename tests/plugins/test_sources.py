"""Styles of installed Python packages."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cinecat.plugins.registry import StyleRegistry
from cinecat.plugins.sources import GROUP, PackageSource
from tests.plugins.samples import write_style

EXAMPLE = Path(__file__).parent / "example_style_package"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python finds packages in, as pip fills it."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def pip_install(site: Path, name: str, package: Path, value: str = "") -> None:
    """Puts a package into `site` with the metadata that pip writes."""
    shutil.copytree(package, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = site / f"{name}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value or name}\n")


def pip_uninstall(site: Path, name: str) -> None:
    shutil.rmtree(site / name)
    shutil.rmtree(site / f"{name}-1.2.dist-info")


def test_the_example_package_is_found_by_its_entry_point_and_never_imported(site: Path) -> None:
    pip_install(site, "cinecat_grain", EXAMPLE)

    (style,) = StyleRegistry([PackageSource()]).styles()

    assert (style.manifest.name, style.place.origin) == ("grain", "package")
    assert style.place.provider == "cinecat_grain (cinecat_grain 1.2)"
    assert (style.manifest.sampler.steps, style.manifest.base_dims.dim) == (6, 256)
    assert style.folder == site / "cinecat_grain"
    assert "cinecat_grain" not in sys.modules


def test_a_package_may_hold_several_styles(site: Path, tmp_path: Path) -> None:
    write_style(tmp_path / "package" / "a", name="a")
    write_style(tmp_path / "package" / "b", name="b")
    pip_install(site, "two_styles", tmp_path / "package")

    assert [style.manifest.name for style in StyleRegistry([PackageSource()]).styles()] == ["a", "b"]


def test_an_entry_point_may_name_a_module(site: Path, tmp_path: Path) -> None:
    write_style(tmp_path / "package", name="a")
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "look.py").write_text("raise AssertionError")
    pip_install(site, "a_module", tmp_path / "package", "a_module.look:STYLE")

    assert [style.manifest.name for style in StyleRegistry([PackageSource()]).styles()] == ["a"]


def test_packages_come_and_go_without_a_restart(site: Path) -> None:
    registry = StyleRegistry([PackageSource()])
    assert registry.styles() == ()

    pip_install(site, "cinecat_grain", EXAMPLE)
    assert [style.manifest.name for style in registry.styles()] == ["grain"]

    pip_uninstall(site, "cinecat_grain")
    assert (registry.styles(), registry.problems()) == ((), ())


def _problem(value: str) -> str:
    source = PackageSource(lambda: [EntryPoint("broken", value, GROUP)])
    (problem,) = StyleRegistry([source]).problems()
    assert problem.folder == Path("broken")
    return problem.reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a_package_that_is_not_there", "there is no package 'a_package_that_is_not_there'; install the distribution"),
        ("a_package.that_is_not_there", "'a_package.that_is_not_there' cannot be found: ModuleNotFoundError"),
        ("sys", "'sys' lies in no folder; name a package that does"),
        ("email", "there is no style.toml in"),
    ],
)
def test_a_broken_package_is_a_problem_and_hides_nothing(value: str, reason: str) -> None:
    assert reason in _problem(value)


def test_a_package_that_fails_on_the_way_to_its_styles_is_a_problem(site: Path) -> None:
    (site / "failing").mkdir()
    (site / "failing" / "__init__.py").write_text("raise RuntimeError('not on this machine')")

    assert "RuntimeError: not on this machine" in _problem("failing.styles")


def test_metadata_that_cannot_be_read_is_a_problem() -> None:
    def unreadable() -> list[EntryPoint]:
        raise ValueError("no group")

    (problem,) = StyleRegistry([PackageSource(unreadable)]).problems()

    assert problem.reason == "the installed packages cannot be read: ValueError: no group"


def test_a_style_in_a_package_that_is_wrong_is_a_problem(site: Path, tmp_path: Path) -> None:
    pip_install(site, "wrong", write_style(tmp_path / "package", version="one"))

    (problem,) = StyleRegistry([PackageSource()]).problems()

    assert problem.folder == site / "wrong"
    assert "version is 'one'" in problem.reason
