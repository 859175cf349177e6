"""What importing the client loads."""

import subprocess
import sys
from importlib import import_module

import pytest

import cinecat

HEAVY = {"torch", "numpy", "typer", "rich", "click", "grpc_status", "diffusers", "PIL"}


def loaded_by(statement: str) -> set[str]:
    command = [sys.executable, "-X", "importtime", "-c", statement]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in report.splitlines()}


def test_importing_cinecat_loads_nothing_heavy() -> None:
    loaded = loaded_by("import cinecat")
    assert "cinecat" in loaded
    assert not loaded & (HEAVY | {"grpc"})


def test_the_clients_need_only_grpc_and_protobuf() -> None:
    loaded = loaded_by("from cinecat import *; Client; AsyncClient")
    assert {"cinecat", "grpc", "google"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", cinecat.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(cinecat, name).__name__ == name


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Clint"):
        _ = cinecat.Clint  # type: ignore[attr-defined]


def test_the_stubs_import_without_the_client() -> None:
    assert import_module("cinecat.v1.generation_pb2").GenerateRequest().request_id == ""
