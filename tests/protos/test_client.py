"""How the two clients behave when all goes well and when the connection does not."""

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import grpc
import pytest

from cinecat import (
    DownloadCorrupted,
    Finished,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    JobState,
    NotFound,
    Preview,
    PreviewFrame,
    Previews,
    Progress,
    ServerUnavailable,
    Style,
)
from cinecat.errors import FieldViolation, WrongState
from cinecat.v1 import clip_pb2, generation_pb2, job_pb2
from tests.protos.scripted_server import (
    MP4,
    PNG,
    Break,
    Hold,
    Script,
    bad_request,
    cancelled,
    chunk,
    denoising,
    failed,
    job,
    picture,
    succeeded,
    succeeded_job,
    with_preview,
)
from tests.protos.twins import AsyncTwin, SyncTwin, Twin

WHOLE = [chunk(0, 5000), chunk(5000, len(MP4))]
CLIP = {"image": PNG, "prompt": "a cat"}


def test_events_end_with_the_clip_in_memory(script: Script, twin: Twin) -> None:
    script.generate.append([denoising(1), succeeded(2)])
    script.download.append(WHOLE)
    progress, finished = twin.events(**CLIP)
    assert isinstance(progress, Progress)
    assert (progress.state, progress.step, progress.total_steps) == (JobState.DENOISING, 1, 4)
    assert progress.eta_seconds == 2.5
    assert isinstance(finished, Finished)
    clip = finished.clip
    assert clip.data == MP4
    assert clip.path is None
    assert (clip.width, clip.height, clip.frames, clip.fps, clip.seed) == (64, 48, 5, 8.0, 7)
    assert clip.styles == (Style("noir", 0.8, "1.0"), Style("amber", 0.5, "1.0"))
    assert clip.style == "noir:0.8+amber:0.5"
    assert clip.timings == {"denoise": 1.5, "text_encode": 0.001}
    assert clip.cached == ("text_encode",)
    assert (clip.keep_ratio, clip.step_tokens) == (0.5, (24, 8, 8, 8))
    assert clip.notes == ("image: cropped",)
    assert [artifact.format for artifact in clip.artifacts] == ["mp4", "frames_f32"]


@pytest.mark.parametrize(("budget", "asked"), [("keep_ratio", "asked_keep_ratio"), ("target_psnr_db",) * 2])
def test_a_job_tells_what_was_asked_of_cat(script: Script, twin: Twin, budget: str, asked: str) -> None:
    script.finished_job.clip.tokenization.CopyFrom(clip_pb2.Tokenization(mode="CAT", **{budget: 0.25}))
    settings = twin.call("job", "job-1").settings
    assert settings.tokenization == "cat"
    told = {name: getattr(settings, name) for name in ("asked_keep_ratio", "target_psnr_db")}
    assert told == {"asked_keep_ratio": None, "target_psnr_db": None} | {asked: 0.25}


def test_a_job_tells_how_many_steps_were_to_run_and_did(script: Script, twin: Twin) -> None:
    assert twin.call("job", "job-1").settings.run_steps is None
    assert twin.call("job", "job-1").clip.steps_run == 4  # of a server that does not say
    script.finished_job.clip.run_steps = script.finished_job.result.run_steps = 2
    told = twin.call("job", "job-1")
    assert (told.settings.run_steps, told.clip.steps_run) == (2, 2)


def test_the_clip_is_saved_and_nothing_else_is_left_beside_it(script: Script, twin: Twin, tmp_path: Path) -> None:
    script.generate.append([succeeded(1)])
    script.download.append(WHOLE)
    (finished,) = twin.events(**CLIP, output=tmp_path / "out.mp4")
    assert finished.clip.path == tmp_path / "out.mp4"
    assert finished.clip.data is None
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == MP4


def test_a_dropped_stream_is_resumed_without_gap_or_repeat(script: Script, twin: Twin) -> None:
    script.generate.append([denoising(1), denoising(3), Break()])
    script.watch.append([denoising(3), denoising(4), Break()])
    script.watch.append([denoising(5), succeeded(6)])
    script.download.append(WHOLE)
    assert [event.sequence for event in twin.events(**CLIP)] == [1, 3, 4, 5, 6]
    watches = script.requests(generation_pb2.WatchRequest)
    assert [(watch.job_id, watch.after_sequence) for watch in watches] == [("job-1", 3), ("job-1", 4)]


