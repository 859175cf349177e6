"""What a studio's Python gets from the bare package: the client, and plain words about what is not installed."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a venv that holds the package without extras."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    subprocess.run(
        [folder / "bin" / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", ROOT], check=True
    )
    return folder / "bin"


def run(command: list[object]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_bare_client_imports_without_torch(bare: Path) -> None:
    script = "import sys; from cinecat import Client; Client('127.0.0.1:1'); print('torch' in sys.modules)"
    assert run([bare / "python", "-c", script]).stdout == "False\n"
    assert "torch" not in run([bare / "pip", "list"]).stdout


@pytest.mark.slow
def test_a_command_whose_extra_is_missing_names_it(bare: Path) -> None:
    without_cli = run([bare / "cinecat", "styles"])
    assert (without_cli.returncode, without_cli.stdout) == (2, "")
    assert "pip install 'cinecat[cli]'" in without_cli.stderr
    subprocess.run([bare / "pip", "install", "--quiet", "typer", "rich"], check=True)
    without_serve = run([bare / "cinecat", "serve"])
    assert without_serve.returncode == 2
    assert "pip install 'cinecat[serve]'" in without_serve.stderr
