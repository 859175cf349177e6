"""Building an engine for a server's settings, here or in a process of its own beside a server that goes on serving."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cinecat.engines.errors import EngineError
from cinecat.engines.messages import CoreConfig

if TYPE_CHECKING:
    from cinecat.engines.backends.store import EngineStore
    from cinecat.engines.backends.store_events import StoreEvent

_POLL_SECONDS = 1.0
_NICE = 10
_LAST_LINE = 300


@dataclass(frozen=True)
class Built:
    """An engine in the cache.

    Attributes:
        folder: of its files.
        seconds: that it took; 0 where it was there already.
        size_bytes: of its files.
    """

    backend: str
    digest: str
    folder: Path
    seconds: float
    size_bytes: int


def open_store(config: CoreConfig, announce: Callable[[StoreEvent], None] | None = None) -> EngineStore:
    """The cache that settings name; what happens in it goes to the log unless somebody else is told."""
    from cinecat.engines.backends.store import EngineStore
    from cinecat.engines.backends.store_events import log_event
    from cinecat.engines.backends.store_folder import default_engine_folder

    folder = Path(config.engine_cache_dir).expanduser() if config.engine_cache_dir else default_engine_folder()
    return EngineStore(folder, config.engine_cache_bytes or None, announce or log_event)


def build_engine(config: CoreConfig, announce: Callable[[str], object]) -> Built:
    """Builds the engine that a server with these settings would load, unless it is in the cache.

    Raises:
        EngineError, ModelError: it cannot be built; which setting is why.
    """
    from cinecat.engines.backends.choice import check_fixed, engine_key, find_backend
    from cinecat.engines.backends.loading import load_stack

    backend = find_backend(config.engine)
    check_fixed(backend, config)
    announce("loading the transformer")
    loaded = load_stack(config)
    stack, spec = loaded.stack, loaded.spec
    if problem := backend.missing(stack.device):
        raise EngineError(f"engine: {problem}")
    key = engine_key(backend, spec)
    started = time.monotonic()
    store = open_store(config)
    known = store.get(key)
    folder = known or store.build(key, lambda place: backend.build(stack, spec, place, announce))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = 0.0 if known else time.monotonic() - started
    store.release(key)
    return Built(backend.name, key.digest, folder, seconds, size)


class BackgroundBuild:
    """A build in a process of its own, which ends when this one does."""

    def __init__(self, config: CoreConfig) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            # A session of its own, so that compilers that it starts end with it.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(config)).encode())
        self._process.stdin.close()

    def ended(self) -> bool:
        """Whether it has ended.

        Raises:
            EngineError: it failed.
        """
        code = self._process.poll()
        if code:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            raise EngineError(f"engine: the build failed: {lines[-1][:_LAST_LINE] if lines else f'exit code {code}'}")
        return code is not None

    def stop(self) -> None:
        """Ends it, if it runs."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()


def _die_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """The process of a BackgroundBuild: settings as JSON on stdin."""
    _die_with(os.getppid())
    os.nice(_NICE)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    given = json.load(sys.stdin)
    given["engine_sizes"] = tuple(map(tuple, given["engine_sizes"]))
    given["engine_options"] = tuple(given["engine_options"])
    try:
        build_engine(CoreConfig(**given), lambda step: None)
    except EngineError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
