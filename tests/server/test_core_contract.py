"""What the front relies on in an engine core, wherever it runs: one suite for both executors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from safetensors.numpy import save_file

from cinecat.engines.errors import CoreDied, EngineError, EngineFault, ModelError, NoFreeSlot, OutOfMemory
from cinecat.engines.messages import (
    Condition,
    Conditioned,
    CoreConfig,
    Decode,
    Decoded,
    ModelInfo,
    Release,
    Released,
    RequestStepped,
    Save,
    Saved,
    Shot,
    Step,
    Stepped,
    StyleUse,
    Warm,
    Warmed,
)
from cinecat.server import core_process
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import CoreProcess, FrameBuffer
from cinecat.server.metrics import Metrics
from cinecat.server.ray_core import RayCore
from cinecat.server.ray_link import Placement
from tests.server import stub_core
from tests.server.ray_cluster import ray_cluster

NewCore = Callable[[CoreConfig], CoreProcess]

STUB = CoreConfig(model="stub", device="cpu", dtype="float32", threads=1, style_slots=1, max_rank=8, cache_bytes=0)
TINY = replace(STUB, model="wan-tiny")
STEPPED = Stepped(0.5, (RequestStepped("steps", 1, 2, 16),))

SHOT = Shot(
    job_id="a",
    image=np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    prompt="a cat",
    negative_prompt="",
    frames=9,
    steps=4,
    guidance_scale=1.0,
    seed=5,
    styles=(),
)


@dataclass(frozen=True)
class Tiny:
    """A core with wan-tiny, and the loop that it was started in, for several tests."""

    core: CoreProcess
    info: ModelInfo
    loop: asyncio.Runner


@contextlib.contextmanager
def running(core: CoreProcess) -> Iterator[Tiny]:
    with asyncio.Runner() as loop:
        yield Tiny(core, loop.run(core.start()), loop)
        loop.run(core.stop())


def local_core(config: CoreConfig) -> CoreProcess:
    return CoreProcess(config, CoreGauges(Metrics(CollectorRegistry())))


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def new_core(request: pytest.FixtureRequest) -> Iterator[NewCore]:
    if request.param == "local":
        yield local_core
        return
    with ray_cluster(2) as cluster:
        placement = Placement(cluster.address, cpus=1, gpus=0)
        yield lambda config: RayCore(config, CoreGauges(Metrics(CollectorRegistry())), placement)


@pytest.fixture(scope="module")
def local_tiny() -> Iterator[Tiny]:
    with running(local_core(TINY)) as tiny:
        yield tiny


@pytest.fixture(scope="module")
def tiny(new_core: NewCore, request: pytest.FixtureRequest) -> Iterator[Tiny]:
    if new_core is local_core:
        yield request.getfixturevalue("local_tiny")
        return
    with running(new_core(TINY)) as tiny:
        yield tiny


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_process, "run_core", stub_core.run)


def style_file(path: Path, info: ModelInfo, seed: int) -> StyleUse:
    draw = np.random.default_rng(seed)
    target, (in_features, out_features) = next(iter(info.style_targets.items()))
    factors = {
        "A": draw.standard_normal((2, in_features), dtype=np.float32),
        "B": draw.standard_normal((out_features, 2), dtype=np.float32),
    }
    save_file({f"transformer.{target}.lora_{name}.weight": values for name, values in factors.items()}, path)
    return StyleUse(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 0.5)


async def steps(core: CoreProcess, first: int, last: int) -> None:
    for number in range(first, last + 1):
        stepped = await core.call(Step(("a",), frozenset("a")), Stepped)
        (done,) = stepped.requests
        assert isinstance(done, RequestStepped)
        assert (done.step, done.total) == (number, SHOT.steps)
        assert done.preview is not None


async def decoded(core: CoreProcess) -> NDArray[np.uint8]:
    chunks = []
    with contextlib.closing(FrameBuffer(64, 64, 4, "uint8")) as buffer:
        while sum(map(len, chunks)) < SHOT.frames:
            said = await core.call(Decode("a", buffer.name, "uint8"), Decoded)
            assert said.first == sum(map(len, chunks))
            chunks.append(buffer.frames(said))
    return np.concatenate(chunks)


async def rendered(core: CoreProcess, shot: Shot) -> NDArray[np.uint8]:
    await core.call(Condition(shot), Conditioned)
    await steps(core, 1, SHOT.steps)
    frames = await decoded(core)
    await core.call(Release("a"), Released)
    return frames


def test_a_clip_that_outlives_its_core_is_equal_to_the_bit_to_one_rendered_here(
    tiny: Tiny, local_tiny: Tiny, tmp_path: Path
) -> None:
    style = style_file(tmp_path / "dusk.safetensors", tiny.info, seed=1)
    shot = replace(SHOT, styles=(style,))
    uninterrupted = local_tiny.loop.run(rendered(local_tiny.core, shot))
    checkpoint = tmp_path / "a.safetensors"
    core = tiny.core

    async def scenario() -> NDArray[np.uint8]:
        warmed = await core.call(Warm(style), Warmed)
        assert [slot.fingerprints for slot in warmed.resident] == [(style.fingerprint,)]
        conditioned = await core.call(Condition(shot, str(checkpoint)), Conditioned)
        assert conditioned.step_tokens == ()
        await steps(core, 1, 2)
        saved = await core.call(Save("a", str(checkpoint)), Saved)
        assert saved.size_bytes == checkpoint.stat().st_size
        await steps(core, 3, 3)
        died = core.died
        core.kill()
        await asyncio.wait_for(died.wait(), 30)
        with pytest.raises(CoreDied):
            await core.call(Step(("a",)), Stepped)
        await core.restart()
        conditioned = await core.call(Condition(shot, str(checkpoint)), Conditioned)
        assert len(conditioned.step_tokens) == 2
        assert not any("checkpoint" in note for note in conditioned.notes)
        await steps(core, 3, 4)
        frames = await decoded(core)
        await core.call(Release("a"), Released)
        return frames

    np.testing.assert_array_equal(tiny.loop.run(scenario()), uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "dusk.safetensors"]


def test_a_style_that_finds_no_slot_is_told_from_one_that_cannot_be_read(tiny: Tiny, tmp_path: Path) -> None:
    first, second = (style_file(tmp_path / f"{seed}.safetensors", tiny.info, seed) for seed in (2, 3))
    missing = StyleUse(str(tmp_path / "missing.safetensors"), "0" * 64, 1.0)
    core = tiny.core

    async def scenario() -> None:
        await core.call(Condition(replace(SHOT, styles=(first,))), Conditioned)
        with pytest.raises(NoFreeSlot):
            await core.call(Condition(replace(SHOT, job_id="b", styles=(second,))), Conditioned)
        await core.call(Release("a"), Released)
        await core.call(Condition(replace(SHOT, job_id="b", styles=(second,))), Conditioned)
        await core.call(Release("b"), Released)
        with pytest.raises(EngineError, match=r"missing\.safetensors") as caught:
            await core.call(Warm(missing), Warmed)
        assert type(caught.value) is EngineError

    tiny.loop.run(scenario())


def test_files_that_cannot_be_written_cost_no_step(tiny: Tiny, tmp_path: Path) -> None:
    core, nowhere = tiny.core, tmp_path / "nowhere"

    async def scenario() -> None:
        await core.call(Condition(SHOT), Conditioned)
        await core.call(Step(("a",), profile=str(nowhere / "step-1.json.gz")), Stepped)
        with pytest.raises(EngineError, match="nowhere") as caught:
            await core.call(Save("a", str(nowhere / "a.safetensors")), Saved)
        assert type(caught.value) is EngineError
        await steps(core, 2, 2)
        await core.call(Release("a"), Released)
        with pytest.raises(EngineError, match="not in the engine core"):
            await core.call(Step(("a",)), Stepped)

    tiny.loop.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_recorded_where_the_front_wants_it(tiny: Tiny, tmp_path: Path) -> None:
    async def scenario() -> None:
        await tiny.core.call(Condition(SHOT), Conditioned)
        await tiny.core.call(Step(("a",), profile=str(tmp_path / "step-1.json.gz")), Stepped)
        await tiny.core.call(Release("a"), Released)

    tiny.loop.run(scenario())
    (recorded,) = tmp_path.iterdir()
    assert recorded.name == "step-1.json.gz"
    assert recorded.read_bytes()[:2] == b"\x1f\x8b"


@pytest.mark.usefixtures("stub")
def test_calls_are_answered_and_failures_told_apart(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(STUB)
        assert await core.start() == stub_core.INFO
        try:
            assert await core.call(Step(("steps",)), Stepped) == STEPPED
            with pytest.raises(EngineError, match="all steps are done"):
                await core.call(Step(("refuses",)), Stepped)
            with pytest.raises(OutOfMemory, match="out of memory"):
                await core.call(Step(("has no memory",)), Stepped)
            with pytest.raises(NoFreeSlot, match="no style slot is free"):
                await core.call(Step(("finds no slot",)), Stepped)
            with pytest.raises(EngineFault, match="RuntimeError: no"):
                await core.call(Step(("breaks",)), Stepped)
            assert await core.call(Release("any"), Released) == Released()
            assert not core.died.is_set()
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_core_that_is_out_of_step_with_its_calls_is_not_asked_again(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(STUB)
        await core.start()
        try:
            with pytest.raises(EngineFault, match="answered Released where Stepped was due"):
                await core.call(Step(("answers wrongly",)), Stepped)
            assert core.died.is_set()
            with pytest.raises(CoreDied):
                await core.call(Step(("steps",)), Stepped)
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_calls_that_come_during_a_restart_take_no_answer_of_the_start(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(STUB)
        await core.start()
        try:
            restart = asyncio.create_task(core.restart())
            calls = []
            while not restart.done():
                calls.append(asyncio.create_task(core.call(Release("any"), Released)))
                await asyncio.sleep(0.005)
            await restart
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} <= {CoreDied, Released}
            assert Released() in outcomes
            assert await core.call(Step(("steps",)), Stepped) == STEPPED
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_model_whose_files_have_changed_is_not_served_after_a_restart(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(STUB)
        await core.start()
        try:
            core._fingerprint = "another"
            with pytest.raises(ModelError, match=r"the files of stub .*start it again"):
                await core.restart()
            await asyncio.wait_for(core.died.wait(), 30)
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_core_that_is_killed_within_a_call_can_be_replaced(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(STUB)
        await core.start()
        try:
            first, died = core.pid, core.died
            calling = asyncio.create_task(core.call(Step(("hangs",)), Stepped))
            await asyncio.sleep(0.01)
            core.kill()
            with pytest.raises(CoreDied):
                await calling
            await asyncio.wait_for(died.wait(), 30)
            await core.restart()
            assert core.pid != first
            assert not core.died.is_set()
            assert await core.call(Step(("steps",)), Stepped) == STEPPED
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_core_that_leaves_by_itself_is_noticed_without_a_call(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(STUB)
        await core.start()
        try:
            with pytest.raises(CoreDied, match="exit code 3"):
                await core.call(Step(("exits",)), Stepped)
            await asyncio.wait_for(core.died.wait(), 30)
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_core_that_dies_while_it_loads_is_told(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(replace(STUB, model="dies while loading"))
        with pytest.raises(CoreDied, match="exit code 7"):
            await core.start()
        await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_model_that_cannot_be_served_is_refused_in_the_cores_words(new_core: NewCore) -> None:
    async def scenario() -> None:
        core = new_core(replace(STUB, model="is incomplete"))
        with pytest.raises(ModelError, match=r"transformer/config\.json is missing"):
            await core.start()
        await asyncio.wait_for(core.died.wait(), 30)
        await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("busy", [False, True])
def test_stopping_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch, new_core: NewCore, busy: bool) -> None:
    monkeypatch.setattr(core_process, "_STOP_SECONDS", 0.05 if busy else 30.0)

    async def scenario() -> None:
        core = new_core(STUB)
        await core.start()
        pid = core.pid
        assert pid is not None
        calls = [asyncio.create_task(core.call(Step(("hangs",)), Stepped)) for _ in range(busy)]
        await asyncio.sleep(0.01)
        await core.stop()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        for call in calls:
            with pytest.raises(CoreDied):
                await call

    asyncio.run(scenario())


def test_a_core_that_was_never_started_cannot_be_called(new_core: NewCore) -> None:
    with pytest.raises(CoreDied, match="not running"):
        asyncio.run(new_core(STUB).call(Release("any"), Released))
