"""Step checkpoints: what a request's steps have made so far, in one safetensors file, and going on from it.

The file is written whole or not at all, and read without trust: it must be of this shot, model and solver, and its
tensors must hash to what it says. Nothing in it is code. On the same backend, with the same requests in each forward,
a clip that goes on from one is equal to the uninterrupted clip to the bit. Solvers that draw noise as they go
(`sde-dpmsolver++`, Euler with `stochastic_sampling`) give other clips every time, resumed or not.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cinecat.engines.errors import EngineError
from cinecat.engines.messages import Shot
from cinecat.plugins.durable import sync
from cinecat.plugins.errors import LoraError
from cinecat.plugins.safetensors_header import read_header

_FORMAT = "cinecat step checkpoint 2"

SOLVER_STATE: Mapping[str, tuple[str, ...]] = {
    "UniPCMultistepScheduler": (
        *("model_outputs", "timestep_list", "lower_order_nums", "this_order", "last_sample", "_step_index"),
    ),
    "FlowMatchEulerDiscreteScheduler": ("_step_index",),
    "DPMSolverMultistepScheduler": ("model_outputs", "lower_order_nums", "_step_index"),
}
"""Attributes of diffusers' solvers that a step changes; `set_timesteps` makes all others. A test holds them to it."""

_LATENTS = "latents"
_REMEMBERED = "remembered.{}"
_MOST_STATES = 16
"""Tensors as large as the latents that a file may hold; solvers of the highest order hold four."""


class NoCheckpoint(Exception):
    """A file that a request cannot go on from; the message says why."""


@dataclass(frozen=True)
class Progress:
    """What a request's steps have made.

    Attributes:
        latents: [1, 16, T, H, W].
        solver: state of the solver by attribute: numbers, tensors, None, and lists of them.
        spent: tokens of each step that is done.
        keep_ratio: that the clip is held to.
        surroundings: what rounding depends on besides, such as the engine, by name.
        remembered: sigmas and clean latents of `step_cache.Remembered`; empty on the uniform path where none is cached.
    """

    latents: Tensor
    solver: Mapping[str, Any]
    spent: tuple[int, ...]
    keep_ratio: float
    surroundings: Mapping[str, str]
    remembered: tuple[tuple[float, Tensor], ...] = ()


def shot_digest(shot: Shot, model: Sequence[str], solver: Any) -> str:
    """Changes with everything that decides a clip: all of a shot but its job's name and its styles' paths.

    Args:
        model: what the model is known by: its fingerprint, dtype and so on.
        solver: diffusers'.
    """
    plain = {each.name: getattr(shot, each.name) for each in fields(shot) if each.name not in ("job_id", "image")}
    plain["styles"] = [(style.fingerprint, style.strength) for style in shot.styles]
    plain["cat"] = None if shot.cat is None else vars(shot.cat)
    plain["image"] = shot.image.shape
    text = json.dumps([_FORMAT, *model, type(solver).__name__, diffusers.__version__, plain], sort_keys=True)
    return hashlib.sha256(text.encode() + shot.image.tobytes()).hexdigest()


def solver_state(solver: Any) -> dict[str, Any]:
    """What steps have changed in a solver; the same objects, not copies."""
    return {name: vars(solver)[name] for name in SOLVER_STATE[type(solver).__name__] if name in vars(solver)}


def copied_solver(solver: Any) -> Any:
    """A solver whose steps leave the first as it is; they share their tensors, which steps never write to."""
    twin = copy.copy(solver)
    for name, value in solver_state(solver).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
    return twin


def solver_bytes(solver: Any, latents: Tensor) -> int:
    """What a solver holds once it is under way: its tables, and states as large as the latents."""
    tables = sum(value.nbytes for value in vars(solver).values() if isinstance(value, Tensor))
    states = len(getattr(solver, "model_outputs", ())) + hasattr(solver, "last_sample")
    return tables + states * latents.nbytes


