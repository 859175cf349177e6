"""What the leader knows of the other ranks: their last words, and the memory that they have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from cinecat.engines.messages import CoreConfig, Failure
from cinecat.engines.sharding import leader as leading
from cinecat.engines.sharding import vae as bands
from cinecat.engines.sharding.layout import Layout

SENDS_A_FAILURE = """
import sys, time
from multiprocessing.connection import Connection
from cinecat.engines.messages import Failure
Connection(int(sys.argv[1])).send(Failure(KIND, KIND))
time.sleep(600)
"""


@contextmanager
def process_that_fails(kind: str) -> Iterator[leading._Follower]:
    orders, their_orders = Pipe()
    pulse, their_pulse = Pipe()
    theirs = their_orders.fileno(), their_pulse.fileno()
    process = subprocess.Popen(
        [sys.executable, "-c", SENDS_A_FAILURE.replace("KIND", repr(kind)), *map(str, theirs)], pass_fds=theirs
    )
    their_orders.close()
    their_pulse.close()
    try:
        yield leading._Follower(process, orders, pulse)
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_is_out_of_memory_is_heard_though_another_is_missed_first(config: CoreConfig) -> None:
    leader = leading.Leader(replace(config, rank_timeout_seconds=60.0), Layout())
    heard: list[Failure | None] = []
    with (
        process_that_fails("internal") as first,
        process_that_fails("memory") as second,
    ):
        assert first.orders.poll(30)
        assert second.orders.poll(30)
        leader._followers = {1: first, 2: second}
        leader._lost(1, "has ended", heard.append)
        assert [each.process.wait(5) for each in (first, second)] == [-9, -9]
    assert heard == [Failure("memory", "memory")]


@pytest.mark.parametrize(("device", "sharing"), [("cpu", 4), ("cuda", 1)])
def test_ranks_on_a_cpu_share_its_memory(
    config: CoreConfig, monkeypatch: pytest.MonkeyPatch, device: str, sharing: int
) -> None:
    with torch.device("meta"):
        vae, latents = AutoencoderKLWan(), torch.empty(1, 16, 21, 60, 104)
    leader = leading.Leader(config, Layout())
    known: Any = SimpleNamespace(device=torch.device(device))
    leader.layout, leader._ranks = Layout(ulysses=4), known
    needed = round(sharing * bands.band_needs(vae, 480, 832, 4) / bands.SHARE)
    monkeypatch.setattr(leading, "available_bytes", lambda device: round(1.01 * needed))
    assert leader.decodes(vae, latents)
    monkeypatch.setattr(leading, "available_bytes", lambda device: round(0.99 * needed))
    assert not leader.decodes(vae, latents)
    assert leader.decoder_bytes(vae, latents) == sharing * bands.band_decoder_bytes(vae, latents.shape, 4)
