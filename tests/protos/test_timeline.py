"""`cinecat jobs trace`: where a job's time went, whatever became of it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinecat.cli.app import run
from cinecat.clip import job_from_proto
from cinecat.states import JobState
from cinecat.timeline import Moment, timeline
from cinecat.v1 import job_pb2
from tests.protos.scripted_server import Break, Hold, Script, failed, job, succeeded_job
from tests.protos.twins import Twin

START = datetime(2026, 11, 25, 12, tzinfo=UTC)
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
Q, C, D, V, M = JobState.QUEUED, JobState.CONDITIONING, JobState.DENOISING, JobState.DECODING, JobState.ENCODING


def history(*states: tuple[float, JobState, int], reason: str = "") -> list[Moment]:
    return [Moment(START + timedelta(seconds=at), state, step, wait_reason=reason) for at, state, step in states]


def made(**timings: float) -> job_pb2.Job:
    whole = succeeded_job()
    del whole.result.timings[:]
    for name, seconds in timings.items():
        entry = whole.result.timings.add(stage=job_pb2.Stage.Value(f"STAGE_{name.upper()}"))
        entry.duration.FromNanoseconds(round(seconds * 1e9))
    whole.create_time.FromDatetime(START)
    return whole


def test_a_clips_states_lie_end_to_end_with_its_stages_in_them() -> None:
    whole = made(queue=1, text_encode=0.5, image_encode=0.25, vae_encode=0.25, plan=0.1, denoise=3, mux=0.2)
    moments = history((0, Q, 0), (1, C, 0), (3, D, 0), (7, V, 4), (8, M, 4), (9, JobState.SUCCEEDED, 4))
    found = timeline(job_from_proto(whole), moments)
    laid_out = [(span.name, span.start_s, span.seconds) for span in found.spans]
    assert laid_out == [
        ("queued", 0, 1),
        ("conditioning", 1, 2),
        ("text_encode", 1, 0.5),
        ("image_encode", 1.5, 0.25),
        ("vae_encode", 1.75, 0.25),
        ("denoising", 3, 4),
        ("decoding", 7, 1),
        ("encoding", 8, 1),
    ]
    assert found.total_s == 9
    assert found.spans[5].note == "steps 1 to 4; 3.000 s of denoise, 0.100 s of plan"


def test_a_job_that_was_sent_out_says_why_and_where_it_went_on() -> None:
    moments = history((0, Q, 0), (1, C, 0), (2, D, 0))
    moments += history((4, Q, 2), reason="a more urgent clip needs the room")
    moments += history((6, C, 2), (7, D, 2), (9, D, 3))
    found = timeline(job_from_proto(job(job_pb2.JOB_STATE_DENOISING)), moments)
    assert [(span.name, span.note) for span in found.spans] == [
        ("queued", ""),
        ("conditioning", ""),
        ("denoising", "steps 1 to 2"),
        ("queued", "a more urgent clip needs the room"),
        ("conditioning", "goes on from step 2"),
        ("denoising", "steps 3 to 3"),
    ]


@given(
    st.lists(st.tuples(st.floats(-5, 100), st.sampled_from([Q, C, D, V, M]), st.integers(0, 9)), max_size=12),
    st.sampled_from([None, JobState.FAILED, JobState.SUCCEEDED]),
    st.lists(st.floats(0, 50), min_size=3, max_size=3),
)
def test_states_fill_the_time_and_stages_stay_within_theirs(
    states: Sequence[tuple[float, JobState, int]], end: JobState | None, seconds: Sequence[float]
) -> None:
    names = ("text_encode", "image_encode", "vae_encode")
    whole = job_from_proto(made(**dict(zip(names, seconds, strict=True)), denoise=1.0))
    moments = history(*states, *([(120.0, end, 9)] if end else []))
    found = timeline(whole, moments)
    phases = [span for span in found.spans if not span.part_of]
    position = 0.0
    for span in phases:
        assert span.start_s == pytest.approx(position)
        assert span.seconds >= 0
        position = span.start_s + span.seconds
    if phases:
        assert position == pytest.approx(found.total_s)
    for span in found.spans:
        if span.part_of:
            assert span.seconds >= 0
            assert any(
                home.start_s - 1e-6 <= span.start_s
                and span.start_s + span.seconds <= home.start_s + home.seconds + 1e-6
                for home in phases
                if home.name == span.part_of
            )


def event(sequence: int, at: float, whole: job_pb2.Job) -> job_pb2.JobEvent:
    message = job_pb2.JobEvent(sequence=sequence, job=whole)
    message.time.FromDatetime(START + timedelta(seconds=at))
    return message


def test_both_clients_tell_the_same_history(script: Script, twin: Twin) -> None:
    progress = job_pb2.JobProgress(step=2, total_steps=4, wait_reason="why")
    script.watch.append([event(1, 0, job(job_pb2.JOB_STATE_QUEUED, progress=progress)), event(2, 1, succeeded_job())])
    assert twin.call("history", "job-1") == (
        Moment(START, Q, 2, wait_reason="why"),
        Moment(START + timedelta(seconds=1), JobState.SUCCEEDED),
    )


def test_a_running_jobs_history_ends_in_the_present(
    script: Script, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cinecat.client.HISTORY_S", 0.5)
    monkeypatch.setattr("cinecat.aio.HISTORY_S", 0.5)
    script.watch.append([event(1, 0, job(job_pb2.JOB_STATE_DENOISING)), Hold()])
    assert twin.call("history", "job-1") == (Moment(START, D),)


def test_a_history_that_breaks_off_is_an_error(script: Script, twin: Twin) -> None:
    script.watch.append([event(1, 0, job(job_pb2.JOB_STATE_DENOISING)), Break()])
    with pytest.raises(Exception, match="scripted break"):
        twin.call("history", "job-1")


@pytest.mark.parametrize("ending", ["succeeded", "failed"])
def test_the_command_prints_a_timeline(
    script: Script, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    monkeypatch.setenv("CINECAT_SERVER", address)
    last = failed(4).job if ending == "failed" else made(denoise=1.5)
    last.create_time.FromDatetime(START)
    last.traceparent = TRACEPARENT
    script.finished_job = last
    stream = [
        event(1, 0, job(job_pb2.JOB_STATE_QUEUED)),
        event(2, 1, job(job_pb2.JOB_STATE_CONDITIONING)),
        event(3, 2, job(job_pb2.JOB_STATE_DENOISING)),
        event(4, 4, last),
    ]
    script.watch += [stream, stream]
    assert run(["jobs", "trace", "job-1"]) == 0
    printed = capsys.readouterr().out
    assert TRACEPARENT.split("-")[1] in printed
    assert [line.split()[0] for line in printed.splitlines()[3:6]] == ["queued", "conditioning", "denoising"]
    assert ("out of [memory]" in printed) == (ending == "failed")
    assert run(["jobs", "trace", "job-1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["total_s"], told["trace_id"]) == (ending, 4.0, TRACEPARENT.split("-")[1])
    assert ("error" in told) == (ending == "failed")
    assert [span["start_s"] for span in told["spans"]] == [0, 1, 2]


def test_a_job_of_which_nothing_is_known_has_an_empty_timeline() -> None:
    nothing = job_from_proto(job(job_pb2.JOB_STATE_QUEUED))
    assert timeline(nothing, []).spans == ()
