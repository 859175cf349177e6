"""An engine core without a model: real messages, states and shared memory, and what the test tells it to do."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from cinecat.engines.errors import CoreDied, EngineError
from cinecat.engines.messages import (
    VAE_TEMPORAL_STRIDE,
    Answer,
    Call,
    Condition,
    Conditioned,
    Decode,
    Decoded,
    Failure,
    Release,
    Released,
    RequestStepped,
    ResidentStyle,
    Save,
    Saved,
    Shot,
    StageTime,
    Step,
    Stepped,
    StepShape,
)

STEP_S = 0.1


@dataclass
class _State:
    shot: Shot
    step: int
    frame: int = 0

    @property
    def next(self) -> StepShape | None:
        height, width = self.shot.image.shape[:2]
        tokens = ((self.shot.frames - 1) // VAE_TEMPORAL_STRIDE + 1) * (height // 16) * (width // 16)
        return StepShape("torch", tokens) if self.step < self.shot.steps else None


@dataclass(eq=False)
class ScriptedCore:
    """A `Core`.

    Attributes:
        fates: by job id, what happens to the steps of a job, in turn: an exception fails the whole call, a Failure that
            request alone, None lets it be. CoreDied also ends the core.
        on_begin, save_fates, decode_fates: the same for Condition, Save and Decode.
        gate: calls of Step wait until it is set.
        row_share: seconds of a step are STEP_S x (1 + row_share x (jobs - 1)), as it says; no time passes.
        calls: all of them.
        steps: how often each job's each step was done.
    """

    fates: dict[str, list[Exception | Failure | None]] = field(default_factory=dict)
    on_begin: dict[str, list[Exception]] = field(default_factory=dict)
    save_fates: dict[str, list[Exception | None]] = field(default_factory=dict)
    decode_fates: dict[str, list[Exception | None]] = field(default_factory=dict)
    row_share: float = 1.0
    state_bytes: int = 1
    restarts: int = 0
    refusals: list[Exception] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    steps: Counter[tuple[str, int]] = field(default_factory=Counter)
    states: dict[str, _State] = field(default_factory=dict)
    resident: tuple[ResidentStyle, ...] = ()

    def __post_init__(self) -> None:
        self.died, self.killed, self.gate = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.gate.set()

    @property
    def begun(self) -> list[str]:
        """Jobs in the order in which they came in, each as often as it did."""
        return [call.shot.job_id for call in self.calls if isinstance(call, Condition)]

    @property
    def stepped(self) -> list[tuple[str, ...]]:
        """Jobs of each step."""
        return [call.job_ids for call in self.calls if isinstance(call, Step)]

    async def restart(self) -> None:
        self.restarts += 1
        if self.refusals:
            raise self.refusals.pop(0)
        self.died = asyncio.Event()

    def kill(self) -> None:
        self.killed.set()

    async def stop(self) -> None:
        self.died.set()

    async def call(self, call: Call, kind: type[Answer]) -> Any:
        self.calls.append(call)
        await asyncio.sleep(0)
        if self.died.is_set():
            raise CoreDied("the engine core is not running")
        try:
            return await self._answer(call)
        except CoreDied:
            self.states.clear()
            self.resident = ()
            self.died.set()
            raise

    async def _answer(self, call: Call) -> Answer:
        match call:
            case Condition(shot, checkpoint):
                return self._condition(shot, Path(checkpoint))
            case Step(job_ids, previews):
                await self._work()
                return self._step(job_ids, previews)
            case Save(job_id, path):
                fates = self.save_fates.get(job_id)
                if fates and (fate := fates.pop(0)) is not None:
                    raise fate
                await asyncio.to_thread(Path(path).write_text, f"{self.states[job_id].step}")
                return Saved(0.001, 1)
            case Decode(job_id, buffer, dtype):
                fates = self.decode_fates.get(job_id)
                if fates and (fate := fates.pop(0)) is not None:
                    raise fate
                return self._decode(self.states[job_id], buffer, dtype)
            case Release(job_id):
                self.states.pop(job_id, None)
                return Released()
        raise AssertionError(call)

    async def _work(self) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (self.gate, self.killed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.killed.is_set():
            raise CoreDied("the engine core died with exit code -9")

    def _condition(self, shot: Shot, checkpoint: Path) -> Conditioned:
        if fates := self.on_begin.get(shot.job_id):
            raise fates.pop(0)
        step = int(checkpoint.read_text()) if checkpoint.exists() else 0
        state = self.states[shot.job_id] = _State(shot, step)
        if shot.styles:
            self.resident = (ResidentStyle(1, tuple(style.fingerprint for style in shot.styles), 4096),)
        return Conditioned(
            (StageTime("text_encode", 0.001),),
            tokens_uniform=32,
            notes=(),
            next=state.next,
            step_tokens=(32,) * step,
            state_bytes=self.state_bytes,
            resident=self.resident,
        )

    def _step(self, job_ids: tuple[str, ...], previews: frozenset[str]) -> Stepped:
        assert len({self.states[job_id].next for job_id in job_ids}) == 1
        done: list[RequestStepped | Failure] = []
        fates = {job_id: self.fates[job_id].pop(0) for job_id in job_ids if self.fates.get(job_id)}
        for fate in fates.values():
            if isinstance(fate, Exception):
                raise fate
        for job_id in job_ids:
            fate, state = fates.get(job_id), self.states[job_id]
            if isinstance(fate, Failure):
                done.append(fate)
                continue
            state.step += 1
            self.steps[job_id, state.step] += 1
            preview = np.zeros((2, 8, 8, 3), np.uint8) if job_id in previews else None
            done.append(RequestStepped(job_id, state.step, state.shot.steps, 32, next=state.next, preview=preview))
        return Stepped(STEP_S * (1 + self.row_share * (len(job_ids) - 1)), tuple(done))

    def _decode(self, state: _State, buffer: str, dtype: str) -> Decoded:
        if state.next is not None:
            raise EngineError("steps are left")
        first, count = state.frame, VAE_TEMPORAL_STRIDE if state.frame else 1
        memory = SharedMemory(name=buffer)
        frames = np.ndarray((count, *state.shot.image.shape), dtype=dtype, buffer=memory.buf)
        frames[:] = 100
        del frames
        memory.close()
        state.frame += count
        return Decoded(first, count, state.shot.frames, 0.01)
