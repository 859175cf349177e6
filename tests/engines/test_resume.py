"""Checkpoints of steps: going on from one is as if nothing had happened, and anything else is no checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cinecat.engines import resume
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.errors import EngineError
from cinecat.engines.messages import Cat, CoreConfig, Shot
from tests.engines.test_core import style_file
from tests.engines.test_core_cat import SHOT as LARGER

SHOT = replace(LARGER, steps=4)
SOLVERS = {
    "unipc": {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "unipc3": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "solver_order": 3,
    },
    "euler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "dpm": {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "solver_order": 3,
        "algorithm_type": "dpmsolver++",
    },
}


@pytest.fixture(scope="module", params=SOLVERS)
def core(request: pytest.FixtureRequest, micro: Path, config: CoreConfig, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("solvers") / "model"
    shutil.copytree(micro, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SOLVERS[request.param]))
    return EngineCore(find_checkpoint(str(folder)), config)


@pytest.fixture(scope="module")
def plain(config: CoreConfig) -> EngineCore:
    return EngineCore(find_checkpoint(config.model), config)


def latents_of(core: EngineCore, job_id: str) -> Tensor:
    return core._requests[job_id].latents


@pytest.mark.parametrize("cat", [None, Cat(keep_ratio=0.5), Cat(target_psnr_db=-100.0)], ids=["uniform", "cat", "goal"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_clip_that_goes_on_from_any_step_equals_the_uninterrupted_one(
    core: EngineCore, tmp_path: Path, cat: Cat | None, guided: bool
) -> None:
    style = style_file(tmp_path / "dusk.safetensors", seed=1)
    shot = replace(SHOT, cat=cat, guidance_scale=4.0 if guided else 1.0, styles=(style,) if guided else ())
    core.condition(shot)
    told, latents, nexts = [], [], []
    for step in range(SHOT.steps):
        told.append(core.step_alone("a"))
        core.save("a", tmp_path / f"{step}.checkpoint")
        latents.append(latents_of(core, "a"))
        nexts.append(told[-1].next)
    for step in range(SHOT.steps):
        conditioned = core.condition(replace(shot, job_id="b"), tmp_path / f"{step}.checkpoint")
        assert conditioned.step_tokens == tuple(each.tokens for each in told[: step + 1])
        assert conditioned.next == nexts[step]
        assert conditioned.keep_ratio == told[step].keep_ratio
        assert torch.equal(latents_of(core, "b"), latents[step])
        for later in range(step + 1, SHOT.steps):
            again = core.step_alone("b")
            assert replace(again, job_id="a", plan_seconds=0.0) == replace(told[later], plan_seconds=0.0)
            assert torch.equal(latents_of(core, "b"), latents[later])
        core.decode("b", lambda frames: None)
        core.release("b")
    core.release("a")


def test_steps_change_nothing_in_a_solver_but_what_is_saved(core: EngineCore) -> None:
    fresh = core._model.new_scheduler(SHOT.steps)
    solver, draw = core._model.new_scheduler(SHOT.steps), torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 4, generator=draw)
    for timestep in solver.timesteps:
        twin = resume.copied_solver(solver)
        kept = {name: str(value) for name, value in vars(solver).items()}
        latents = twin.step(torch.randn(latents.shape, generator=draw), timestep, latents, return_dict=False)[0]
        assert {name: str(value) for name, value in vars(solver).items()} == kept
        solver = twin
    changed = {name for name, value in vars(solver).items() if str(value) != str(vars(fresh).get(name))}
    assert changed == set(resume.SOLVER_STATE[type(solver).__name__]) & set(vars(solver))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def torn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4096:-2048] = bytes(2048)
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def endless(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_format(path: Path) -> None:
    save_file(load_file(path), path, {**metadata_of(path), "format": "another"})


def with_other_solver_state(path: Path) -> None:
    told = metadata_of(path)
    state = json.loads(told["state"])
    state["solver"]["_step_index"] = 3
    save_file(load_file(path), path, {**told, "state": json.dumps(state)})


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        told: dict[str, str] = file.metadata()
    return told


@pytest.mark.parametrize(
    "spoil",
    [truncated, torn, emptied, endless, made_a_folder, of_another_format, with_other_solver_state],
)
def test_what_is_no_checkpoint_is_noted_and_the_request_starts_with_noise(
    plain: EngineCore, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / "a.checkpoint"
    plain.condition(SHOT)
    noise = latents_of(plain, "a")
    plain.step_alone("a")
    plain.save("a", path)
    assert plain.condition(SHOT, path).step_tokens == (48,)
    spoil(path)
    conditioned = plain.condition(SHOT, path)
    assert conditioned.notes == ("checkpoint: it cannot be gone on from, all steps began anew",)
    assert conditioned.step_tokens == ()
    assert torch.equal(latents_of(plain, "a"), noise)
    plain.step_alone("a")
    plain.release("a")


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 6},
        {"prompt": "a dog"},
        {"negative_prompt": "dull"},
        {"steps": 5},
        {"guidance_scale": 4.5},
        {"shift": 2.0},
        {"cat": Cat(keep_ratio=0.5)},
        {"frames": 5},
        {"image": SHOT.image[::-1].copy()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_checkpoint_of_another_shot_is_none(plain: EngineCore, tmp_path: Path, other: dict[str, object]) -> None:
    path = tmp_path / "a.checkpoint"
    plain.condition(SHOT)
    plain.step_alone("a")
    plain.save("a", path)
    shot: Shot = replace(SHOT, **other)  # type: ignore[arg-type]
    assert plain.condition(shot, path).step_tokens == ()
    plain.release("a")


def test_where_no_file_is_nothing_is_noted(plain: EngineCore, tmp_path: Path) -> None:
    conditioned = plain.condition(SHOT, tmp_path / "none")
    assert (conditioned.step_tokens, conditioned.notes) == ((), ())
    with pytest.raises(EngineError, match="has done no step yet"):
        plain.save("a", tmp_path / "a.checkpoint")
    plain.step_alone("a")
    with pytest.raises(EngineError, match=r"checkpoint: .* cannot be written"):
        plain.save("a", tmp_path / "no folder" / "a.checkpoint")
    plain.release("a")


def test_a_save_that_fails_leaves_the_checkpoint_that_was(
    plain: EngineCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.checkpoint"
    plain.condition(SHOT)
    plain.step_alone("a")
    saved = plain.save("a", path)
    before = path.read_bytes()
    assert saved.size_bytes == len(before)
    plain.step_alone("a")

    def full(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(resume, "sync", full)
    with pytest.raises(EngineError, match="no space left"):
        plain.save("a", path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    plain.release("a")