def test_a_stream_that_ends_too_early_is_resumed(script: Script, twin: Twin) -> None:
    script.generate.append([denoising(1)])
    script.watch.append([succeeded(2)])
    script.download.append(WHOLE)
    assert [event.sequence for event in twin.events(**CLIP)] == [1, 2]


def test_before_the_job_has_a_name_generate_is_repeated_under_the_same_request_id(script: Script, twin: Twin) -> None:
    script.generate.append([Break()])
    script.generate.append([Break()])
    script.generate.append([succeeded(1)])
    script.download.append(WHOLE)
    assert len(twin.events(**CLIP)) == 1
    requests = script.requests(generation_pb2.GenerateRequest)
    assert len(requests) == 3
    assert len({request.request_id for request in requests}) == 1
    assert len(requests[0].request_id) == 36


def test_two_generations_have_different_request_ids(script: Script, twin: Twin) -> None:
    script.generate.extend([[succeeded(1)], [succeeded(1)]])
    script.download.extend([WHOLE, WHOLE])
    twin.events(**CLIP)
    twin.events(**CLIP)
    first, second = script.requests(generation_pb2.GenerateRequest)
    assert first.request_id != second.request_id


def test_other_errors_are_not_retried(script: Script, twin: Twin) -> None:
    script.generate.append([Break(grpc.StatusCode.INTERNAL, "boom")])
    with pytest.raises(Exception, match="boom"):
        twin.events(**CLIP)
    assert len(script.asked) == 1


@pytest.mark.parametrize("kind", [SyncTwin, AsyncTwin])
def test_it_gives_up_when_the_server_stays_away(script: Script, address: str, kind: type[Twin]) -> None:
    script.generate.append([denoising(1), Break()])
    script.watch.extend([[Break()]] * 20)
    with pytest.raises(ServerUnavailable) as caught:
        kind(address, patience_s=0.5).events(**CLIP)
    assert caught.value.job_id == "job-1"
    assert 1 <= len(script.requests(generation_pb2.WatchRequest)) <= 5


@pytest.mark.parametrize("kind", [SyncTwin, AsyncTwin])
def test_no_server_at_all_is_told_apart(kind: type[Twin]) -> None:
    with pytest.raises(ServerUnavailable) as caught:
        kind("127.0.0.1:9").events(**CLIP)
    assert not caught.value.connected


def test_a_failed_job_raises_with_its_code_and_message(script: Script, twin: Twin) -> None:
    script.generate.append([denoising(1), failed(2)])
    with pytest.raises(JobFailed, match="out of") as caught:
        twin.events(**CLIP)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.job_id == "job-1"


def test_result_raises_the_same_error_again(script: Script, twin: Twin) -> None:
    script.generate.append([failed(1)])
    first, second = twin.result_twice(**CLIP)
    assert isinstance(first, JobFailed)
    assert second is first


def test_result_gives_the_clip_again(script: Script, twin: Twin) -> None:
    script.generate.append([succeeded(1)])
    script.download.append(WHOLE)
    first, second = twin.result_twice(**CLIP)
    assert first.data == MP4
    assert second is first


def test_cancel_asks_the_server_and_the_generation_raises(script: Script, twin: Twin) -> None:
    script.generate.append([denoising(1), Hold(), cancelled(2)])
    with pytest.raises(JobCancelled):
        twin.cancel_at(1, **CLIP)
    assert [request.job_id for request in script.requests(generation_pb2.CancelJobRequest)] == ["job-1"]


def test_a_wrong_request_is_never_sent(script: Script, twin: Twin) -> None:
    with pytest.raises(InvalidRequest):
        twin.events(**CLIP, seed=-1)
    assert script.asked == []


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    script: Script, twin: Twin, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="create it first"):
        twin.events(**CLIP, output=tmp_path / "missing" / "out.mp4")
    assert script.asked == []


def test_the_servers_violations_arrive(script: Script, twin: Twin) -> None:
    script.generate.append([bad_request(grpc.StatusCode.NOT_FOUND, ("clip.styles[0].name", "no style 'nori'"))])
    with pytest.raises(NotFound) as caught:
        twin.events(**CLIP)
    assert caught.value.violations == (FieldViolation("clip.styles[0].name", "no style 'nori'"),)


