"""Signs of life between ranks, where one of them gives none any more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing import Pipe

from cinecat.engines.messages import CoreConfig
from cinecat.engines.sharding import pulse
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.messages import FollowerConfig

_LOADS_FOR_EVER = """
import sys, time, types
part = types.ModuleType("cinecat.engines.sharding.part")
part.Part = lambda config: print("loads", flush=True) or time.sleep(600)
sys.modules[part.__name__] = part
from multiprocessing.connection import Connection
from cinecat.engines.sharding import follower
follower.main(*(Connection(int(each)) for each in sys.argv[1:]))
"""


def test_a_follower_that_still_loads_ends_with_its_leader(config: CoreConfig) -> None:
    orders, their_orders = Pipe()
    beats, their_beats = Pipe()
    theirs = (their_orders.fileno(), their_beats.fileno())
    command = [sys.executable, "-c", _LOADS_FOR_EVER, *map(str, theirs)]
    with subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.PIPE) as follower:
        try:
            orders.send(FollowerConfig(replace(config, rank_timeout_seconds=3600.0), Layout(ulysses=2), 1))
            their_orders.close()
            their_beats.close()
            assert follower.stdout is not None
            assert follower.stdout.readline() == b"loads\n"
            orders.close()  # as the end of the leader's process does
            beats.close()
            assert follower.wait(30) == 1
        finally:
            follower.kill()


def test_a_rank_that_reads_nothing_does_not_stop_the_watch() -> None:
    ours, theirs = Pipe()
    os.set_blocking(ours.fileno(), False)
    try:
        while True:
            ours.send_bytes(b".")  # as had been sent for minutes, where the timeout is an hour
    except BlockingIOError:
        os.set_blocking(ours.fileno(), True)
    heard = threading.Event()
    pulse.lead({1: ours}, 1.0, lambda rank, reason: heard.set())
    try:
        assert heard.wait(30)
    finally:
        theirs.close()
