"""What is left of a device's memory, and style slots that would take more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cinecat.engines import memory
from cinecat.engines.errors import ModelError
from cinecat.engines.messages import SlotMemory

CPU = torch.device("cpu")
SLOTS = SlotMemory("cpu", style_slots=8, max_rank=32, size_bytes=3 * 2**30, available_bytes=2**30)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose kernel can free 4 MiB, without a container."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  8192 kB\nMemFree:  1024 kB\nMemAvailable:  4096 kB\nHugePages: 0\n")
    return tmp_path


def limit(folder: Path, limit: str) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{2**21}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {2**20}\n")


def test_the_page_cache_counts_as_available(host: Path) -> None:
    assert memory.available_bytes(CPU) == 2**22


def test_a_containers_limit_counts_where_it_is_lower(host: Path) -> None:
    limit(host, "max")
    assert memory.available_bytes(CPU) == 2**22
    limit(host, f"{2**22}")
    assert memory.available_bytes(CPU) == 2**22 - 2**21 + 2**20
    limit(host, f"{2**40}")
    assert memory.available_bytes(CPU) == 2**22


def test_without_procfs_free_pages_are_what_there_is(host: Path) -> None:
    (host / "meminfo").unlink()
    available = memory.available_bytes(CPU)
    assert available is not None
    assert available > 0


def test_slots_that_take_more_than_there_is_are_refused_by_the_settings() -> None:
    with pytest.raises(
        ModelError,
        match=r"^style_slots, max_rank: 8 slots of rank 32 take 3\.00 GiB of memory, cpu has 1\.00 GiB left; lower one",
    ):
        memory.check_slots_fit(SLOTS)


@pytest.mark.parametrize("available", [3 * 2**30, None])
def test_slots_that_fit_or_cannot_be_judged_are_taken(available: int | None) -> None:
    memory.check_slots_fit(replace(SLOTS, available_bytes=available))