def test_a_broken_download_goes_on_where_it_stopped(script: Script, twin: Twin, tmp_path: Path) -> None:
    script.download.append([chunk(0, 3000), Break()])
    script.download.append([chunk(3000, 7000), Break()])
    script.download.append([chunk(7000, len(MP4))])
    assert twin.call("download", "job-1", tmp_path / "out.mp4") == tmp_path / "out.mp4"
    assert (tmp_path / "out.mp4").read_bytes() == MP4
    assert [request.offset for request in script.requests(generation_pb2.DownloadRequest)] == [0, 3000, 7000]


def test_wrong_bytes_leave_the_old_file_alone(script: Script, twin: Twin, tmp_path: Path) -> None:
    script.finished_job = succeeded_job(sha=sha256(b"something else").hexdigest())
    script.download.append(WHOLE)
    (tmp_path / "out.mp4").write_bytes(b"old")
    with pytest.raises(DownloadCorrupted, match="SHA-256"):
        twin.call("download", "job-1", tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "chunks",
    [[chunk(0, 100), chunk(200, len(MP4))], [chunk(100, len(MP4))], [chunk(0, len(MP4)), chunk(len(MP4), 1, PNG * 9)]],
    ids=["gap", "wrong start", "too long"],
)
def test_chunks_that_do_not_fit_are_refused(
    script: Script, twin: Twin, chunks: list[generation_pb2.DownloadChunk]
) -> None:
    chunks[-1].data = chunks[-1].data or PNG
    script.download.append(chunks)
    with pytest.raises(DownloadCorrupted):
        twin.call("download", "job-1")


def test_a_download_of_an_unfinished_job_says_so(script: Script, twin: Twin) -> None:
    script.finished_job = job(job_pb2.JOB_STATE_DENOISING)
    with pytest.raises(WrongState, match="is denoising"):
        twin.call("download", "job-1")


def test_an_unknown_artifact_is_answered_with_the_known_ones(twin: Twin) -> None:
    with pytest.raises(NotFound, match=r"clip\.mp4, frames\.safetensors"):
        twin.call("download", "job-1", None, "clip.gif")


def test_unary_calls_are_repeated_while_the_server_is_unavailable(script: Script, twin: Twin) -> None:
    script.unary_breaks.extend([Break(), Break()])
    assert twin.call("job", "job-1").clip.seed == 7
    assert len(script.asked) == 3


def test_submit_gives_the_job(script: Script, twin: Twin) -> None:
    submitted = twin.call("submit", **CLIP)
    assert (submitted.job_id, submitted.state, submitted.detached) == ("job-1", JobState.QUEUED, True)
    assert script.requests(generation_pb2.SubmitRequest)[0].request_id


def test_a_submit_with_a_large_image_is_repeated_too(script: Script, twin: Twin) -> None:
    script.unary_breaks.append(Break())
    twin.call("submit", image=PNG + bytes(8 * 1024**2), prompt="a cat")
    first, second = script.requests(generation_pb2.SubmitRequest)
    assert first.request_id == second.request_id


def test_watch_starts_after_the_given_event(script: Script, twin: Twin) -> None:
    script.watch.append([denoising(5), succeeded(6)])
    events = twin.watch("job-1", 4)
    assert [event.sequence for event in events] == [5, 6]
    assert events[-1].clip.data is None


def test_jobs_come_from_all_pages(script: Script, twin: Twin) -> None:
    assert [job.state for job in twin.jobs(states=["succeeded", JobState.QUEUED])] == ["succeeded", "queued"]
    first = script.requests(generation_pb2.ListJobsRequest)[0]
    assert list(first.states) == [job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_QUEUED]


def test_jobs_are_asked_for_by_time_and_style(script: Script, twin: Twin) -> None:
    since = datetime(2026, 11, 25, 18, 30, 0, 250, tzinfo=UTC)
    twin.jobs(since=since, until=datetime(2026, 11, 26), style="noir")
    for request in script.requests(generation_pb2.ListJobsRequest):
        assert request.created_after.ToDatetime(UTC) == since
        assert request.created_before.ToDatetime(UTC) == datetime(2026, 11, 26).astimezone(UTC)  # local time
        assert request.style == "noir"


@pytest.mark.parametrize("until", [datetime(2026, 11, 25, tzinfo=UTC), datetime(2026, 11, 24, tzinfo=UTC)])
def test_a_span_that_ends_before_it_begins_is_refused(twin: Twin, until: datetime) -> None:
    with pytest.raises(InvalidRequest, match="created_before"):
        twin.jobs(since=datetime(2026, 11, 25, tzinfo=UTC), until=until)


