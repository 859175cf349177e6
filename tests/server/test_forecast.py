"""Forecasts say what the policy then does."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinecat.server.forecast import Remaining, forecast
from cinecat.server.policy import STRETCH, by_step
from cinecat.server.shares import BATCH_SHARE, Shares
from tests.server.simulation import CONDITION_S, SimulatedJob, Simulation


def job(name: str, seconds: float, *, tenant: str = "", interactive: bool = True, deadline: float = 0.0) -> Remaining:
    return Remaining(name, tenant, interactive, deadline, seconds)


def test_one_tenants_jobs_follow_one_another() -> None:
    jobs = [job("b", 2.0, deadline=2.0), job("a", 1.0, deadline=1.0)]
    assert forecast(jobs) == {"a": 1.0, "b": 3.0}


def test_tenants_go_side_by_side() -> None:
    jobs = [job("long", 3.0, tenant="a"), job("short", 1.0, tenant="b"), job("next", 1.0, tenant="b", deadline=1.0)]
    assert forecast(jobs) == {"short": 2.0, "next": 4.0, "long": 5.0}


def test_batch_jobs_come_after_and_have_their_share_meanwhile() -> None:
    done = forecast([job("preview", 9.0), job("render", 3.0, interactive=False)])
    assert done == pytest.approx({"preview": 10.0, "render": 12.0})
    tiny = forecast([job("preview", 9.0), job("render", 0.5, interactive=False)])
    assert tiny["render"] == pytest.approx(0.5 / BATCH_SHARE)


def test_previews_that_are_still_to_come_delay_renders() -> None:
    assert forecast([job("render", 3.0, interactive=False)], interactive_load=0.4) == pytest.approx({"render": 5.0})


def test_nothing_to_do_needs_no_time() -> None:
    assert forecast([]) == {}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.builds(
            SimulatedJob,
            job_id=st.uuids().map(str),
            arrival=st.just(0.0),
            interactive=st.booleans(),
            tenant=st.sampled_from("ab"),
            steps=st.integers(5, 40),
            step_seconds=st.sampled_from((0.05, 0.1)),
        ),
        min_size=1,
        max_size=12,
        unique_by=lambda each: each.job_id,
    )
)
def test_the_forecast_holds_in_simulated_time(jobs: list[SimulatedJob]) -> None:
    told = forecast(
        [
            Remaining(each.job_id, each.tenant, each.interactive, each.arrival + STRETCH * each.work, each.work)
            for each in jobs
        ]
    )
    simulation = Simulation(by_step, jobs, most_together=1)
    simulation.run()
    # Quanta are no flow, and what a tenant had in one class counts in the other too, which the forecast leaves out.
    several = len({each.tenant for each in jobs}) > 1
    errors = [abs(told[each.job_id] - (each.ended or 0.0)) for each in jobs]
    assert statistics.median(errors) <= (0.3 if several else 0.1) * simulation.now + CONDITION_S


def test_a_tenant_that_comes_back_starts_with_the_least_that_another_had() -> None:
    shares = Shares()
    shares.tenants({"a", "b"})
    shares.charge("a", 5.0)
    shares.charge("b", 3.0)
    shares.tenants({"a", "b", "c"})
    assert shares.tenant_seconds == {"a": 5.0, "b": 3.0, "c": 3.0}
    shares.tenants({"a"})
    shares.charge("a", 1.0)
    shares.tenants({"a", "b"})
    assert shares.tenant_seconds == {"a": 6.0, "b": 6.0}


def test_batch_jobs_are_due_once_they_are_owed_what_they_take_at_once() -> None:
    shares = Shares()
    shares.spent(False, 1.0, True)
    for _ in range(9):
        assert not shares.batch_is_due
        shares.spent(True, 1.0, True)
    shares.spent(True, 0.1, True)
    assert shares.batch_is_due
    shares.spent(False, 1.0, True)
    assert not shares.batch_is_due


def test_nothing_is_owed_to_a_class_that_wants_nothing() -> None:
    shares = Shares()
    shares.spent(True, 100.0, False)
    assert not shares.batch_is_due


def test_the_interactive_load_is_that_of_late() -> None:
    now = [0.0]
    shares = Shares(lambda: now[0])
    for _ in range(1000):
        now[0] += 1.0
        shares.arrived(0.3)
    assert shares.interactive_load() == pytest.approx(0.3, abs=0.02)
    now[0] += 600.0
    assert shares.interactive_load() == 0.0


def test_one_long_job_says_nothing_of_those_to_come() -> None:
    now = [0.0]
    shares = Shares(lambda: now[0])
    now[0] = 10.0
    shares.arrived(600.0)
    assert shares.interactive_load() == 0.0
