"""Which backends a machine can be trusted with: each is built, compared with diffusers and timed beside it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from cinecat.engines.backends import choice
from cinecat.engines.backends.building import build_engine, open_store
from cinecat.engines.backends.contract import Engine
from cinecat.engines.backends.loading import LoadedStack, load_stack, size_grids
from cinecat.engines.backends.parity import Case, Outcome, ParitySuite, standard_cases
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.errors import EngineError, ModelError, SettingError
from cinecat.engines.messages import CoreConfig
from cinecat.engines.model import find_device, synchronize
from cinecat.engines.tokens.grid import Grid

SIZES = ((64, 64, 17), (128, 128, 17), (192, 192, 17))
"""Of clips in pixels and frames, where none is asked for: for small models."""

DIFFUSERS = "diffusers"

State = Literal["passed", "failed", "missing"]
Announce = Callable[[str, float], object]
"""Hears what is being done, and the share of all that is done."""

_KEEP_RATIO = 0.5
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt", "torch_tensorrt")


@dataclass(frozen=True)
class Timing:
    """A forward of one plain row on several sides, measured in turn.

    Attributes:
        size: width, height and frames of the clip.
        path: "uniform" or "cat".
        tokens: of the row.
        seconds: samples by side: DIFFUSERS (uniform only), "torch" and the backend.
    """

    size: str
    path: str
    tokens: int
    seconds: Mapping[str, tuple[float, ...]]

    def quartiles(self, side: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of a side's samples, in seconds."""
        return _quartiles(self.seconds[side])

    def ratio(self, ours: str, theirs: str) -> tuple[float, float, float]:
        """The same of ours / theirs over the pairs."""
        return _quartiles([a / b for a, b in zip(self.seconds[ours], self.seconds[theirs], strict=True)])


@dataclass(frozen=True)
class BackendReport:
    """What became of one backend.

    Attributes:
        state: "passed" when it computes what diffusers does; "missing" when it cannot run here.
        message: why it did not pass, or what to install.
        versions: of the libraries that its engines depend on.
        build_seconds: 0 where the engine was in the cache already, or needs no build.
        size_bytes: of the engine's files.
    """

    name: str
    state: State
    message: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    build_seconds: float = 0.0
    size_bytes: int = 0
    outcomes: tuple[Outcome, ...] = ()
    timings: tuple[Timing, ...] = ()


