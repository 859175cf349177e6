"""One rank's end of the exchanges between ranks, counted: torch.distributed, NCCL on GPUs and gloo on CPUs."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cinecat.engines.errors import RanksLost
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.traffic import Traffic

_LOCALHOST = "127.0.0.1"

# Ranks of a replica are on one machine; gloo would look for the address of its name.
_LOOPBACK = Path("/sys/class/net/lo")
_INTERFACE = ("GLOO_SOCKET_IFNAME", "lo")

_AHEAD = 2
"""Exchanges that are queued on a GPU before the first of them is over. NCCL's timeout counts from when an exchange is
queued, and a whole forward, which may take longer, is queued in no time.
"""


def open_store(layout: Layout, port: int | None = None) -> TCPStore:
    """What ranks find each other by: the leader's, on a port that is free, or for a follower the one at a port."""
    if port is not None:
        return TCPStore(_LOCALHOST, port, layout.ranks)
    # Of this machine alone; a socket of its own the store would open to every network.
    listening = socket.create_server((_LOCALHOST, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        _LOCALHOST, port, layout.ranks, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


@contextmanager
def in_step() -> Iterator[None]:
    """Raises RanksLost for whatever goes wrong on the leader in what all ranks do: the others are half through it."""
    try:
        yield
    except Exception as error:
        raise RanksLost(f"{type(error).__name__}: {error}") from error


class Ranks:
    """The process groups that this rank is in.

    Attributes:
        traffic: what this rank has sent.
        sequence_group: of the ranks that share the tokens of its rows.
    """

    def __init__(
        self, layout: Layout, rank: int, device: torch.device, store: TCPStore, timeout_seconds: float
    ) -> None:
        """Meets the others, who must come too.

        Args:
            store: that all of them share.
            timeout_seconds: after which an exchange that nobody answers is an error.

        Raises:
            RuntimeError: they did not come.
        """
        self.layout, self.rank, self.device = layout, rank, device
        if device.type == "cuda":
            # NCCL wants a number, and FSDP takes the current device, which it is not where weights wait on the host.
            self.device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(self.device)
        self.place = layout.place(rank)
        self.traffic = Traffic()
        self._marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        timeout = timedelta(seconds=timeout_seconds)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "gloo" and _LOOPBACK.is_dir():
            os.environ.setdefault(*_INTERFACE)
        # With its device NCCL meets at once: it must not do so in the first exchange, in which not all ranks take part.
        at_once = self.device if backend == "nccl" else None
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=layout.ranks, timeout=timeout, device_id=at_once
        )

        def own_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup:
            # Everybody makes all of them, in one order.
            made: list[dist.ProcessGroup] = [dist.new_group(list(group), timeout=timeout) for group in groups]
            return next(each for each, group in zip(made, groups, strict=True) if rank in group)

        u, s = layout.ulysses, layout.sequence
        self._ulysses_group = own_group([range(start, start + u) for start in range(0, layout.ranks, u)])
        self.sequence_group = own_group([range(start, start + s) for start in range(0, layout.ranks, s)])

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        dist.destroy_process_group()

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Gives each rank of the Ulysses group its part and gets theirs: [ulysses, ...] to [ulysses, ...]."""
        received = torch.empty_like(parts)
        with self.timed():
            dist.all_to_all_single(received, parts, group=self._ulysses_group)
        self.traffic.add("all_to_all", parts.nbytes // self.layout.ulysses * (self.layout.ulysses - 1))
        return received

    def pass_on(self, block: Tensor) -> PassedOn:
        """Begins to send a block to the next rank of the ring, and to receive the block of the one before."""
        received = torch.empty_like(block)
        after, before = self._in_ring(1), self._in_ring(-1)
        ops = [dist.P2POp(dist.isend, block, after), dist.P2POp(dist.irecv, received, before)]
        self.traffic.add("ring", block.nbytes)
        return PassedOn(self, dist.batch_isend_irecv(ops), received, block)

    def exchange(self, kind: str, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> None:
        """Sends tensors to ranks and fills others with what ranks send."""
        ops = [dist.P2POp(dist.isend, tensor, rank) for tensor, rank in sent]
        ops += [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in received]
        if not ops:
            return
        for tensor, _ in sent:
            self.traffic.add(kind, tensor.nbytes)
        with self.timed():
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    def broadcast(self, kind: str, tensor: Tensor) -> None:
        """Fills the tensor of every rank with the leader's."""
        if self.leads:
            self.traffic.add(kind, tensor.nbytes * (self.layout.ranks - 1))
        with self.timed():
            dist.broadcast(tensor, 0)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the time of an exchange; on a GPU, that of the stream which waits for it."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            yield
            self.traffic.seconds += time.perf_counter() - started
            return
        while len(self._marks) >= _AHEAD:
            self._wait_for_first()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._marks.append((begin, end))

    def take_traffic(self) -> Traffic:
        """What was sent since the last call, and how long it took; waits for the device."""
        while self._marks:
            self._wait_for_first()
        return self.traffic.take()

    def _wait_for_first(self) -> None:
        begin, end = self._marks.popleft()
        end.synchronize()
        self.traffic.seconds += begin.elapsed_time(end) / 1000.0

    def _in_ring(self, steps: int) -> int:
        """The rank that is so many places further round the ring."""
        place, u = self.place, self.layout.ulysses
        ring = (place.ring + steps) % self.layout.ring
        return place.cfg * self.layout.sequence + ring * u + place.ulysses


class PassedOn:
    """A block on its way round the ring."""

    def __init__(self, ranks: Ranks, works: list[dist.Work], received: Tensor, sent: Tensor) -> None:
        self._ranks, self._works, self._received = ranks, works, received
        self._sent = sent  # must live as long as it is read

    def wait(self) -> Tensor:
        """The block of the rank before."""
        with self._ranks.timed():
            for work in self._works:
                work.wait()
        return self._received
