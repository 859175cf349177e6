"""Where forwards get their engine from: the cache, or torch while one is being built."""

from __future__ import annotations

import shlex

from cinecat.engines.backends.building import BackgroundBuild, open_store
from cinecat.engines.backends.choice import AUTO, BACKENDS, TORCH, check_fixed, engine_key, find_backend
from cinecat.engines.backends.contract import ANY_SHAPE, Backend, Engine, EngineSpec
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.store_events import Outcome, StoreEvent, log_event
from cinecat.engines.backends.store_folder import default_engine_folder
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.errors import EngineError, ModelError, SettingError
from cinecat.engines.memory import available_bytes
from cinecat.engines.messages import CoreConfig, EngineCacheEvent, EngineNews

_HEADROOM = 1.25
"""Of the memory that a second copy of the weights takes, for what building it takes besides."""


class EngineSource:
    """The engine that the settings name.

    While it is not built, requests run on torch where its weights may stay beside those of the engine, and the engine
    is built by another process meanwhile; where they may not, it has to be built before the server starts.
    """

    def __init__(self, stack: WanStack, spec: EngineSpec, config: CoreConfig, eager: Engine | None = None) -> None:
        """Takes the engine from the cache, or begins to build it.

        Args:
            eager: the engine torch, where that is more than the stack as it is.

        Raises:
            ModelError: the backend cannot run here, or its engine has to be built first.
        """
        self._stack, self._spec, self._config = stack, spec, config
        self._news: list[EngineNews | EngineCacheEvent] = []
        # As long as this lives, what it took is not pruned.
        self._store = open_store(config, self._heard)
        self._torch: Engine | None = eager or TorchEngine(stack)
        self._built: Engine | None = None
        self._build: BackgroundBuild | None = None
        if config.engine == TORCH:
            return
        if config.engine == AUTO:
            self._take_best()
            return
        self._backend = find_backend(config.engine)
        if problem := self._backend.missing(stack.device):
            raise ModelError(f"engine: {problem}")
        try:
            check_fixed(self._backend, config)
            stays = config.missing_engine != "refuse" and self._torch_may_stay(self._backend)
            if self._take(self._backend, stays):
                return
        except SettingError as error:
            raise ModelError(str(error)) from error
        except EngineError as error:
            raise ModelError(
                f"{error}; let cinecat engines prune remove what is damaged, or set engine to torch"
            ) from error
        if not stays:
            raise ModelError(
                f"engine: no {config.engine} engine is built for this model and these settings; build it first: "
                f"{build_command(config)}; or set missing_engine to torch, to serve meanwhile from a second copy of "
                "the weights"
            )
        self._build = BackgroundBuild(config)
        self._tell(f"no {config.engine} engine is built yet; serving from torch while one is")

    def current(self) -> Engine:
        """The engine for a request that begins now; it must run on the same one until its end."""
        self._look_after_build()
        if self._built is not None:
            return self._built
        assert self._torch is not None
        return self._torch

    def engine_for(self, tokens: tuple[int, ...]) -> Engine:
        """The engine for a request that begins now and whose steps have so many tokens.

        Raises:
            EngineError: the engine is not built for one of them, and torch may not stand in.
        """
        engine = self.current()
        if self._built is None or self._backend_takes(tokens):
            return engine
        if self._torch is None:
            sizes = ", ".join("x".join(map(str, size)) for size in self._config.engine_sizes)
            raise EngineError(
                f"size: the {self._built.name} engine is built for {sizes} alone; ask for one of them, or let the "
                "operator add this one to engine_sizes and run cinecat engines build"
            )
        return self._torch

    def most_rows(self, engine: Engine, tokens: int) -> int:
        """Rows of so many tokens that one of its engines takes in one forward; 0 for any number."""
        if engine is self._torch:
            return 0
        buckets = (ANY_SHAPE,) if self._backend.any_shape else self._spec.buckets
        return max((bucket.rows.most for bucket in buckets if tokens in bucket.tokens), default=0)

    @property
    def building(self) -> bool:
        """Whether the engine that the settings name is being built."""
        return self._build is not None

    @property
    def only_buckets(self) -> tuple[tuple[int, int], ...]:
        """Most rows, and tokens of each, of the only shapes that run; empty where all do."""
        if self._built is None or self._torch is not None or self._backend.any_shape:
            return ()
        return tuple((bucket.rows.most, bucket.tokens.most) for bucket in self._spec.buckets)

    def news(self) -> tuple[EngineNews | EngineCacheEvent, ...]:
        """What happened since the last call."""
        told, self._news = tuple(self._news), []
        return told

    def close(self) -> None:
        """Ends a build that runs."""
        if self._build is not None:
            self._build.stop()
            self._build = None

    def _tell(self, sentence: str) -> None:
        self._news.append(EngineNews(sentence, self.building))

    def _build_seconds(self) -> float:
        """Of the backend's engine in the cache; 0 where it is gone from there."""
        digest = engine_key(self._backend, self._spec).digest
        found = [entry.manifest for entry in self._store.entries() if entry.digest == digest]
        return next((manifest.build_seconds for manifest in found if manifest is not None), 0.0)

    def _heard(self, event: StoreEvent) -> None:
        log_event(event)
        self._news.append(EngineCacheEvent(event.outcome.value, event.seconds))

    def _backend_takes(self, tokens: tuple[int, ...]) -> bool:
        return self._backend.any_shape or all(map(self._covered, tokens))

    def _covered(self, count: int) -> bool:
        return any(count in bucket.tokens for bucket in self._spec.buckets)

    def _take_best(self) -> None:
        for backend in BACKENDS:
            if backend.missing(self._stack.device) is None and (backend.any_shape or self._config.engine_sizes):
                try:
                    if self._take(backend, self._torch_may_stay(backend)):
                        return
                except EngineError as error:
                    self._tell(f"{backend.name} is left out: {error}")

    def _take(self, backend: Backend, stays: bool) -> bool:
        """Loads a backend's engine from the cache; whether there is one.

        Args:
            stays: whether torch's weights are kept beside it.
        """
        key = engine_key(backend, self._spec)
        files = self._store.get(key)
        if files is None:
            return False
        try:
            self._built = backend.load(self._stack, self._spec, files)
        except EngineError:
            self._store.release(key)
            raise
        self._backend = backend
        if not stays:
            self._torch = None
            self._stack.release()
        return True

    def _torch_may_stay(self, backend: Backend) -> bool:
        if not backend.own_weights or self._config.missing_engine == "torch":
            return True
        if self._config.missing_engine == "refuse":
            return False
        available = available_bytes(self._stack.device)
        return available is None or available >= _HEADROOM * self._stack.size_bytes

    def _look_after_build(self) -> None:
        if self._build is None:
            return
        try:
            if not self._build.ended():
                return
            self.close()
            # The store that the other process built into has told that process.
            self._news.append(EngineCacheEvent(Outcome.BUILT.value, self._build_seconds()))
            # Where it was allowed to begin, torch stays: requests may be running on it.
            if self._take(self._backend, stays=True):
                self._tell(f"the {self._backend.name} engine is built; new requests run on it")
            else:
                self._tell(
                    f"the {self._backend.name} engine is built but not in the cache; is engine_cache_gib too small? "
                    "Serving from torch"
                )
        except EngineError as error:
            self.close()
            self._tell(f"{error}; serving from torch")


def build_command(config: CoreConfig) -> str:
    """The command line that builds the engine of these settings."""
    words = ["cinecat", "engines", "build", "--backend", config.engine, "--model", config.model]
    for option, value, default in (
        ("--model-variant", config.model_variant, ""),
        ("--device", config.device, AUTO),
        ("--dtype", config.dtype, AUTO),
        ("--style-slots", config.style_slots, 8),
        ("--max-rank", config.max_rank, 32),
        ("--engine-cache-dir", config.engine_cache_dir, str(default_engine_folder())),
    ):
        if value not in (default, ""):
            words += [option, str(value)]
    for option in config.engine_options:
        words += ["--option", option]
    for size in config.engine_sizes:
        words += ["--size", "x".join(map(str, size))]
    return shlex.join(words)
