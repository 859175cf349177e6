"""A running server follows its settings: replicas and models join, are replaced and leave, and no job is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from cinecat.engines.errors import ModelError
from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.server.artifacts import ArtifactStore
from cinecat.server.cards import Seat
from cinecat.server.circuit import Circuit
from cinecat.server.core_gauges import CoreGauges
from cinecat.server.errors import RequestError
from cinecat.server.fleet import Fleet
from cinecat.server.live_job import LiveJob
from cinecat.server.loading import Loaded, Loader
from cinecat.server.models import describe_model
from cinecat.server.patience import Patience
from cinecat.server.replica import Replica
from cinecat.server.settings import Settings, SettingsError
from cinecat.server.staffing import Staffing
from cinecat.server.style_activity import StyleActivity
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb
from tests.server.line import ended
from tests.server.samples import Front, front, model_info, new_job, until
from tests.server.scripted_core import ScriptedCore

SUCCEEDED = pb.JOB_STATE_SUCCEEDED
DENOISING = pb.JOB_STATE_DENOISING


@dataclass(frozen=True)
class ScriptedLoader(Loader):
    """Loads scripted cores; a checkpoint is called what its folder is called.

    Attributes:
        room: for so many more; then a load waits.
        loaded: path of the model, device and core of each, in the order of loading.
    """

    loaded: list[tuple[str, str, ScriptedCore]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(100))

    async def load(self, name: str, settings: Settings, seat: Seat) -> Loaded:
        if settings.model in self.broken:
            raise ModelError(f"model: {settings.model} is broken")
        await self.room.acquire()
        core: Any = ScriptedCore()
        core.gate.clear()
        self.loaded.append((settings.model, seat.device, core))
        info = replace(model_info(), name=name or Path(settings.model).parts[0])
        replica = Replica(core, CoreGauges(self.metrics), self.activity, seat)
        self.fleet.cores.add(core)
        return Loaded(replica, info, describe_model(info, settings))


class House:
    """A fleet, and who staffs it."""

    def __init__(self, f: Front, folder: Path) -> None:
        self.front = f
        patience, circuit = Patience(), Circuit()
        self.fleet = Fleet(f.jobs, patience, circuit, 10, f.metrics)
        self.loader = ScriptedLoader(
            self.fleet,
            f.jobs,
            f.inputs,
            ArtifactStore(str(folder / "artifacts")),
            f.checkpoints,
            StyleRegistry([BUNDLED]),
            StyleActivity(),
            f.metrics,
            patience,
            circuit,
            None,
            self._on_change,
        )
        self.staffing = Staffing(self.fleet, self.loader)

    async def _on_change(self) -> None:
        pass

    @property
    def cores(self) -> list[ScriptedCore]:
        return [core for _, _, core in self.loader.loaded]

    @property
    def models(self) -> list[str]:
        return [model.name for model in self.fleet.models]

    def replicas(self, model: str, state: str = "ready") -> float | None:
        return self.front.registry.get_sample_value("cinecat_replicas", {"model": model, "state": state})

    async def enqueue(self, name: str, model: str = "wan-tiny", steps: int = 2) -> LiveJob:
        job = new_job(name)
        job.clip.model, job.clip.steps = model, steps
        live = await self.front.accept(job)
        self.fleet.enqueue(live)
        return live

    def release(self) -> None:
        for core in self.cores:
            core.gate.set()


def with_house(folder: Path, scenario: Callable[[House], Any], **settings: Any) -> None:
    async def run() -> None:
        async with house(folder) as running:
            await running.staffing.start(Settings.model_validate(settings))
            await asyncio.wait_for(scenario(running), 60)

    asyncio.run(run())


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    async with front(folder) as f:
        running = House(f, folder)
        yield running
        running.release()
        await running.staffing.close()
        await running.fleet.drain(60, asyncio.Event())
        await running.fleet.stop()
        assert not running.fleet.broken.done()


OTHER = {"other": {"model": "big", "default_size": "256x256x5"}}


def test_replicas_join_and_leave_while_jobs_run(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        jobs = [await h.enqueue(name) for name in "abc"]
        await until(lambda: jobs[0].job.state == DENOISING)
        await h.staffing.reconcile(Settings(replicas=3))
        await until(lambda: all(live.job.state == DENOISING for live in jobs))
        assert [core.begun for core in h.cores] == [["a"], ["b"], ["c"]]
        assert [device for _, device, _ in h.loader.loaded] == ["auto", "auto:1", "auto:2"]
        await h.staffing.reconcile(Settings(replicas=1))
        await until(lambda: h.replicas("wan-tiny", "draining") == 2)
        assert h.replicas("wan-tiny") == 1
        h.release()
        await ended(*jobs)
        assert {live.job.state for live in jobs} == {SUCCEEDED}
        await until(lambda: len(h.fleet.cores) == 1)
        assert [core.died.is_set() for core in h.cores] == [False, True, True]

    with_house(tmp_path, scenario)


def test_a_job_that_outlasts_the_drain_of_its_replica_goes_on_in_another(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        a, b = [await h.enqueue(name, steps=300) for name in "ab"]
        await until(lambda: a.job.state == b.job.state == DENOISING)
        await h.staffing.reconcile(Settings(replicas=1, drain_seconds=0.0))
        h.release()
        await ended(a, b)
        assert {a.job.state, b.job.state} == {SUCCEEDED}
        assert set((h.cores[0].steps + h.cores[1].steps).values()) == {1}

    with_house(tmp_path, scenario, replicas=2, drain_seconds=0.0)


def test_a_model_that_is_new_is_offered_and_one_that_is_gone_ends_what_it_has(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        await h.staffing.reconcile(Settings(models=OTHER))
        assert h.models == ["wan-tiny", "other"]
        running = await h.enqueue("running", "other")
        waiting = await h.enqueue("waiting", "other")
        await until(lambda: running.job.state == DENOISING)
        await h.staffing.reconcile(Settings())
        assert h.models == ["wan-tiny"]
        with pytest.raises(RequestError, match="is not loaded; loaded: wan-tiny"):
            h.fleet.check(clip_pb2.ClipSpec(model="other", image=b"no image is needed"))
        assert not h.cores[1].died.is_set()
        h.release()
        await ended(running, waiting)
        assert {running.job.state, waiting.job.state} == {SUCCEEDED}
        await until(lambda: h.cores[1].died.is_set() and not h.fleet.leaving)
        assert h.cores[1].begun == ["running", "waiting"]
        info = h.front.registry.get_sample_value
        labels = {"family": "wan2.1-i2v-tiny", "device": "cpu", "dtype": "float32", "engine": "torch"}
        assert info("cinecat_model_info", {"model": "wan-tiny", **labels}) == 1
        assert info("cinecat_model_info", {"model": "other", **labels}) is None

    with_house(tmp_path, scenario)


def test_another_checkpoint_under_one_name_is_loaded_before_the_old_one_leaves(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        old = h.cores[1]
        running = await h.enqueue("running", "other")
        waiting = await h.enqueue("waiting", "other")
        await until(lambda: running.job.state == DENOISING)
        rolling = asyncio.create_task(h.staffing.reconcile(Settings(models={"other": {"model": "bigger"}})))
        await until(lambda: len(h.cores) == 3 and h.replicas("other", "draining") == 1)
        new = h.cores[2]
        await until(lambda: new.begun == ["waiting"])  # while the old one still has its job
        assert h.models == ["wan-tiny", "other"]
        h.release()
        await ended(running, waiting)
        await rolling
        assert (old.begun, old.died.is_set(), new.died.is_set()) == (["running"], True, False)
        assert {running.job.state, waiting.job.state} == {SUCCEEDED}

    with_house(tmp_path, scenario, models=OTHER)


def test_a_first_model_of_another_name_takes_the_place_of_the_former(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        running = await h.enqueue("running")
        await until(lambda: running.job.state == DENOISING)
        await h.staffing.reconcile(Settings(model="newer", models=OTHER))
        assert h.models == ["newer", "other"]
        h.release()
        await ended(running)
        assert running.job.state == SUCCEEDED
        await until(lambda: h.cores[0].died.is_set())

    with_house(tmp_path, scenario, models=OTHER)


def test_a_model_that_cannot_be_loaded_changes_nothing_but_the_log(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        h.loader.broken.add("bad")
        with structlog.testing.capture_logs() as logs:
            await h.staffing.reconcile(Settings(model="bad", models=OTHER | {"worse": {"model": "bad"}}))
        problems = {entry["setting"]: entry["error"] for entry in logs if entry["log_level"] == "error"}
        assert problems == {"model": "model: bad is broken", "models.worse": "model: bad is broken"}
        assert h.models == ["wan-tiny", "other"]
        h.release()
        live = await h.enqueue("a")
        await ended(live)
        assert live.job.state == SUCCEEDED

    with_house(tmp_path, scenario, models=OTHER)


def test_settings_that_need_a_restart_are_named_and_stay(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        with structlog.testing.capture_logs() as logs:
            await h.staffing.reconcile(Settings(max_queue=7, scheduling="fcfs", replicas=2))
        (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
        assert warning["settings"] == ["max_queue", "scheduling"]
        assert h.replicas("wan-tiny") == 2

    with_house(tmp_path, scenario)


def test_limits_of_a_model_change_without_another_core(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        await h.staffing.reconcile(Settings(max_steps=7, default_size="64x64x5", max_batch=2))
        (offered,) = h.fleet.models
        assert (offered.limits.max_steps, offered.defaults.width, offered.defaults.frames) == (7, 64, 5)
        assert (len(h.cores), h.fleet.pools[0].backlog.most_together) == (1, 2)

    with_house(tmp_path, scenario)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        pass

    with pytest.raises(SettingsError, match="models: wan-tiny is what the first model is called"):
        with_house(tmp_path, scenario, models={"wan-tiny": {"model": "wan-tiny"}})


def test_replicas_that_wait_for_room_hold_up_nobody_and_join_when_they_have_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with house(tmp_path) as h:
            object.__setattr__(h.loader, "room", asyncio.Semaphore(1))
            await h.staffing.start(Settings(executor="ray", replicas=3))
            await until(lambda: h.replicas("wan-tiny", "loading") == 2)
            job = await h.enqueue("a")
            h.release()
            await ended(job)
            assert job.job.state == SUCCEEDED

            h.loader.room.release()
            await until(lambda: h.replicas("wan-tiny") == 2)
            assert h.replicas("wan-tiny", "loading") == 1
            # One that waits is wanted no more, and no other leaves for it.
            await h.staffing.reconcile(Settings(executor="ray", replicas=2))
            await until(lambda: h.replicas("wan-tiny", "loading") == 0)
            h.loader.room.release()
            await h.staffing.reconcile(Settings(executor="ray", replicas=3))
            await until(lambda: h.replicas("wan-tiny") == 3)
            await h.staffing.reconcile(Settings(executor="ray", replicas=4))
            await until(lambda: h.replicas("wan-tiny", "loading") == 1)

    asyncio.run(scenario())


def test_a_replica_that_does_not_start_on_a_cluster_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinecat.server.patience._PAUSES_S", (0.0, 0.0))

    async def scenario() -> None:
        async with house(tmp_path) as h:
            await h.staffing.start(Settings(executor="ray"))
            h.loader.broken.add("wan-tiny")
            await h.staffing.reconcile(Settings(executor="ray", replicas=2))
            await asyncio.sleep(0.05)
            h.loader.broken.clear()
            await until(lambda: h.replicas("wan-tiny") == 2)

    with structlog.testing.capture_logs() as logs:
        asyncio.run(scenario())
    assert {entry["error"] for entry in logs if entry["event"] == "replica does not start"} == {
        "model: wan-tiny is broken"
    }
