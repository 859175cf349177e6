"""Client and AsyncClient behind one face, for tests that hold both to the same behaviour."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from cinecat import AsyncClient, Client, Event


class Twin(Protocol):
    def events(self, **clip: Any) -> list[Event]:
        """All events of a generation."""

    def watch(self, job_id: str, after_sequence: int = 0) -> list[Event]: ...

    def cancel_at(self, sequence: int, **clip: Any) -> list[Event]:
        """The events of a generation that is cancelled when `sequence` is seen; raises what it raises."""

    def result_twice(self, **clip: Any) -> list[object]:
        """What `result` gives when asked twice; an exception counts as what it gives."""

    def jobs(self, **arguments: Any) -> list[Any]: ...

    def call(self, method: str, *arguments: Any, **named: Any) -> Any: ...


class SyncTwin:
    def __init__(self, address: str, *, patience_s: float = 5.0, tenant: str | None = None) -> None:
        self._connect: Callable[[], Client] = lambda: Client(address, patience_s=patience_s, tenant=tenant)

    def events(self, **clip: Any) -> list[Event]:
        with self._connect() as client:
            return list(client.generate(**clip))

    def watch(self, job_id: str, after_sequence: int = 0) -> list[Event]:
        with self._connect() as client:
            return list(client.watch(job_id, after_sequence))

    def cancel_at(self, sequence: int, **clip: Any) -> list[Event]:
        with self._connect() as client:
            generation = client.generate(**clip)
            seen = []
            for event in generation:
                seen.append(event)
                if event.sequence == sequence:
                    generation.cancel()
            return seen

    def result_twice(self, **clip: Any) -> list[object]:
        with self._connect() as client:
            generation = client.generate(**clip)
            return [_outcome(generation.result), _outcome(generation.result)]

    def jobs(self, **arguments: Any) -> list[Any]:
        with self._connect() as client:
            return list(client.jobs(**arguments))

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        with self._connect() as client:
            return getattr(client, method)(*arguments, **named)


class AsyncTwin:
    def __init__(self, address: str, *, patience_s: float = 5.0, tenant: str | None = None) -> None:
        self._connect: Callable[[], AsyncClient] = lambda: AsyncClient(address, patience_s=patience_s, tenant=tenant)

    def events(self, **clip: Any) -> list[Event]:
        return asyncio.run(self._collect(lambda client: client.generate(**clip)))

    def watch(self, job_id: str, after_sequence: int = 0) -> list[Event]:
        return asyncio.run(self._collect(lambda client: client.watch(job_id, after_sequence)))

    def cancel_at(self, sequence: int, **clip: Any) -> list[Event]:
        async def run() -> list[Event]:
            async with self._connect() as client:
                generation = client.generate(**clip)
                seen = []
                async for event in generation:
                    seen.append(event)
                    if event.sequence == sequence:
                        await generation.cancel()
                return seen

        return asyncio.run(run())

    def result_twice(self, **clip: Any) -> list[object]:
        async def run() -> list[object]:
            async with self._connect() as client:
                generation = client.generate(**clip)
                answers = []
                for _ in range(2):
                    answers += await asyncio.gather(generation.result(), return_exceptions=True)
                return answers

        return asyncio.run(run())

    def jobs(self, **arguments: Any) -> list[Any]:
        return asyncio.run(self._collect(lambda client: client.jobs(**arguments)))

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        async def run() -> Any:
            async with self._connect() as client:
                return await getattr(client, method)(*arguments, **named)

        return asyncio.run(run())

    async def _collect(self, start: Callable[[AsyncClient], AsyncIterator[Any]]) -> list[Any]:
        async with self._connect() as client:
            return [item async for item in start(client)]


def _outcome(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except Exception as error:
        return error
