"""Signs of life between a leader and its followers, so that a process that hangs is told from one that works."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait

_BEAT = b"."


def follow(pulse: Connection, timeout_seconds: float) -> None:
    """Begins to beat, from a follower, once the leader does, which is when all have loaded. Where the leader is gone,
    before that too, this process ends at once; where it gives no sign of life, it ends the leader first, for whom
    nobody else could.
    """
    leader = os.getppid()

    def beat() -> None:
        try:
            pulse.recv_bytes()
        except (OSError, EOFError):
            os._exit(1)
        interval, heard = _interval(timeout_seconds), time.monotonic()
        woken = heard
        while True:
            if (now := time.monotonic()) - woken > timeout_seconds:
                heard = now  # it was this process that stood still, as when a machine is paused
            woken = now
            try:
                _beat(pulse)
                while pulse.poll(0):
                    pulse.recv_bytes()
                    heard = time.monotonic()
            except (OSError, EOFError):
                os._exit(1)
            if time.monotonic() - heard > timeout_seconds:
                if os.getppid() == leader:
                    os.kill(leader, signal.SIGKILL)
                os._exit(1)
            time.sleep(interval)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


def lead(
    pulses: Mapping[int, Connection], timeout_seconds: float, lost: Callable[[int, str], None]
) -> threading.Thread:
    """Begins to beat, from the leader.

    Args:
        pulses: by rank.
        lost: hears of the first rank that is gone, in the thread that watches, and why; then the watch ends.
    """
    ranks = {pulse: rank for rank, pulse in pulses.items()}

    def beat() -> None:
        interval = _interval(timeout_seconds)
        heard = dict.fromkeys(ranks, time.monotonic())
        started = time.monotonic()
        while True:
            before, started = started, time.monotonic()
            if started - before > timeout_seconds:
                heard = dict.fromkeys(ranks, started)  # it was this process that stood still
            for pulse, rank in ranks.items():
                try:
                    _beat(pulse)
                except OSError:
                    return lost(rank, "has ended")
            while (left := started + interval - time.monotonic()) > 0:
                for ready in wait(list(ranks), left):
                    assert isinstance(ready, Connection)
                    try:
                        ready.recv_bytes()
                    except (OSError, EOFError):
                        return lost(ranks[ready], "has ended")
                    heard[ready] = time.monotonic()
            for pulse, rank in ranks.items():
                if time.monotonic() - heard[pulse] > timeout_seconds:
                    return lost(rank, f"has given no sign of life for {timeout_seconds:g} s")

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    return thread


def _beat(pulse: Connection) -> None:
    """Raises OSError where nobody is there. A pipe that is full has long not been read: to send is to wait."""
    if select.select([], [pulse], [], 0)[1]:
        pulse.send_bytes(_BEAT)


def _interval(timeout_seconds: float) -> float:
    return min(1.0, timeout_seconds / 5)
