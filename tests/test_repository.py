"""The tree: what is packaged, who may import whom, and what the documents say about it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Where each room is imported from, as the design says.
ROOMS = {"protos/cinecat": "cinecat", "server": "cinecat.server", "engines": "cinecat.engines"} | {
    "plugins": "cinecat.plugins",
    "tests": "tests",
}

# What a room must not import.
FORBIDDEN = {
    "protos/cinecat": ("cinecat.server", "cinecat.engines", "cinecat.plugins", "tests"),
    "plugins": ("cinecat.server", "cinecat.engines", "tests"),
    "engines": ("cinecat.server", "tests"),
    "server": ("tests",),
}

# These load torch, which costs seconds and gigabytes.
TORCH = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors.torch")
WITHOUT_TORCH = ("protos/cinecat", "plugins", "server")

# Spelled so that this file does not match.
ADDRESSES = re.compile(
    rb"\b(pypi|pythonhosted|npmjs|anaconda|docker|quay|ghcr|nvcr|pypi\.nvidia|huggingface|hf-mirror|download\.pytorch)"
    rb"\.(org|com|io|co)\b"
)
MACHINE_PATHS = re.compile(rb"(?<![\w.~$}-])/(home|Users|root|work|tmp|mnt)/\w")


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def name_of(path: Path, room: str) -> str:
    """The name under which a module of a room is imported."""
    parts = path.relative_to(ROOT / room).with_suffix("").parts
    return ".".join((ROOMS[room], *(part for part in parts if part != "__init__")))


def runs_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what is below it, but for bodies of functions and of `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        hidden = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        )
        if not hidden:
            yield from runs_on_import(child)


def imported(nodes: Iterator[ast.AST], package: str) -> Iterator[str]:
    """Every name that import statements bring in: of `from a import b`, both a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path, room: str, *, on_import_only: bool = False) -> set[str]:
    name = name_of(path, room)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    return set(imported(runs_on_import(tree) if on_import_only else ast.walk(tree), package))


def among(names: set[str], roots: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if any(f"{name}.".startswith(f"{root}.") for root in roots))


def files() -> list[Path]:
    """Every file that git has, or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def packaged_folder(name: str) -> str:
    """Where setuptools looks for a package: below the longest name that package-dir has."""
    folders = SETUPTOOLS["package-dir"]
    base = max((known for known in folders if f"{name}.".startswith(f"{known}.")), key=len)
    return "/".join((folders[base], *name.removeprefix(base).split(".")[1:]))


def test_every_package_is_listed_under_its_import_name() -> None:
    found = {
        name_of(path, room): path.parent.relative_to(ROOT).as_posix()
        for room in FORBIDDEN
        for path in modules(room)
        if path.name == "__init__.py"
    }
    assert {name: packaged_folder(name) for name in SETUPTOOLS["packages"]} == found


@pytest.mark.parametrize("room", ROOMS)
def test_every_folder_with_modules_is_a_package(room: str) -> None:
    assert {path.parent for path in modules(room)} == {p.parent for p in modules(room) if p.name == "__init__.py"}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_dependencies_point_one_way(room: str) -> None:
    assert {
        path.relative_to(ROOT).as_posix(): wrong
        for path in modules(room)
        if (wrong := among(imports_of(path, room), FORBIDDEN[room]))
    } == {}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_torch_is_imported_with_a_module_only_in_the_engine_room(room: str) -> None:
    assert {
        path.relative_to(ROOT).as_posix(): wrong
        for path in modules(room)
        if (wrong := among(imports_of(path, room, on_import_only=True), TORCH))
    } == {}


def test_the_front_loads_no_torch() -> None:
    front = "import sys, cinecat.server.commands, cinecat.server.app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", front], stdout=subprocess.PIPE, check=True).stdout == b"False\n"


@pytest.mark.parametrize("pattern", [ADDRESSES, MACHINE_PATHS], ids=["registry hosts", "paths of a machine"])
def test_no_file_depends_on_where_it_was_written(pattern: re.Pattern[bytes]) -> None:
    found = [
        (path.relative_to(ROOT).as_posix(), data[: match.start()].count(b"\n") + 1, match[0])
        for path in files()
        for data in (path.read_bytes(),)
        for match in pattern.finditer(data)
    ]
    assert found == []


def test_the_map_names_every_module_and_no_other() -> None:
    named: dict[str, list[str]] = {}
    folder = ""
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if heading := re.match(r"#+ `([\w/.]+)/`", line):
            folder = heading[1]
        elif entry := re.match(r"- `([\w.]+\.(?:py|proto))`: \S", line):
            named.setdefault(folder, []).append(entry[1])
    there: dict[str, list[str]] = {}
    for room in FORBIDDEN:
        for path in sorted([*modules(room), *(ROOT / room).rglob("*.proto")]):
            if path.name != "__init__.py" and "_pb2" not in path.name:
                there.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path.name)
    assert {folder: sorted(names) for folder, names in named.items()} == there


def test_the_map_names_every_top_level_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.relative_to(ROOT).parts[0] for path in files() if path.parent != ROOT}
    assert {folder for folder in folders if f"`{folder}/`" not in text} == set()


def test_the_links_between_the_documents_lead_somewhere() -> None:
    broken = [
        f"{path.name}: {target}"
        for path in files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
        if not (path.parent / target).exists()
    ]
    assert broken == []
