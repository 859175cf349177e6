"""What this machine has, which backends can run on it, and whether a model would be served."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cinecat.engines.backends.choice import BACKENDS, TORCH
from cinecat.engines.checkpoint import BUNDLED_MODEL, Checkpoint, find_checkpoint
from cinecat.engines.errors import ModelError
from cinecat.engines.memory import available_bytes, in_words, total_bytes
from cinecat.engines.memory_plan import Clip, ModelSizes, ServingMemory, plan_memory
from cinecat.engines.messages import CoreConfig, Offload, ShardWeights, StorageDtype
from cinecat.engines.model import find_device, find_dtype
from cinecat.engines.placement import check_engine, checked
from cinecat.engines.sharding.choice import layout_of
from cinecat.engines.variants import find_variant

_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_INFO = Path("/proc/cpuinfo")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_LITTLE_DISK = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; bytes in all and left, and its compute capability, e.g. "9.0"."""

    name: str
    memory_bytes: int
    available_bytes: int | None
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """What there is; versions are empty, and bytes None, where there is none or it cannot be told.

    Attributes:
        cores: that this process may use, within the quota of a container.
        memory_bytes, available_bytes: of the host, within the limit of a container.
        cuda: that torch was built for.
    """

    cpu: str
    cores: float
    memory_bytes: int | None
    available_bytes: int | None
    gpus: tuple[Gpu, ...]
    driver: str
    python: str
    torch: str
    cuda: str
    onnxruntime: str
    tensorrt: str


@dataclass(frozen=True)
class Disk:
    """A folder that the server writes to, and the bytes that are free there; None where it cannot be written."""

    purpose: str
    folder: str
    free_bytes: int | None


@dataclass(frozen=True)
class Asked:
    """What would be served; settings as in `messages.CoreConfig`."""

    model: str
    model_variant: str
    device: str
    dtype: str
    engine: str
    style_slots: int
    max_rank: int
    clip: Clip
    offload: Offload = "none"
    storage_dtype: StorageDtype = "none"
    shard: str = "none"
    shard_weights: ShardWeights = "none"
    engine_sizes: tuple[tuple[int, int, int], ...] = ()

    @property
    def config(self) -> CoreConfig:
        """As far as a layout depends on it."""
        return CoreConfig(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            threads=0,
            style_slots=self.style_slots,
            max_rank=self.max_rank,
            cache_bytes=0,
            engine=self.engine,
            engine_sizes=self.engine_sizes,
            offload=self.offload,
            storage_dtype=self.storage_dtype,
            shard=self.shard,
            shard_weights=self.shard_weights,
        )


@dataclass(frozen=True)
class Diagnosis:
    """The findings.

    Attributes:
        device, dtype: that "auto" stands for here; empty where the settings name none.
        backends: why each cannot run, by name; None for those that can.
        memory: None where the model's files cannot be judged.
        available_bytes: on the device.
        problems: that keep `serve` from working.
        notes: that do not.
    """

    machine: Machine
    disks: tuple[Disk, ...]
    backends: dict[str, str | None]
    model: str
    device: str
    dtype: str
    memory: ServingMemory | None
    available_bytes: int | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def serves(self) -> bool:
        """Whether `serve` would work."""
        return not self.problems

    def as_json(self) -> dict[str, object]:
        """Plain data, sizes in bytes."""
        memory = None
        if self.memory is not None:
            memory = {**self.memory.parts(), "weights": self.memory.weights, "needed": self.memory.needed}
        return {"serves": self.serves, **asdict(self), "memory": memory}


