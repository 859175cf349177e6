"""Stands in for the engine core's process, without torch: says Ready, then does as the job ids say.

A module of its own, because a spawned process imports all of the module that it starts in.
"""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection

from cinecat.engines.messages import (
    CoreConfig,
    Failure,
    ModelInfo,
    Ready,
    Release,
    Released,
    RequestStepped,
    SlotMemory,
    Stepped,
    VariantFused,
)

INFO = ModelInfo(
    name="stub",
    family="stub",
    fingerprint="",
    device="cpu",
    dtype="float32",
    engine="stub",
    parameters=1,
    weights_bytes=4,
    size_multiple=16,
    max_frames=5,
    max_size=64,
    max_rank=8,
    style_targets={},
)
ANSWERS = {
    "steps": Stepped(0.5, (RequestStepped("steps", 1, 2, 16),)),
    "refuses": Failure("request", "all steps are done"),
    "has no memory": Failure("memory", "out of memory"),
    "finds no slot": Failure("slots", "no style slot is free"),
    "breaks": Failure("internal", "RuntimeError: no"),
    "answers wrongly": Released(),
}


def run(connection: Connection, config: CoreConfig) -> None:
    if config.model == "dies while loading":
        os._exit(7)
    if config.model == "is incomplete":
        connection.send(Failure("model", "transformer/config.json is missing"))
        return
    connection.send(VariantFused("four-steps", 7, 1))
    connection.send(SlotMemory("cpu", config.style_slots, config.max_rank, size_bytes=4096, available_bytes=8192))
    connection.send(Ready(INFO))
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        if isinstance(call, Release):
            connection.send(Released())
            continue
        (job_id,) = call.job_ids
        if job_id == "exits":
            os._exit(3)
        elif job_id == "hangs":
            signal.pause()
        else:
            connection.send(ANSWERS[job_id])
