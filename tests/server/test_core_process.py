"""What is of cores on this machine alone, with a stub in a process of its own; and the frames that they share."""

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

from cinecat.engines.errors import CoreDied, ModelError, OutOfMemory
from cinecat.engines.messages import CoreConfig, Decoded, Step, Stepped
from cinecat.server import core_process
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.core_process import CoreProcess, FrameBuffer
from cinecat.server.metrics import Metrics
from tests.server import stub_core

CONFIG = CoreConfig(model="stub", device="cpu", dtype="float32", threads=1, style_slots=1, max_rank=8, cache_bytes=0)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_process, "run_core", stub_core.run)


def new_core(config: CoreConfig = CONFIG) -> CoreProcess:
    return CoreProcess(config, CoreGauges(Metrics(CollectorRegistry())))


def test_a_real_core_refuses_an_incomplete_folder_and_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        core = new_core(replace(CONFIG, model=str(tmp_path)))
        with pytest.raises(ModelError, match=r"missing: model_index\.json, tokenizer/tokenizer_config\.json"):
            await core.start()
        await asyncio.wait_for(core.died.wait(), 30)
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