def diagnose(asked: Asked, folders: dict[str, Path]) -> Diagnosis:
    """Looks around; loads no weights and downloads nothing.

    Args:
        folders: that the server writes to, by purpose.
    """
    problems: list[str] = []
    notes: list[str] = []
    machine = look_around()
    disks = tuple(_disk(purpose, folder, problems, notes) for purpose, folder in folders.items())
    device = dtype = None
    try:
        device = find_device(asked.device)
        dtype = find_dtype(asked.dtype, device)
    except ModelError as error:
        problems.append(str(error))
    if machine.driver and not machine.gpus:
        notes.append(
            f"an NVIDIA driver {machine.driver} is here, but torch {machine.torch} sees no GPU; install a torch with "
            "CUDA: pip install --force-reinstall torch, from the wheel index for your CUDA"
        )
    memory, left = None, None
    try:
        check_engine(asked.engine, asked.offload, asked.storage_dtype)
    except ModelError as error:
        problems.append(str(error))
    try:
        find_variant(asked.model_variant)
        _check_layout(asked, notes)
        sizes = sizes_of(asked.model, notes)
        if device is not None and dtype is not None:
            offload: Offload = "none" if device.type == "cpu" else asked.offload
            memory = plan_memory(
                sizes, asked.clip, dtype, asked.style_slots, asked.max_rank, offload, asked.storage_dtype
            )
            left = available_bytes(device)
            _compare(memory, left, device, problems)
            if memory.host > (machine.available_bytes or memory.host):
                problems.append(
                    f"offload: {in_words(memory.host)} would wait in the host's memory, which has "
                    f"{in_words(machine.available_bytes or 0)} left; set offload to none, or free memory"
                )
    except ModelError as error:
        problems.append(str(error))
    place = device or torch.device("cpu")
    backends = {TORCH: None, **{backend.name: backend.missing(place) for backend in BACKENDS}}
    if reason := backends.get(asked.engine):
        problems.append(f"engine: {reason}")
    return Diagnosis(
        machine=machine,
        disks=disks,
        backends=backends,
        model=asked.model,
        device=str(device or ""),
        dtype=str(dtype or "").removeprefix("torch."),
        memory=memory,
        available_bytes=left,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def look_around() -> Machine:
    """What this machine has."""
    return Machine(
        cpu=_cpu(),
        cores=_cores(),
        memory_bytes=total_bytes(),
        available_bytes=available_bytes(torch.device("cpu")),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        driver=_driver(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        onnxruntime=_version("onnxruntime") or _version("onnxruntime-gpu"),
        tensorrt=_version("tensorrt"),
    )


def _compare(memory: ServingMemory, left: int | None, device: torch.device, problems: list[str]) -> None:
    if left is None or memory.needed <= left:
        return
    floor = memory.weights + memory.style_banks
    advice = (
        "lower style_slots or max_rank, free memory, choose a larger device, or set offload or storage_dtype"
        if floor > left
        else "lower width, height or frames of clips, style_slots or max_rank"
    )
    problems.append(f"memory: {memory} is needed, {device} has {in_words(left)} left; {advice}")


def _check_layout(asked: Asked, notes: list[str]) -> None:
    """Raises ModelError where ranks cannot share the work as they should."""
    local = _local(asked.model)
    if asked.shard == "none" or local is None:
        return
    layout = layout_of(local, asked.config)
    checked(asked.config, layout.ranks > 1)
    if layout.ranks > 1:
        notes.append(
            f"shard: {layout}, {layout.ranks} ranks; the memory told is that of the first with all weights of its own, "
            "the others take less: see cinecat plan-capacity"
        )


def sizes_of(model: str, notes: list[str]) -> ModelSizes:
    """Sizes of a model, without downloading it; a note says where they are those that are published.

    Raises:
        ModelError: it is not complete here, and its sizes are not known.
    """
    local = _local(model)
    if local is not None:
        return ModelSizes.of(local)
    notes.append(f"model: {model} is not on this machine yet; serve downloads it first")
    known = ModelSizes.published(model)
    if known is None:
        raise ModelError(f"model: {model} is not on this machine, so its size is not known; hf download {model}")
    return known


def _local(model: str) -> Checkpoint | None:
    """The model's checked files; None for a hub id that was not downloaded."""
    if model == BUNDLED_MODEL or Path(model).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return find_checkpoint(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return find_checkpoint(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ModelError):
        return None


def _disk(purpose: str, folder: Path, problems: list[str], notes: list[str]) -> Disk:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problems.append(f"{purpose}: {folder} cannot be written; choose another folder")
        return Disk(purpose, str(folder), None)
    free = shutil.disk_usage(existing).free
    if free < _LITTLE_DISK:
        notes.append(f"{purpose}: {folder} has only {in_words(free)} left")
    return Disk(purpose, str(folder), free)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE)
        if names:
            return str(names[0])
    return platform.processor() or platform.machine()


def _cores() -> float:
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        quota, period = _CPU_QUOTA.read_text().split()
        cores = min(cores, int(quota) / int(period))
    return round(cores, 2)


def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    left = available_bytes(torch.device("cuda", index))
    return Gpu(found.name, found.total_memory, left, f"{found.major}.{found.minor}")


def _driver() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _DRIVER.read_text())
        return match.group(1) if match else "of unknown version"
    return ""


def _version(package: str) -> str:
    if importlib.util.find_spec(package.removesuffix("-gpu")) is None:
        return ""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
