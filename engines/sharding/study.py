"""Layouts of ranks beside one process: whether they compute the same, what they send, and how long a forward takes."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cinecat.engines.backends.contract import Engine, StackInputs
from cinecat.engines.backends.loading import served_spec
from cinecat.engines.backends.parity import Case, ParitySuite
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.messages import CoreConfig, Failure
from cinecat.engines.model import find_device, load_transformer, synchronize
from cinecat.engines.sharding.choice import for_ranks
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.leader import Leader
from cinecat.engines.sharding.volume import ForwardShape, sent_bytes


@dataclass(frozen=True)
class Exchanged:
    """Bytes that a rank sent in one forward, by the kind of exchange, and what the formula says."""

    rank: int
    measured: dict[str, int]
    reckoned: dict[str, int]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Measured over reckoned, of every kind; infinite where the formula knows none."""
        kinds = self.measured.keys() | self.reckoned.keys()
        counts = [(self.measured.get(kind, 0), self.reckoned.get(kind, 0)) for kind in kinds]
        return tuple(measured / reckoned if reckoned else math.inf for measured, reckoned in counts)


@dataclass(frozen=True)
class CaseResult:
    """One case on one layout.

    Attributes:
        difference: largest between velocities of all ranks and of one process; NaN where either is.
        exchanged: of every rank, in the forward that brings the context and in one that does not.
    """

    case: Case
    difference: float
    exchanged: tuple[Exchanged, ...]


@dataclass(frozen=True)
class LayoutResult:
    """One layout.

    Attributes:
        cases: that were compared.
        timed: the case of the timings.
        alone, together: seconds of its forward in one process and on all ranks, in turn; a process has as many threads.
        exchanging: seconds of them that the first rank spent in exchanges, waiting for others included.
    """

    layout: Layout
    cases: tuple[CaseResult, ...]
    timed: Case
    alone: tuple[float, ...]
    together: tuple[float, ...]
    exchanging: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Time on all ranks over that of one process, the median of the pairs."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.together, self.alone, strict=True))


def study_layout(config: CoreConfig, layout: Layout, cases: Sequence[Case], timed: Case, pairs: int) -> LayoutResult:
    """Starts the ranks of a layout, compares every case, and times one.

    Args:
        config: of a server; its `shard` does not matter.
        pairs: of timings, after one that does not count.

    Raises:
        ModelError: the model cannot be loaded.
    """
    with _Sides.of(config, layout) as sides:
        found = tuple(sides.compare(case) for case in cases)
        alone, together, exchanging = sides.time(timed, pairs)
    return LayoutResult(layout, found, timed, alone, together, exchanging)


class _Watched:
    """An engine that remembers what it was last given."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self._engine = engine
        self.inputs: StackInputs | None = None

    def covers(self, inputs: StackInputs) -> bool:
        return self._engine.covers(inputs)

    def __call__(self, inputs: StackInputs) -> torch.Tensor:
        self.inputs = inputs
        return self._engine(inputs)

    @property
    def seen(self) -> StackInputs:
        assert self.inputs is not None, "it has run"
        return self.inputs


class _Sides:
    """One stack of blocks in this process alone, and one over the same weights whose attention asks all ranks."""

    def __init__(self, config: CoreConfig, leader: Leader) -> None:
        """Loads the model, and meets the leader's followers."""
        self._leader, self._device = leader, find_device(config.device)
        checkpoint = find_checkpoint(config.model)
        transformer = load_transformer(checkpoint, config.device, config.dtype)
        attend = leader.meet(self._device, _lost)
        self._alone = _Watched(TorchEngine(WanStack(transformer)))
        stack = WanStack(transformer, attend)
        spec = served_spec(checkpoint, checkpoint.fingerprint, transformer, config)
        self._suite = ParitySuite(transformer, spec)
        self._together = _Watched(leader.engine(transformer, stack, "none"))
        for slot in range(1, 1 + spec.slots):
            leader.share_slot(self._suite.slots.engine_banks, slot)
        self._heads = spec.heads

    @classmethod
    @contextmanager
    def of(cls, config: CoreConfig, layout: Layout) -> Iterator[_Sides]:
        """Ends the followers in the end."""
        config = for_ranks(find_checkpoint(config.model), config, layout)
        if config.threads:
            torch.set_num_threads(config.threads)
        leader = Leader(config, layout)
        try:
            yield cls(config, leader)
        finally:
            leader.close()

    def compare(self, case: Case) -> CaseResult:
        """Of a case whose prompts have room for padding, so that its context is new to the ranks."""
        expected = self._suite.velocities(self._alone, case)
        self._leader.traffic()
        found = self._suite.velocities(self._together, case)
        exchanged = self._exchanged(fresh=True)
        self._run(self._together, self._together.seen)
        exchanged += self._exchanged(fresh=False)
        differences = [(ours - theirs).abs().max() for ours, theirs in zip(found, expected, strict=True)]
        # Unlike Python's, this maximum keeps a NaN.
        return CaseResult(case, float(torch.stack(differences).max()), exchanged)

    def time(self, case: Case, pairs: int) -> tuple[tuple[float, ...], ...]:
        """Seconds alone, together, and of the latter in exchanges, in pairs."""
        self._suite.velocities(self._together, case)
        inputs = self._together.seen
        samples: list[tuple[float, float, float]] = []
        for _ in range(1 + pairs):
            alone = self._run(self._alone, inputs)
            self._leader.traffic()
            together = self._run(self._together, inputs)
            samples.append((alone, together, self._leader.traffic()[0].seconds))
        return tuple(zip(*samples[1:], strict=True))

    @torch.inference_mode()
    def _run(self, engine: Engine, inputs: StackInputs) -> float:
        synchronize(self._device)
        started = time.perf_counter()
        engine(inputs)
        synchronize(self._device)
        return time.perf_counter() - started

    def _exchanged(self, fresh: bool) -> tuple[Exchanged, ...]:
        """What all ranks have sent since the last time, in one forward."""
        shape, layout = shape_of(self._together.seen, self._heads), self._leader.layout
        return tuple(
            Exchanged(rank, _known(traffic.sent), sent_bytes(shape, layout, rank, fresh).kinds())
            for rank, traffic in enumerate(self._leader.traffic())
        )


def shape_of(inputs: StackInputs, heads: int) -> ForwardShape:
    """The shape of a forward with such inputs."""
    rows, tokens, dim = inputs.tokens.shape
    return ForwardShape(
        layers=inputs.text_keys.shape[0],
        heads=heads,
        dim=dim,
        rows=rows,
        tokens=tokens,
        text=inputs.text_keys.shape[2],
        image=inputs.image_keys.shape[2],
        value_bytes=inputs.tokens.element_size(),
        biased=inputs.key_bias is not None,
        styled=inputs.styles is not None,
    )


def _known(sent: Counter[str]) -> dict[str, int]:
    return {kind: count for kind, count in sent.items() if count}


def _lost(words: Failure | None) -> None:
    """A rank is gone; the others wait for it in vain, and so does this process."""
    print(f"a rank is gone: {words.message if words else 'it did not say why'}", file=sys.stderr)
    os._exit(1)
