"""A running server follows its settings: replicas and models join, are replaced and leave, and no job is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import structlog

from cinecat.server.errors import RequestError
from cinecat.server.settings import Settings, SettingsError
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb
from tests.server.house import House, house, with_house
from tests.server.line import ended
from tests.server.samples import until

SUCCEEDED = pb.JOB_STATE_SUCCEEDED
DENOISING = pb.JOB_STATE_DENOISING


OTHER = {"other": {"model": "big", "default_size": "256x256x5"}}
TWO_OTHERS = {"other": {"model": "big", "replicas": 2}}


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


def test_a_roll_that_fails_half_through_is_taken_back_by_the_old_settings(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        running = await h.enqueue("running", "other")
        await until(lambda: running.job.state == DENOISING)
        rolled = {"other": {"model": "bigger", "replicas": 2}}
        rolling = asyncio.create_task(h.staffing.reconcile(Settings(models=rolled)))
        await until(lambda: h.replicas("other", "draining") == 1)
        h.loader.broken.add("bigger")  # after its first replica has joined, and before the second is loaded
        h.release()
        await ended(running)
        await rolling
        assert [model for model, _, _ in h.loader.loaded] == ["wan-tiny", "big", "big", "bigger"]
        await h.staffing.reconcile(Settings(models=TWO_OTHERS))
        assert [model for model, _, _ in h.loader.loaded] == ["wan-tiny", "big", "big", "bigger", "big"]
        assert [core.died.is_set() for core in h.cores][-1] is False
        assert h.replicas("other") == 2

    with_house(tmp_path, scenario, models=TWO_OTHERS)


def test_fewer_replicas_with_other_settings_are_all_new_ones(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        await h.staffing.reconcile(Settings(replicas=2, max_rank=16))
        await until(lambda: len(h.fleet.cores) == 2)
        assert [core.died.is_set() for core in h.cores] == [True, True, True, False, False]

    with_house(tmp_path, scenario, replicas=3)


def test_a_job_that_is_accepted_while_its_model_leaves_is_not_forgotten(tmp_path: Path) -> None:
    async def scenario(h: House) -> None:
        h.loader.unloading.clear()
        await h.staffing.reconcile(Settings())
        await until(lambda: not h.fleet.leaving[0].replicas)
        late = await h.enqueue("late", "other")
        h.loader.unloading.set()
        await ended(late)
        assert late.job.state == pb.JOB_STATE_FAILED
        assert "accepted for the model other, which this server no longer has" in late.job.error.message

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
