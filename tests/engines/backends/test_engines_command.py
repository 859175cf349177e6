"""`cinecat engines` as the command line runs it."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from cinecat.cli import extensions
from cinecat.cli.app import run
from cinecat.engines.backends.store import EngineStore
from tests.engines.backends.builds import KEY, key, write_engine

Captured = pytest.CaptureFixture[str]
ENGINE_BYTES = 6 + 256 * 64


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "cinecat.engines.backends.commands:app"
    monkeypatch.setattr(extensions, "installed", lambda: {"engines": EntryPoint("engines", target, extensions.GROUP)})
    for name in ("CINECAT_ENGINE_CACHE_DIR", "CINECAT_ENGINE_CACHE_GIB"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store of two engines."""
    folder = tmp_path / "engines"
    store = EngineStore(folder, None)
    for number in range(2):
        store.build(key(number), write_engine)
    store.close()
    return folder


def engines(*arguments: object) -> int:
    return run(["engines", *map(str, arguments)])


def parsed(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def flip(root: Path) -> None:
    path = root / key(1).digest / "engine" / "weights" / "0.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def test_list_shows_a_line_for_each_engine(root: Path, capsys: Captured) -> None:
    assert engines("list", "--engine-cache-dir", root) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["ENGINE", "SIZE"]
    assert len(lines) == 2
    assert all("backend=tensorrt bucket=(2, 320)" in line and " ok " in line for line in lines)


def test_list_tells_scripts_all_of_it(root: Path, capsys: Captured) -> None:
    assert engines("list", "--engine-cache-dir", root, "--json") == 0
    found = parsed(capsys)
    assert found["engine_cache_dir"] == str(root)
    engine = next(engine for engine in found["engines"] if engine["digest"] == key(1).digest)
    assert engine["key"] == {**KEY.fields, "bucket": [2, 320], "number": 1}
    assert (engine["size_bytes"], engine["problems"]) == (ENGINE_BYTES, [])
    assert Path(engine["path"], "plan.engine").is_file()
    assert engine["build_seconds"] > 0


def test_verify_ends_with_1_when_an_engine_is_damaged(root: Path, capsys: Captured) -> None:
    assert engines("verify", "--engine-cache-dir", root) == 0
    assert capsys.readouterr().out == f"{root}: engines: 2, damaged: 0\n"
    flip(root)
    assert engines("verify", "--engine-cache-dir", root) == 1
    printed = capsys.readouterr()
    assert f"{key(1).digest[:12]}: weights/0.bin is damaged" in printed.out
    assert "cinecat engines prune" in printed.err
    assert engines("verify", "--engine-cache-dir", root, "--json") == 1
    found = parsed(capsys)
    assert found["damaged"] == 1
    assert {engine["digest"]: len(engine["problems"]) for engine in found["engines"]} == {
        key(0).digest: 0,
        key(1).digest: 1,
    }


def test_prune_removes_what_verify_found_and_nothing_else(root: Path, capsys: Captured) -> None:
    flip(root)
    assert engines("verify", "--engine-cache-dir", root) == 1
    capsys.readouterr()
    assert engines("prune", "--engine-cache-dir", root, "--json") == 0
    assert parsed(capsys) == {
        "engine_cache_dir": str(root),
        "removed": [key(1).digest],
        "in_use": [],
        "freed_bytes": ENGINE_BYTES,
        "kept_bytes": ENGINE_BYTES,
    }


def test_prune_leaves_what_is_in_use_and_says_so(root: Path, capsys: Captured) -> None:
    store = EngineStore(root, None)
    store.get(key(0))
    assert engines("prune", "--engine-cache-dir", root, "--engine-cache-gib", 0) == 1
    printed = capsys.readouterr()
    assert "engines removed: 1" in printed.out
    assert f"{key(0).digest[:12]} is in use" in printed.err
    store.close()
    assert engines("prune", "--engine-cache-dir", root, "--engine-cache-gib", 0) == 0


def test_the_folder_comes_from_the_servers_variable_or_the_cache(
    root: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "nothing"))
    assert engines("list", "--json") == 0
    assert parsed(capsys) == {
        "engine_cache_dir": str(root.parent / "nothing" / "cinecat" / "engines"),
        "engines": [],
    }
    monkeypatch.setenv("CINECAT_ENGINE_CACHE_DIR", str(root))
    assert engines("list", "--json") == 0
    assert len(parsed(capsys)["engines"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list", "--engine-cache-dir", "/no/such/folder"], "--engine-cache-dir: /no/such/folder is not a folder"),
        (["verify", "--engine-cache-dir", __file__], "is not a folder"),
        (["prune", "--engine-cache-gib", "-1"], "--engine-cache-gib"),
        (["prune", "--engine-cache-gib", "nan"], "--engine-cache-gib"),
        (["verfy"], "verfy"),
        ([], "cinecat engines --help"),
    ],
)
def test_wrong_arguments_end_with_2_and_are_named(arguments: list[str], told: str, capsys: Captured) -> None:
    assert engines(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err


def test_a_folder_that_cannot_be_read_is_an_error_for_people_and_for_scripts(
    root: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("cinecat.engines.backends.store.inspect_entry", refuse)
    for command in ("list", "verify", "prune"):
        assert engines(command, "--engine-cache-dir", root, "--json") == 1
        assert "engine_cache_dir" in parsed(capsys)["error"]["message"]


def test_the_help_lists_the_commands(capsys: Captured) -> None:
    assert engines("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("list", "verify", "prune"))


def test_the_help_of_cinecat_says_what_engines_does(capsys: Captured) -> None:
    assert run(["--help"]) == 0
    assert "prune the compiled engines" in " ".join(capsys.readouterr().out.split())
