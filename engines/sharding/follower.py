"""A follower's process: it has the blocks, the banks of the style slots and the VAE's decoder, and does as it is told.

Started by `leader.Leader` as `python -m cinecat.engines.sharding.follower ORDERS PULSE`, two inherited descriptors.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from cinecat.engines.errors import ModelError
from cinecat.engines.logs import configure_logging
from cinecat.engines.messages import Failure
from cinecat.engines.process import is_out_of_memory
from cinecat.engines.sharding.messages import (
    DecodeNext,
    EndDecoding,
    FollowerConfig,
    Forward,
    Loaded,
    Meet,
    Order,
    StartDecoding,
    Swap,
    TellTraffic,
)
from cinecat.engines.sharding.pulse import follow

if TYPE_CHECKING:
    from cinecat.engines.sharding.part import Part

log = logging.getLogger(__name__)


def main(orders: Connection, pulse: Connection) -> None:
    """Loads, says Loaded, and follows orders until the pipe closes."""
    # As in the leader: the front decides when to stop, not a terminal.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        config: FollowerConfig = orders.recv()
    except (EOFError, OSError):
        return  # its leader is gone already
    configure_logging(config.core.log_format, config.core.log_level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    follow(pulse, config.core.rank_timeout_seconds)
    try:
        from cinecat.engines.sharding.part import Part

        part = Part(config)
    except Exception as error:
        orders.send(_failure(error, config.rank))
        return
    orders.send(Loaded())
    while True:
        try:
            order: Order = orders.recv()
        except (EOFError, OSError):
            # Whatever else runs here belongs to a leader that is gone.
            os._exit(0)
        try:
            _carry_out(part, order, orders)
        except Exception as error:
            # The others are in the middle of it; the leader ends them all, and may tell whose fault it was.
            log.exception("rank %d failed", config.rank)
            orders.send(_failure(error, config.rank))
            os._exit(1)


def _carry_out(part: Part, order: Order, orders: Connection) -> None:
    match order:
        case Meet(port):
            part.meet(port)
        case Forward():
            part.forward(order)
        case Swap(slot):
            part.swap(slot)
        case StartDecoding() | DecodeNext() | EndDecoding():
            part.decode(order)
        case TellTraffic():
            orders.send(part.traffic())


def _failure(error: Exception, rank: int) -> Failure:
    message = f"rank {rank}: {error}" if str(error) else f"rank {rank}: {type(error).__name__}"
    if isinstance(error, ModelError):
        return Failure("model", message)
    if is_out_of_memory(error):
        return Failure("memory", f"out of memory: {message.splitlines()[0]}", fatal=True)
    return Failure("internal", message, fatal=True)


if __name__ == "__main__":
    main(*(Connection(int(descriptor)) for descriptor in sys.argv[1:3]))
