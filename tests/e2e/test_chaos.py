"""A short `cinecat bench chaos`: one core and one server killed under load."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cinecat.server.bench.chaos import CHECKPOINT_STEPS, KINDS, chaos


@pytest.mark.slow
def test_kills_under_load_lose_and_change_nothing(tmp_path: Path) -> None:
    found = asyncio.run(chaos(tmp_path, core_kills=1, server_kills=1, kinds=KINDS[:2], at_once=2))
    assert found.kills == {"core": 1, "server": 1}
    assert [job.failure for job in found.jobs if job.succeeded != 1] == []
    assert (found.torn, found.unequal) == ([], [])
    repeated = [steps for job in found.jobs for steps in job.repeated]
    assert repeated
    assert max(repeated) <= CHECKPOINT_STEPS