def test_a_state_that_is_none_is_refused(twin: Twin) -> None:
    with pytest.raises(InvalidRequest, match="allowed: queued"):
        twin.jobs(states=["runing"])


def test_styles_come_from_all_pages_and_problems_once(twin: Twin) -> None:
    found = twin.call("styles")
    assert [style.name for style in found] == ["amber", "noir"]
    assert [problem.folder for problem in found.problems] == ["broken"]


def test_a_style_and_the_models_can_be_asked_for(twin: Twin) -> None:
    assert twin.call("style", "noir").trigger_words == ("rain",)
    assert twin.call("models")[0].tokenizations == ("uniform",)


def test_pictures_arrive_with_the_progress(script: Script, twin: Twin) -> None:
    estimate, decoded = with_preview(denoising(1), 1, 0, 4), with_preview(denoising(3), 0, 1, 2)
    script.generate.append([estimate, denoising(2), decoded, succeeded(4)])
    script.download.append(WHOLE)
    *events, _ = twin.events(**CLIP)
    assert [event.preview for event in events] == [
        Preview(1, (PreviewFrame(0, picture(1, 0)), PreviewFrame(4, picture(1, 4)))),
        None,
        Preview(0, (PreviewFrame(1, picture(0, 1)), PreviewFrame(2, picture(0, 2)))),
    ]
    assert [event.preview.is_estimate for event in (events[0], events[2])] == [True, False]


@pytest.mark.parametrize("kind", [generation_pb2.GenerateRequest, generation_pb2.SubmitRequest])
def test_priority_and_previews_are_asked_for(script: Script, twin: Twin, kind: type) -> None:
    asked = {"priority": "batch", "previews": Previews(every_steps=2, frames=True)}
    if kind is generation_pb2.SubmitRequest:
        twin.call("submit", **CLIP, **asked)
    else:
        script.generate.append([succeeded(1)])
        script.download.append(WHOLE)
        twin.events(**CLIP, **asked)
    (request,) = script.requests(kind)
    assert request.priority == job_pb2.PRIORITY_BATCH
    assert request.previews == job_pb2.Previews(every_steps=2, frames=True)


def test_a_job_tells_its_priority_and_its_previews(script: Script, twin: Twin) -> None:
    script.finished_job.priority = job_pb2.PRIORITY_INTERACTIVE
    script.finished_job.previews.every_steps = 3
    told = twin.call("job", "job-1")
    assert (told.priority, told.previews) == ("interactive", Previews(every_steps=3))


def test_a_job_of_an_older_server_has_no_priority(twin: Twin) -> None:
    told = twin.call("job", "job-1")
    assert (told.priority, told.previews) == ("", Previews())


@pytest.mark.parametrize("kind", [SyncTwin, AsyncTwin])
@pytest.mark.parametrize("tenant", ["Grading_2.a-b", "x" * 64, None])
def test_every_call_is_made_for_the_tenant(
    script: Script, address: str, tmp_path: Path, kind: type[SyncTwin], tenant: str | None
) -> None:
    twin = kind(address, tenant=tenant)
    script.generate.append([denoising(1), Break()])
    script.watch.append([succeeded(2)])
    script.download.extend([WHOLE, WHOLE])
    twin.events(**CLIP)
    weights = tmp_path / "noir.safetensors"
    weights.write_bytes(b"weights")
    for method, *arguments in (
        ("job", "job-1"),
        ("cancel", "job-1"),
        ("download", "job-1"),
        ("styles",),
        ("style", "noir"),
        ("install_style", weights),
        ("remove_style", "noir"),
        ("warm_style", "noir"),
        ("models",),
    ):
        named = {"name": "noir"} if method == "install_style" else {}
        twin.call(method, *arguments, **named)
    twin.call("submit", **CLIP)
    twin.jobs()
    assert len(script.tenants) == len(script.asked) + len(script.uploads) >= 16
    assert set(script.tenants) == {tenant}


@pytest.mark.parametrize("kind", [SyncTwin, AsyncTwin])
@pytest.mark.parametrize("tenant", ["", "x" * 65, "two words", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "line\n"])
def test_a_name_that_is_no_tenants_is_refused_before_anything_is_sent(
    script: Script, address: str, kind: type[SyncTwin], tenant: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kind(address, tenant=tenant).call("models")
    assert [violation.field for violation in caught.value.violations] == ["tenant"]
    assert script.asked == []
