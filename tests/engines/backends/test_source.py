"""Where forwards get their engine from, with backends that need no compiler."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cinecat.engines.backends import building, choice, source
from cinecat.engines.backends.building import BackgroundBuild, build_engine, open_store
from cinecat.engines.backends.contract import Bucket, Range
from cinecat.engines.backends.loading import LoadedStack, load_stack
from cinecat.engines.backends.parity import Case, ParitySuite
from cinecat.engines.backends.source import EngineSource, build_command
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.errors import EngineError, ModelError, SettingError
from cinecat.engines.messages import CoreConfig
from cinecat.engines.tokens.grid import Grid
from tests.engines.backends.sample_stack import FakeBackend, small_spec

CASE = Case(Grid(2, 4, 4), 1.0, (9,), (0,))


@pytest.fixture
def settings(config: CoreConfig, tmp_path: Path) -> CoreConfig:
    """Of a server with an empty cache of engines, for the backend `fake`."""
    return replace(config, engine="fake", engine_cache_dir=str(tmp_path / "engines"))


@pytest.fixture
def loaded(settings: CoreConfig) -> LoadedStack:
    return load_stack(settings)


def use(monkeypatch: pytest.MonkeyPatch, *backends: FakeBackend) -> None:
    monkeypatch.setattr(choice, "BACKENDS", backends)
    monkeypatch.setattr(source, "BACKENDS", backends)


def open_source(loaded: LoadedStack, settings: CoreConfig) -> EngineSource:
    return EngineSource(loaded.stack, loaded.spec, settings)


def build(settings: CoreConfig, name: str = "fake") -> building.Built:
    return build_engine(replace(settings, engine=name), lambda step: None)


class HereBuild:
    """A BackgroundBuild in this process, that ends when it is told."""

    done = False
    fails = False
    stopped = 0

    def __init__(self, config: CoreConfig) -> None:
        self._config = config

    def ended(self) -> bool:
        if self.fails:
            raise EngineError("engine: the build failed: no space left")
        if self.done:
            build(self._config)
        return self.done

    def stop(self) -> None:
        type(self).stopped += 1


class TestAuto:
    def test_it_takes_the_most_preferred_engine_that_is_built(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("best"), FakeBackend("absent", missing="absent: not here"), FakeBackend("fake"))
        build(settings)
        assert open_source(loaded, replace(settings, engine="auto")).current().name == "fake"
        build(settings, "best")
        assert open_source(loaded, replace(settings, engine="auto")).current().name == "best"

    def test_it_serves_from_torch_when_none_is_built(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake"))
        opened = open_source(loaded, replace(settings, engine="auto"))
        assert (opened.current().name, opened.building) == ("torch", False)


class TestNamed:
    def test_one_that_cannot_run_here_is_refused_with_what_to_install(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake", missing="fake: no driver; apt-get install driver"))
        with pytest.raises(ModelError, match=r"^engine: fake: no driver; apt-get install driver$"):
            open_source(loaded, settings)

    def test_one_that_is_not_built_is_refused_with_the_command_that_builds_it(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake"))
        with pytest.raises(ModelError) as refusal:
            open_source(loaded, replace(settings, missing_engine="refuse"))
        command = f"cinecat engines build --backend fake --model {settings.model} --device cpu --style-slots 2"
        assert f"{command} --max-rank 8 --engine-cache-dir {settings.engine_cache_dir}" in str(refusal.value)

    def test_a_backend_of_fixed_shapes_needs_sizes(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = FakeBackend("fake")
        backend.any_shape = False
        use(monkeypatch, backend)
        with pytest.raises(ModelError, match=r"^engine_sizes: fake builds for fixed sizes"):
            open_source(loaded, settings)

    def test_new_requests_run_on_torch_until_the_build_is_done(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake"))

        class Build(HereBuild):
            pass

        monkeypatch.setattr(source, "BackgroundBuild", Build)
        opened = open_source(loaded, replace(settings, missing_engine="torch"))
        before = opened.current()
        assert (before.name, opened.building) == ("torch", True)
        Build.done = True
        assert (opened.current().name, opened.building, Build.stopped) == ("fake", False, 1)
        # A request that began on torch ends on it.
        ParitySuite(loaded.transformer, loaded.spec).velocities(before, CASE)

    def test_a_build_that_fails_leaves_it_on_torch(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake"))

        class Build(HereBuild):
            fails = True

        monkeypatch.setattr(source, "BackgroundBuild", Build)
        opened = open_source(loaded, replace(settings, missing_engine="torch"))
        assert [opened.current().name for _ in range(2)] == ["torch", "torch"]
        assert not opened.building


class TestWeights:
    def test_those_of_torch_go_where_they_may_not_stay_and_the_engine_still_runs(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake", own_weights=True))
        build(settings)
        suite = ParitySuite(loaded.transformer, loaded.spec)
        expected = suite.velocities(TorchEngine(loaded.stack), CASE)[0]
        opened = open_source(loaded, replace(settings, missing_engine="refuse"))
        assert loaded.stack.size_bytes == 0
        assert loaded.transformer.blocks[0].ffn.net[2].weight.numel() == 0
        # Keys and values of the context, patches and head are made outside the engine.
        assert torch.equal(suite.velocities(opened.current(), CASE)[0], expected)

    @pytest.mark.parametrize(("available", "stays"), [(2**40, True), (0, False), (None, True)])
    def test_by_default_they_stay_where_memory_for_two_copies_is_free(
        self,
        loaded: LoadedStack,
        settings: CoreConfig,
        monkeypatch: pytest.MonkeyPatch,
        available: int | None,
        stays: bool,
    ) -> None:
        use(monkeypatch, FakeBackend("fake", own_weights=True))
        build(settings)
        monkeypatch.setattr(source, "available_bytes", lambda device: available)
        open_source(loaded, settings)
        assert (loaded.stack.size_bytes > 0) == stays

    def test_those_that_requests_began_on_stay_when_a_build_ends_short_of_memory(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake", own_weights=True))
        monkeypatch.setattr(source, "BackgroundBuild", HereBuild)
        opened = open_source(loaded, settings)
        before = opened.current()
        monkeypatch.setattr(source, "available_bytes", lambda device: 0)
        monkeypatch.setattr(HereBuild, "done", True)
        assert opened.current().name == "fake"
        suite = ParitySuite(loaded.transformer, loaded.spec)
        assert suite.check(before, CASE).passed


class TestCache:
    def test_an_engine_that_serves_is_not_pruned(
        self, loaded: LoadedStack, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake"))
        build(settings)
        opened = open_source(loaded, settings)
        assert opened.current().name == "fake"
        pruned = open_store(settings).prune(0)
        assert (len(pruned.removed), len(pruned.in_use)) == (0, 1)


class TestKey:
    def test_everything_that_an_engine_is_built_from_changes_it(self) -> None:
        backend, spec = FakeBackend("fake"), small_spec()
        changed = [
            replace(spec, **{name: value + 1 if isinstance(value, int) else f"{value}x"})
            for name, value in vars(spec).items()
            if name not in ("buckets", "options")
        ]
        changed.append(replace(spec, options=("ampere_plus",)))
        keys = {choice.engine_key(backend, each).digest for each in (spec, *changed)}
        assert len(keys) == len(changed) + 1 == 13

    def test_so_do_the_backend_and_its_libraries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = small_spec()
        newer = FakeBackend("fake")
        monkeypatch.setattr(newer, "versions", lambda: {"fake": "2"})
        keys = {choice.engine_key(each, spec).digest for each in (FakeBackend("fake"), FakeBackend("other"), newer)}
        assert len(keys) == 3

    @pytest.mark.parametrize("any_shape", [True, False])
    def test_buckets_do_only_where_shapes_are_fixed(self, any_shape: bool) -> None:
        backend = FakeBackend("fake")
        backend.any_shape = any_shape
        bucket = Bucket(Range(1, 1, 2), Range(32, 32, 32), Range(16, 32, 512))
        keys = {choice.engine_key(backend, spec).digest for spec in (small_spec(), small_spec(buckets=(bucket,)))}
        assert len(keys) == (1 if any_shape else 2)

    def test_a_variant_changes_it(self, config: CoreConfig, loaded: LoadedStack) -> None:
        assert loaded.spec.model == loaded.checkpoint.fingerprint
        assert (loaded.spec.slots, loaded.spec.max_rank) == (config.style_slots, config.max_rank)


class TestBuilding:
    def test_an_engine_that_is_there_is_not_built_again(
        self, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake"))
        first = build(settings)
        use(monkeypatch, FakeBackend("fake", built=False))
        again = build(settings)
        assert first.seconds > 0
        assert (again.seconds, again.folder, again.size_bytes) == (0, first.folder, first.size_bytes)

    def test_a_failed_build_leaves_nothing_and_the_next_works(
        self, settings: CoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(monkeypatch, FakeBackend("fake", built=False))
        with pytest.raises(EngineError, match="crashed"):
            build(settings)
        assert open_store(settings).entries() == []
        use(monkeypatch, FakeBackend("fake"))
        assert build(settings).size_bytes > 0

    @pytest.mark.slow
    def test_a_build_killed_half_way_leaves_the_cache_sound(
        self, settings: CoreConfig, loaded: LoadedStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        # From the root, where `tests` is found.
        process = subprocess.Popen(
            [sys.executable, "-c", HALF_BUILD, settings.model, settings.engine_cache_dir, tmp_path / "half"],
            cwd=Path(__file__).parents[3],
        )
        end = time.monotonic() + 120
        while not (tmp_path / "half").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()
        process.wait()
        use(monkeypatch, FakeBackend("fake"))
        assert open_source(loaded, replace(settings, engine="auto")).current().name == "torch"
        build(settings)
        assert open_source(loaded, settings).current().name == "fake"

    @pytest.mark.slow
    def test_a_process_beside_the_server_builds_a_real_engine(self, settings: CoreConfig, loaded: LoadedStack) -> None:
        real = replace(settings, engine="onnxruntime", missing_engine="torch")
        opened = open_source(loaded, real)
        try:
            end = time.monotonic() + 280
            assert opened.current().name == "torch"
            while opened.building:
                assert time.monotonic() < end
                time.sleep(0.2)
                opened.current()
            assert opened.current().name == "onnxruntime"
        finally:
            opened.close()

    @pytest.mark.slow
    def test_what_went_wrong_in_that_process_is_told(self, settings: CoreConfig) -> None:
        started = BackgroundBuild(replace(settings, engine="quantum"))
        try:
            started._process.wait(120)
            with pytest.raises(EngineError, match="the build failed: engine: 'quantum' is none that is built"):
                started.ended()
        finally:
            started.stop()


HALF_BUILD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from cinecat.engines.backends import choice
from cinecat.engines.backends.building import build_engine
from cinecat.engines.messages import CoreConfig
from tests.engines.backends.sample_stack import FakeBackend

class Slow(FakeBackend):
    def build(self, stack, spec, folder, announce):
        (folder / "half").write_text("half")
        Path(sys.argv[3]).touch()
        time.sleep(300)

choice.BACKENDS = (Slow("fake"),)
build_engine(
    CoreConfig(sys.argv[1], "cpu", "auto", 0, 2, 8, 0, engine="fake", engine_cache_dir=sys.argv[2]), lambda step: None
)
"""


class TestChoice:
    def test_another_name_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(SettingError, match=r"^engine: 'quantum' is none that is built; those are tensorrt, "):
            choice.find_backend("quantum")

    def test_buckets_are_for_every_rung_of_every_size(self) -> None:
        buckets = choice.buckets_for((Grid(5, 8, 8), Grid(2, 4, 4)))
        counts = [bucket.tokens.most for bucket in buckets]
        assert counts == sorted(set(counts), reverse=True)
        assert {320, 240, 160, 120, 80, 32, 24, 16, 8} <= set(counts)
        assert all(bucket.tokens.least == bucket.tokens.most for bucket in buckets)

    def test_the_command_that_builds_an_engine_quotes_its_words(self, settings: CoreConfig) -> None:
        command = build_command(replace(settings, model="my models/wan", engine_sizes=((832, 480, 81),)))
        assert "--model 'my models/wan'" in command
        assert command.endswith("--size 832x480x81")
