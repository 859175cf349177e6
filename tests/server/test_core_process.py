"""The front's end of the engine core, with a stub in a process of its own; and the frames that they share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest
import structlog
from prometheus_client import CollectorRegistry

from cinecat.engines.errors import CoreDied, EngineError, EngineFault, ModelError, NoFreeSlot, OutOfMemory
from cinecat.engines.messages import CoreConfig, Decoded, Release, Released, RequestStepped, Step, Stepped
from cinecat.server import core_process
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import CoreProcess, FrameBuffer
from cinecat.server.metrics import Metrics
from tests.server import stub_core

CONFIG = CoreConfig(model="stub", device="cpu", dtype="float32", threads=1, style_slots=1, max_rank=8, cache_bytes=0)
STEPPED = Stepped(0.5, (RequestStepped("steps", 1, 2, 16),))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_process, "run_core", stub_core.run)


def new_core(config: CoreConfig = CONFIG) -> CoreProcess:
    return CoreProcess(config, CoreGauges(Metrics(CollectorRegistry())))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.usefixtures("stub")
def test_a_model_that_cannot_be_served_is_refused_in_the_cores_words() -> None:
    async def scenario() -> None:
        core = new_core(replace(CONFIG, model="is incomplete"))
        with pytest.raises(ModelError, match=r"transformer/config\.json is missing"):
            await core.start()
        await asyncio.wait_for(core.died.wait(), 30)
        await core.stop()

    asyncio.run(scenario())


def test_a_real_core_refuses_an_incomplete_folder_and_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        core = new_core(replace(CONFIG, model=str(tmp_path)))
        with pytest.raises(ModelError, match=r"missing: model_index\.json, tokenizer/tokenizer_config\.json"):
            await core.start()
        await asyncio.wait_for(core.died.wait(), 30)
        await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_calls_are_answered_and_failures_told_apart() -> None:
    async def scenario() -> None:
        core = new_core()
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
def test_a_core_that_is_out_of_step_with_its_calls_is_not_asked_again() -> None:
    async def scenario() -> None:
        core = new_core()
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
def test_calls_that_come_during_a_restart_take_no_answer_of_the_start() -> None:
    async def scenario() -> None:
        core = new_core()
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
def test_a_model_whose_files_have_changed_is_not_served_after_a_restart() -> None:
    async def scenario() -> None:
        core = new_core()
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
def test_the_memory_of_the_slots_and_the_variant_are_logged_before_the_core_is_ready() -> None:
    async def scenario() -> None:
        core = new_core()
        await core.start()
        await core.stop()

    with structlog.testing.capture_logs() as logs:
        asyncio.run(scenario())
    variant, memory, ready = logs
    assert (variant["event"], variant["file"], variant["parameters"]) == ("model variant", "four-steps", 7)
    assert (memory["event"], memory["bytes"], memory["style_slots"], memory["max_rank"]) == (
        "memory for styles",
        4096,
        CONFIG.style_slots,
        CONFIG.max_rank,
    )
    assert ready["event"] == "engine core ready"


@pytest.mark.usefixtures("stub")
def test_a_core_that_is_killed_within_a_call_is_told_with_its_exit_code_and_can_be_replaced() -> None:
    async def scenario() -> None:
        core = new_core()
        await core.start()
        try:
            first, died = core.pid, core.died
            assert first is not None
            calling = asyncio.create_task(core.call(Step(("hangs",)), Stepped))
            await asyncio.sleep(0.01)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(CoreDied, match=rf"\(pid {first}\) died with exit code -9"):
                await calling
            await asyncio.wait_for(died.wait(), 30)
            with pytest.raises(CoreDied):
                await core.call(Step(("steps",)), Stepped)
            await core.restart()
            assert core.pid != first
            assert not core.died.is_set()
            assert await core.call(Step(("steps",)), Stepped)
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_core_that_leaves_by_itself_is_noticed_without_a_call() -> None:
    async def scenario() -> None:
        core = new_core()
        await core.start()
        try:
            with pytest.raises(CoreDied, match="exit code 3"):
                await core.call(Step(("exits",)), Stepped)
            await asyncio.wait_for(core.died.wait(), 30)
        finally:
            await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
def test_a_core_that_dies_while_it_loads_is_told() -> None:
    async def scenario() -> None:
        core = new_core(replace(CONFIG, model="dies while loading"))
        with pytest.raises(CoreDied, match="exit code 7"):
            await core.start()
        await core.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("busy", [False, True])
def test_stopping_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    monkeypatch.setattr(core_process, "_STOP_SECONDS", 0.05 if busy else 30.0)

    async def scenario() -> None:
        core = new_core()
        await core.start()
        pid = core.pid
        assert pid is not None
        calls = [asyncio.create_task(core.call(Step(("hangs",)), Stepped)) for _ in range(busy)]
        await asyncio.sleep(0.01)
        await core.stop()
        assert gone(pid)
        for call in calls:
            with pytest.raises(CoreDied):
                await call

    asyncio.run(scenario())


def test_a_core_that_was_never_started_cannot_be_called() -> None:
    with pytest.raises(CoreDied, match="not running"):
        asyncio.run(new_core().call(Release("any"), Released))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_frames_are_copied_out_of_the_shared_memory(dtype: str) -> None:
    with contextlib.closing(FrameBuffer(2, 3, 4, dtype)) as buffer:  # type: ignore[arg-type]
        other_side = SharedMemory(name=buffer.name)
        written = np.ndarray((4, 2, 3, 3), dtype, buffer=other_side.buf)
        written[:] = np.arange(72).reshape(4, 2, 3, 3)
        frames = buffer.frames(Decoded(first=1, count=3, total=5, seconds=0.0))
        written[:] = 0
        del written
        other_side.close()
    assert frames.dtype == dtype
    np.testing.assert_array_equal(frames, np.arange(54).reshape(3, 2, 3, 3))


def test_shared_memory_is_given_back() -> None:
    buffer = FrameBuffer(2, 2, 4, "uint8")
    buffer.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name=buffer.name)


def test_too_little_shared_memory_is_refused_before_the_core_meets_it() -> None:
    with pytest.raises(OutOfMemory, match="raise --shm-size"):
        FrameBuffer(1_000_000, 1_000_000, 4, "float32")