@dataclass(frozen=True)
class Acceptance:
    """The report on a machine.

    Attributes:
        machine: what it is, in words by name.
        versions: of the packages that matter.
        config: model, device, dtype and sizes that were asked for.
    """

    machine: Mapping[str, str]
    versions: Mapping[str, str]
    config: Mapping[str, object]
    backends: tuple[BackendReport, ...]

    @property
    def accepted(self) -> bool:
        """Whether every backend that can run here passed."""
        return all(backend.state != "failed" for backend in self.backends)

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured, as plain data."""
        data = asdict(self) | {"accepted": self.accepted}
        for told, backend in zip(data["backends"], self.backends, strict=True):
            for entry, outcome in zip(told["outcomes"], backend.outcomes, strict=True):
                entry |= {"name": str(outcome.case), "passed": outcome.passed}
            for entry, timing in zip(told["timings"], backend.timings, strict=True):
                entry["quartiles"] = {side: timing.quartiles(side) for side in timing.seconds}
                rivals = [side for side in timing.seconds if side != backend.name]
                entry["ratios"] = {side: timing.ratio(backend.name, side) for side in rivals}
        return data


def backend_names() -> tuple[str, ...]:
    """All backends, torch first."""
    return (choice.TORCH, *(backend.name for backend in choice.BACKENDS))


def accept(config: CoreConfig, names: Sequence[str], pairs: int, announce: Announce) -> Acceptance:
    """Builds, compares and times backends.

    Args:
        config: of a server; its `engine` does not matter, its `engine_sizes` are the sizes to run.
        names: of backends.
        pairs: samples of every timing, after one that does not count.

    Raises:
        ModelError: the model cannot be loaded here.
        SettingError: a size is none of the model's, or a name is no backend's.
    """
    for name in names:
        if name != choice.TORCH:
            choice.find_backend(name)
    work = _Work(announce, 1 + len(names) * 2)
    # Before this process holds the weights: building loads them once more.
    begun = [_build(config, name, work) for name in names]
    work.next("loading the model")
    loaded = load_stack(config)
    grids = size_grids(loaded.checkpoint, config.engine_sizes, loaded.transformer.config.patch_size[1])
    trial = _Trial(config, loaded, grids, pairs, work)
    backends = tuple(report if report.state != "passed" else trial.run(report) for report in begun)
    return Acceptance(
        machine=_machine(loaded.stack.device),
        versions=_versions(),
        config={
            "model": config.model,
            "fingerprint": loaded.spec.model,
            "device": str(loaded.stack.device),
            "dtype": loaded.spec.dtype,
            "sizes": [_words(size) for size in config.engine_sizes],
            "style_slots": config.style_slots,
            "max_rank": config.max_rank,
            "pairs": pairs,
        },
        backends=backends,
    )


class _Work:
    """How far everything is."""

    def __init__(self, announce: Announce, parts: int) -> None:
        self._announce, self._parts, self._done = announce, parts, -1
        self._doing = ""

    def next(self, doing: str) -> None:
        """A part begins."""
        self._done += 1
        self._doing = doing
        self._announce(doing, min(self._done / self._parts, 1.0))

    def detail(self, step: str, share: float = 0.0) -> None:
        """Where in the part it is."""
        self._announce(f"{self._doing}: {step}", min((self._done + share) / self._parts, 1.0))


def _build(config: CoreConfig, name: str, work: _Work) -> BackendReport:
    work.next(name)
    if name == choice.TORCH:
        return BackendReport(name, "passed", versions={"torch": torch.__version__})
    backend = choice.find_backend(name)
    if problem := backend.missing(find_device(config.device)):
        return BackendReport(name, "missing", problem)
    try:
        built = build_engine(replace(config, engine=name), work.detail)
    except (ModelError, SettingError):
        raise
    except EngineError as error:
        return BackendReport(name, "failed", str(error), backend.versions())
    return BackendReport(
        name, "passed", versions=backend.versions(), build_seconds=built.seconds, size_bytes=built.size_bytes
    )


class _Trial:
    """Compares and times engines of one loaded model."""

    def __init__(
        self, config: CoreConfig, loaded: LoadedStack, grids: tuple[Grid, ...], pairs: int, work: _Work
    ) -> None:
        self._config, self._loaded, self._grids, self._pairs, self._work = config, loaded, grids, pairs, work
        self._suite = ParitySuite(loaded.transformer, loaded.spec)

    def run(self, report: BackendReport) -> BackendReport:
        """The report of a backend that is built, with what it computes and how fast."""
        self._work.next(report.name)
        outcomes: list[Outcome] = []
        try:
            engine, most_rows = self._engine(report.name)
            cases = standard_cases(self._grids, most_rows, self._loaded.spec.slots)
            for number, case in enumerate(cases):
                self._work.detail(str(case), 0.5 * number / len(cases))
                outcomes.append(self._suite.check(engine, case))
            timings = self._times(report.name, engine)
        except Exception as error:  # foreign runtimes fail in many ways; the others are still to be judged
            return replace(report, state="failed", message=f"{report.name}: {error}", outcomes=tuple(outcomes))
        wrong = [outcome for outcome in outcomes if not outcome.passed]
        if wrong:
            # A NaN is worse than any number.
            worst = max(wrong, key=lambda outcome: (outcome.error != outcome.error, outcome.error))
            message = (
                f"{report.name}: {len(wrong)} of {len(outcomes)} cases differ from diffusers, the worst by "
                f"{worst.error:.1e} of its largest value where {worst.tolerance:.0e} is allowed: {worst.case}"
            )
            report = replace(report, state="failed", message=message)
        return replace(report, outcomes=tuple(outcomes), timings=timings)

    def _engine(self, name: str) -> tuple[Engine, int]:
        """A backend's engine, and the most rows to give it."""
        stack, spec = self._loaded.stack, self._loaded.spec
        if name == choice.TORCH:
            return TorchEngine(stack), 3
        backend = choice.find_backend(name)
        files = open_store(self._config).get(choice.engine_key(backend, spec))
        if files is None:
            raise EngineError("its engine has gone from the cache; let engine_cache_gib hold all of them")
        most = 3 if backend.any_shape else max(bucket.rows.most for bucket in spec.buckets)
        return backend.load(stack, spec, files), min(most, 3)

    def _times(self, name: str, engine: Engine) -> tuple[Timing, ...]:
        timings: list[Timing] = []
        for size, grid in zip(self._config.engine_sizes, self._grids, strict=True):
            for keep_ratio in (1.0, _KEEP_RATIO):
                case = Case(grid, keep_ratio, (9,), (0,))
                done = 0.5 + 0.5 * len(timings) / (2 * len(self._grids))
                self._work.detail(f"timing {_words(size)}, {case.path}", done)
                sides = {choice.TORCH: self._suite.forward(TorchEngine(self._loaded.stack), case)}
                if case.path == "uniform":
                    sides[DIFFUSERS] = self._suite.reference_forward(case)
                sides[name] = self._suite.forward(engine, case)
                timings.append(Timing(_words(size), case.path, case.tokens, self._interleave(sides)))
        return tuple(timings)

    def _interleave(self, sides: Mapping[str, Callable[[], object]]) -> dict[str, tuple[float, ...]]:
        """Seconds of every side, one sample of each per round and every other round in the opposite order."""
        device = self._loaded.stack.device
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(-1, self._pairs):
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                synchronize(device)
                started = time.perf_counter()
                sides[name]()
                synchronize(device)
                if number >= 0:
                    samples[name].append(time.perf_counter() - started)
        return {name: tuple(values) for name, values in samples.items()}


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _words(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def _machine(device: torch.device) -> dict[str, str]:
    machine = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "CPU features": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        machine["CUDA"] = str(torch.version.cuda)
    return machine


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return found
