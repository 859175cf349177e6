"""`cinecat doctor`: its exit code says whether serve would work, and its findings why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from cinecat.engines import doctor as engines_doctor
from cinecat.engines import memory
from cinecat.server.doctor import doctor

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without a GPU is told")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("CINECAT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CINECAT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, arguments)


def findings(*arguments: str) -> dict[str, Any]:
    result = run("--json", *arguments)
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if found["serves"] else 1)
    return found


def test_wan_tiny_would_be_served_here() -> None:
    found = findings()
    assert found["serves"]
    assert found["problems"] == []
    assert found["memory"]["needed"] < found["available_bytes"]
    assert found["backends"].keys() == {"torch", "inductor", "onnxruntime", "tensorrt", "torch_tensorrt"}
    assert found["backends"]["torch"] is None
    assert found["machine"]["memory_bytes"] >= found["machine"]["available_bytes"] > 0


def test_people_read_what_scripts_read() -> None:
    result = run()
    assert result.exit_code == 0
    for word in ("MACHINE", "BACKEND", "inductor", "text encoder", "at the peak", "serve would work"):
        assert word in result.stdout


def test_a_model_larger_than_the_memory_would_not_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory, engines_doctor):
        monkeypatch.setattr(module, "available_bytes", lambda device: 24 * 2**30)
    found = findings("--model", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "--dtype", "bfloat16")
    assert not found["serves"]
    (problem,) = found["problems"]
    assert "has 24.00 GiB left; lower style_slots or max_rank, free memory, choose a larger device" in problem
    assert found["memory"]["weights"] == pytest.approx(47.2e9, rel=0.01)
    assert "is not on this machine yet" in found["notes"][0]


def test_float8_storage_takes_less_and_is_refused_for_other_engines() -> None:
    wide, narrow = (findings("--storage-dtype", dtype)["memory"]["transformer"] for dtype in ("none", "float8_e4m3fn"))
    assert narrow < 0.7 * wide
    assert (
        "storage_dtype, engine: " in findings("--engine", "inductor", "--storage-dtype", "float8_e4m3fn")["problems"][0]
    )


def test_a_cpu_has_nowhere_to_offload_to() -> None:
    assert findings("--device", "cpu", "--offload", "blocks")["memory"] == findings("--device", "cpu")["memory"]


def test_more_slots_take_more_memory() -> None:
    few, many = (findings("--style-slots", slots)["memory"]["style_banks"] for slots in ("1", "9"))
    assert many == 5 * few


def test_a_model_of_unknown_size_names_the_download() -> None:
    found = findings("--model", "somebody/some-model")
    assert "hf download somebody/some-model" in found["problems"][0]


def test_an_incomplete_folder_is_a_problem(tmp_path: Path) -> None:
    assert "is not a complete Wan2.1 I2V checkpoint" in findings("--model", str(tmp_path))["problems"][0]


@NO_GPU
def test_a_gpu_that_is_not_there_is_a_problem() -> None:
    assert "'cuda' is not there" in findings("--device", "cuda")["problems"][0]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else False, reason="root may write everywhere")
def test_a_data_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in findings()["problems"][0]


def test_a_data_folder_below_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert (
        "cannot be written; choose another folder"
        in findings("--data-dir", str(tmp_path / "file" / "x"))["problems"][0]
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--width", "100"), "size: 100x128"),
        (("--frames", "16"), "frames: 16"),
        (("--guidance-rows", "3"), "guidance-rows: 3"),
        (("--style-slots", "0"), "--style-slots"),
        (("--dtype", "int8"), "--dtype"),
    ],
)
def test_wrong_arguments_are_told_with_exit_code_2(arguments: tuple[str, ...], word: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert word in result.stderr


def test_a_missing_compiler_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "apt-get install g++" in findings("--device", "cpu")["backends"]["inductor"]


@NO_GPU
@pytest.mark.parametrize("backend", ["tensorrt", "torch_tensorrt"])
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    assert findings()["backends"][backend].startswith(f"{backend}: ")


@NO_GPU
def test_an_engine_that_was_chosen_and_cannot_run_is_a_problem() -> None:
    found = findings("--engine", "tensorrt")
    assert found["problems"] == [f"engine: {found['backends']['tensorrt']}"]


def test_ranks_that_cannot_share_the_work_are_a_problem() -> None:
    found = findings("--shard", "ulysses=3", "--device", "cpu")
    assert found["problems"] == ["shard: ulysses=3 does not divide the model's 4 heads; 1, 2, 4 do"]
    found = findings("--shard", "ring=2", "--device", "cpu", "--engine", "onnxruntime")
    assert "shard, engine" in found["problems"][0]
    found = findings("--shard", "ulysses=2,cfg=2", "--device", "cpu")
    assert found["serves"]
    assert "4 ranks" in found["notes"][0]
