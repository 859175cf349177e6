"""Steps of several requests at once: what each gets, what is refused, and what is left when they are gone."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cinecat.engines.backends.stack import WanStackBlock
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.errors import EngineError
from cinecat.engines.messages import Cat, CoreConfig, Failure, RequestStepped, Shot
from tests.engines.test_core import style_file
from tests.engines.test_core_cat import SHOT

WIDE = replace(SHOT, image=np.random.default_rng(1).integers(0, 256, (32, 128, 3), dtype=np.uint8))
"""As many tokens as SHOT, in another size."""


@pytest.fixture(scope="module")
def core(config: CoreConfig) -> EngineCore:
    return EngineCore(find_checkpoint(config.model), config)


def latents_of(core: EngineCore, shot: Shot) -> Tensor:
    return core._requests[shot.job_id].latents


def alone(core: EngineCore, shot: Shot) -> Tensor:
    core.condition(shot)
    for _ in range(shot.steps):
        core.step_alone(shot.job_id)
    latents = latents_of(core, shot)
    core.release(shot.job_id)
    return latents


def together(core: EngineCore, shots: list[Shot], early: int = 0) -> list[Tensor]:
    """All steps that they can do together; the first does some before the others begin."""
    for shot in shots:
        core.condition(shot)
    for _ in range(early):
        core.step_alone(shots[0].job_id)
    left = {shot.job_id: shot.steps for shot in shots}
    left[shots[0].job_id] -= early
    while any(left.values()):
        batch = [job_id for job_id, steps in left.items() if steps]
        stepped = core.step(batch)
        assert [answer.job_id for answer in stepped.requests if isinstance(answer, RequestStepped)] == batch
        for job_id in batch:
            left[job_id] -= 1
    latents = [latents_of(core, shot) for shot in shots]
    for shot in shots:
        core.release(shot.job_id)
    return latents


@pytest.mark.parametrize("limit", [512, 16], ids=["one forward", "two forwards"])
def test_requests_of_one_forward_get_what_they_would_get_alone(
    core: EngineCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("cinecat.engines.denoise.TOGETHER_TOKENS", limit)
    style = style_file(tmp_path / "dusk.safetensors", seed=1)
    shots = [
        SHOT,
        replace(WIDE, job_id="b", guidance_scale=1.0, steps=3, prompt=" ".join(["word"] * 60)),
        replace(SHOT, job_id="c", styles=(style,), seed=9),
        replace(WIDE, job_id="d", styles=(replace(style, strength=0.5),), guidance_scale=2.0, prompt=""),
    ]
    expected = [alone(core, shot) for shot in shots]
    for found, wanted in zip(together(core, shots, early=2), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_plans_of_one_count_share_a_forward(core: EngineCore) -> None:
    shots = [replace(SHOT, cat=Cat(keep_ratio=0.5)), replace(WIDE, job_id="b", cat=Cat(keep_ratio=0.5), seed=8)]
    expected = [alone(core, shot) for shot in shots]
    for found, wanted in zip(together(core, shots), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_batch_made_again_is_equal_to_the_bit(core: EngineCore) -> None:
    shots = [SHOT, replace(WIDE, job_id="b"), replace(SHOT, job_id="c", guidance_scale=1.0)]
    for first, second in zip(together(core, shots), together(core, shots), strict=True):
        assert torch.equal(first, second)


def test_what_cannot_share_a_forward_is_refused_with_what_differs(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.condition(SHOT)
    core.condition(replace(SHOT, job_id="b", frames=5))
    core.condition(replace(SHOT, job_id="c"))
    with pytest.raises(EngineError, match=r"a and b cannot share a forward: .*tokens=48.*tokens=32"):
        core.step(("a", "b"))
    with pytest.raises(EngineError, match="takes each request once"):
        core.step(("a", "a"))
    monkeypatch.setattr(core._engines, "most_rows", lambda engine, tokens: 3)
    with pytest.raises(EngineError, match="a, c have 4 rows together, the torch engine takes 3 of 48 tokens"):
        core.step(("a", "c"))
    for name in "abc":
        assert core.step_alone(name).step == 1
        core.release(name)


def test_one_that_becomes_nan_fails_in_its_place_and_the_others_go_on(core: EngineCore, tmp_path: Path) -> None:
    wild = style_file(tmp_path / "wild.safetensors", seed=6, scale=1e30)
    core.condition(replace(SHOT, styles=(wild,)))
    core.condition(replace(SHOT, job_id="b"))
    before = latents_of(core, SHOT)
    for step in (1, 2):
        failed, went_on = core.step(("a", "b")).requests if step == 1 else core.step(("a", "c")).requests
        assert isinstance(failed, Failure)
        assert "gave NaN or infinity" in failed.message
        assert isinstance(went_on, RequestStepped)
        core.condition(replace(SHOT, job_id="c"))
    assert torch.equal(latents_of(core, SHOT), before)
    assert torch.isfinite(core._requests["b"].latents).all()
    for name in "abc":
        core.release(name)


@pytest.mark.parametrize("cat", [None, Cat(target_psnr_db=20.0)])
def test_a_forward_that_fails_changes_no_request(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, cat: Cat | None
) -> None:
    shots = [replace(SHOT, cat=cat), replace(WIDE, job_id="b", cat=cat)]
    expected = together(core, shots)
    for shot in shots:
        core.condition(shot)
    with monkeypatch.context() as patched:
        patched.setattr(WanStackBlock, "_heads", lambda self, states: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            core.step("ab")
    for _ in range(SHOT.steps):
        core.step("ab")
    for shot, wanted in zip(shots, expected, strict=True):
        assert torch.equal(latents_of(core, shot), wanted)
        core.release(shot.job_id)


def test_previews_come_for_those_that_are_asked_for(core: EngineCore) -> None:
    core.condition(SHOT)
    core.condition(replace(WIDE, job_id="b"))
    first, second = core.step("ab", {"b"}).requests
    assert isinstance(first, RequestStepped)
    assert isinstance(second, RequestStepped)
    assert first.preview is None
    assert second.preview is not None
    assert second.preview.shape == (3, 4, 16, 3)
    core.release("a")
    core.release("b")


def held(root: object, known: set[int]) -> int:
    """Bytes of all tensors that an object leads to, but the weights of modules and what is known."""
    size, seen, todo = 0, set(known), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                size += storage.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif type(item).__module__.startswith(("cinecat", "diffusers")):
            todo += (
                [getattr(item, each.name) for each in dataclasses.fields(item)]
                if dataclasses.is_dataclass(item)
                else vars(item).values()
            )
    return size


def of_model(core: EngineCore) -> set[int]:
    """What requests refer to and do not hold."""
    parameters = {each.untyped_storage().data_ptr() for each in core._model.vae.parameters()}
    return parameters | {id(each) for each in (core._model, core._engines.current(), *core._denoisers.values())}


@pytest.mark.parametrize("cat", [None, Cat(keep_ratio=0.5)])
def test_a_request_holds_what_it_said_it_would(core: EngineCore, cat: Cat | None) -> None:
    image = np.random.default_rng(2).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    conditioned = core.condition(replace(SHOT, image=image, frames=17, cat=cat))
    for _ in range(SHOT.steps):
        core.step_alone("a")
    request = core._requests["a"]
    stepped = held(request, of_model(core))
    assert stepped <= conditioned.state_bytes <= 1.25 * stepped
    core.decode("a", lambda frames: None)
    core.decode("a", lambda frames: None)
    decoding = held(request, of_model(core)) - stepped
    assert decoding <= conditioned.decode_bytes <= 1.25 * decoding
    core.release("a")


def test_requests_that_are_released_leave_nothing(core: EngineCore) -> None:
    def tensors() -> int:
        import gc

        gc.collect()
        return sum(isinstance(item, Tensor) for item in gc.get_objects())

    counts = []
    for _ in range(3):
        for index in range(17):
            core.condition(replace(SHOT, cat=Cat(keep_ratio=0.5) if index % 2 else None))
            core.step_alone("a")
            core.step_alone("a")
            core.release("a")
        counts.append(tensors())
    assert counts[1] == counts[2]
    assert not core._requests


def test_all_requests_together_have_a_bound(core: EngineCore) -> None:
    assert core.model_info.state_bytes > 0