def write(path: Path, digest: str, progress: Progress) -> int:
    """Writes a checkpoint in place of what is there, whole or not at all, and returns its bytes.

    Args:
        digest: of `shot_digest`.

    Raises:
        EngineError: it cannot be written.
    """
    tensors = {_LATENTS: progress.latents}
    tensors |= {_REMEMBERED.format(index): clean for index, (_, clean) in enumerate(progress.remembered)}
    state = json.dumps(
        {
            "solver": _taken_apart(progress.solver, tensors),
            "spent": progress.spent,
            "keep_ratio": progress.keep_ratio,
            "surroundings": dict(progress.surroundings),
            "remembered_sigmas": [sigma for sigma, _ in progress.remembered],
        }
    )
    # Tensors that share memory would be refused.
    stored = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "shot": digest, "state": state, "content": _content_digest(state, stored)}
    part = path.with_name(f"{path.name}.part")
    try:
        # Not by save_file: its own temporary file would stay behind where this process is killed.
        part.write_bytes(save(stored, metadata))
        sync(part)
        part.replace(path)
        sync(path.parent)
        return path.stat().st_size
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise EngineError(f"checkpoint: {path} cannot be written: {error}") from error


def read(path: Path, digest: str, latents: Tensor, solver: Any) -> Progress:
    """Reads a checkpoint of a shot.

    Args:
        digest: of `shot_digest`.
        latents: the shot's starting noise, for shape and device.
        solver: the shot's; only looked at.

    Raises:
        NoCheckpoint: there is none that the shot could go on from.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file)
            metadata = header.metadata
            if metadata.get("format") != _FORMAT:
                raise NoCheckpoint("it is not one of this version")
            if metadata.get("shot") != digest:
                raise NoCheckpoint("it is of another shot, model or solver")
            if sum(entry.size for entry in header.tensors.values()) > _MOST_STATES * latents.numel() * 4:
                raise NoCheckpoint("it is too large")
            file.seek(0)
            tensors = load(file.read())
    except (OSError, LoraError, SafetensorError, ValueError) as error:
        raise NoCheckpoint(str(error)) from error
    if _content_digest(metadata.get("state", ""), tensors) != metadata.get("content"):
        raise NoCheckpoint("it is damaged")
    try:
        placed = {name: tensor.to(latents.device) if tensor.dim() else tensor for name, tensor in tensors.items()}
        state = json.loads(metadata["state"])
        names = SOLVER_STATE[type(solver).__name__]
        progress = Progress(
            latents=placed[_LATENTS],
            solver={name: _put_together(value, placed) for name, value in state["solver"].items() if name in names},
            spent=tuple(int(count) for count in state["spent"]),
            keep_ratio=float(state["keep_ratio"]),
            surroundings={str(name): str(value) for name, value in state["surroundings"].items()},
            remembered=tuple(
                (float(sigma), placed[_REMEMBERED.format(index)])
                for index, sigma in enumerate(state["remembered_sigmas"])
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NoCheckpoint(f"it is damaged: {error}") from error
    if any(tensor.dim() and tensor.shape != latents.shape for tensor in tensors.values()):
        raise NoCheckpoint("its tensors are not of the clip's size")
    if len(progress.remembered) > 2:
        raise NoCheckpoint("it remembers too many steps")
    if not 0 < len(progress.spent) <= len(solver.timesteps):
        raise NoCheckpoint("its steps are not those of the clip")
    return progress


def _taken_apart(value: Any, tensors: dict[str, Tensor], name: str = "solver") -> Any:
    """A value as JSON, with its tensors by name; they are put into `tensors`."""
    if isinstance(value, Mapping):
        return {key: _taken_apart(each, tensors, f"{name}.{key}") for key, each in value.items()}
    if isinstance(value, list):
        return [_taken_apart(each, tensors, f"{name}.{index}") for index, each in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    return value


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(each, tensors) for each in value]
    return tensors[value["tensor"]] if isinstance(value, dict) else value


def _content_digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
