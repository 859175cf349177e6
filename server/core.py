"""An engine core as the front needs it, wherever it runs: one model, one call at a time."""

from __future__ import annotations

import asyncio
from typing import Protocol, TypeVar

from cinecat.engines.messages import Answer, Call, ModelInfo

A = TypeVar("A", bound=Answer)


class Core(Protocol):
    """What `executors.new_core` makes.

    Attributes:
        died: set when the core that `start` began has ended; a new event for each.
    """

    died: asyncio.Event

    @property
    def pid(self) -> int | None:
        """Of its process, where that is on this machine."""
        ...

    async def start(self) -> ModelInfo:
        """Starts the core and waits until its model is loaded.

        Raises:
            ModelError: the model cannot be served there.
            CoreDied: the core ended while loading.
        """
        ...

    async def restart(self) -> None:
        """Replaces a core that died. Raises as `start`, and ModelError when the model's files have changed."""
        ...

    async def call(self, call: Call, answer: type[A]) -> A:
        """Sends one call and waits for its answer; calls that come meanwhile wait for their turn.

        Raises:
            EngineError: the engine refused or failed; OutOfMemory, NoFreeSlot and EngineFault tell it apart.
            CoreDied: there is no engine any more.
        """
        ...

    def kill(self) -> None:
        """Ends the core at once; a call that waits for it comes back with CoreDied."""
        ...

    async def stop(self) -> None:
        """Lets the core end by itself, or kills it when it is busy."""
        ...
