"""How much memory a device has left, and what the style slots take of it."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import torch

from cinecat.engines.errors import ModelError
from cinecat.engines.messages import CoreConfig, CoreMemory, SlotMemory
from cinecat.engines.model import WanModel
from cinecat.engines.slots import bank_bytes

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """What can still be taken on a device: what its driver has free and torch holds unused, or, for the CPU, what the
    kernel can free without swapping, within the limit of a container. None where that cannot be told.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [size for size in (_host_bytes(), _container_bytes()) if size is not None]
    return min(known, default=None)


def core_memory(device: torch.device) -> CoreMemory:
    """What this process and its device hold now. It asks driver and kernel, so once a stage and not in every step."""
    resident, peak = _process_bytes()
    available = available_bytes(device) or 0
    if device.type != "cuda":
        return CoreMemory(resident, resident, peak, available)
    allocated, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return CoreMemory(resident, allocated, most, available)


def _process_bytes() -> tuple[int, int]:
    """Resident now, and at most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        resident = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        resident = 0
    return resident, max(peak, resident)


def slot_memory(model: WanModel, config: CoreConfig) -> SlotMemory:
    """What the slots that are set would take, and what there is."""
    return SlotMemory(
        device=str(model.device),
        style_slots=config.style_slots,
        max_rank=config.max_rank,
        size_bytes=bank_bytes(model.transformer.blocks, config.style_slots, config.max_rank, model.dtype),
        available_bytes=available_bytes(model.device),
    )


def check_slots_fit(memory: SlotMemory) -> None:
    """Raises ModelError, naming the settings, when the style slots would take more than there is."""
    available = memory.available_bytes
    if available is None or memory.size_bytes <= available:
        return
    raise ModelError(
        f"style_slots, max_rank: {memory.style_slots} slots of rank {memory.max_rank} take "
        f"{in_words(memory.size_bytes)} of memory, {memory.device} has {in_words(available)} left; lower one of them"
    )


def in_words(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def total_bytes() -> int | None:
    """The host's memory, within the limit of a container; None where that cannot be told."""
    known = []
    with contextlib.suppress(OSError, ValueError):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        known.append(int((_CGROUP / "memory.max").read_text()))
    return min(known, default=None)


def _host_bytes() -> int | None:
    try:
        # Free pages alone leave out the page cache, which is full of the model's files by now.
        fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines() if line.count(":") == 1)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _container_bytes() -> int | None:
    """None where cgroup v2 sets no limit."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        parts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(parts["inactive_file"]))
    except (OSError, KeyError, ValueError):  # "max" is no number
        return None
