"""Every bad input gets one clear answer, costs no job, and the next good request succeeds."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc

Stub = generation_pb2_grpc.GenerationStub
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


def huge_png() -> bytes:
    """A few bytes that declare 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def truncated_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(file, "PNG")
    return file.getvalue()[:5000]


BAD_CLIPS: list[tuple[str, dict[str, object], str, grpc.StatusCode, str]] = [
    ("no image", {"image": b""}, "clip.image", INVALID, "missing"),
    ("a truncated png", {"image": truncated_png()}, "clip.image", INVALID, "truncated"),
    ("a huge png", {"image": huge_png()}, "clip.image", INVALID, "at most 100,000,000"),
    ("not an image", {"image": b"GIF89a" + bytes(100)}, "clip.image", INVALID, "PNG, JPEG, WebP or TIFF"),
    ("a size that is no multiple", {"width": 100, "height": 64}, "clip.width", INVALID, "multiple of 16"),
    ("a negative size", {"width": 64, "height": -64}, "clip.height", INVALID, "nearest: 32"),
    ("too many tokens", {"width": 4096, "height": 4096}, "clip.frames", INVALID, "at most 20480"),
    ("frames not 4k+1", {"frames": 16}, "clip.frames", INVALID, "nearest: 17"),
    ("no steps", {"steps": 0}, "clip.steps", INVALID, "between 1 and 200"),
    ("a million steps", {"steps": 10**6}, "clip.steps", INVALID, "between 1 and 200"),
    ("nan guidance", {"guidance_scale": float("nan")}, "clip.guidance_scale", INVALID, "between 0 and 30"),
    ("infinite guidance", {"guidance_scale": float("inf")}, "clip.guidance_scale", INVALID, "between 0 and 30"),
    ("a negative seed", {"seed": -1}, "clip.seed", INVALID, "between 0 and 9223372036854775807"),
    ("nan fps", {"fps": float("nan")}, "clip.fps", INVALID, "between 1 and 240"),
    ("an unknown style", {"styles": [clip_pb2.StyleRef(name="nior")]}, "clip.styles[0].name", NOT_FOUND, "noir"),
    ("an unknown model", {"model": "sora"}, "clip.model", NOT_FOUND, "wan-tiny"),
    (
        "a nan strength",
        {"styles": [clip_pb2.StyleRef(name="noir", strength=float("nan"))]},
        "clip.styles[0].strength",
        INVALID,
        "between -4 and 4",
    ),
    ("a 100 kB prompt", {"prompt": "x" * 100_000}, "clip.prompt", INVALID, "at most 4096"),
    (
        "hardly any tokens",
        {"tokenization": clip_pb2.Tokenization(mode=clip_pb2.Tokenization.CAT, keep_ratio=0.01)},
        "clip.tokenization.keep_ratio",
        INVALID,
        "0.01 is not between",
    ),
    ("a million files", {"artifact_formats": [1] * 10**6}, "clip.artifact_formats", INVALID, "at most 8"),
    (
        "a style with an endless name",
        {"styles": [clip_pb2.StyleRef(name="x" * 10**6)]},
        "clip.styles[0].name",
        NOT_FOUND,
        "more than 64 characters",
    ),
    ("an enum of the future", {"fit": 99}, "clip.fit", INVALID, "FIT_CROP"),
]


def violations(error: grpc.RpcError) -> dict[str, str]:
    status = rpc_status.from_call(error)
    details = error_details_pb2.BadRequest()
    assert status is not None
    assert status.details[0].Unpack(details)
    return {violation.field: violation.description for violation in details.field_violations}


@pytest.fixture
def costs_no_job(generation: Stub, small_clip: clip_pb2.ClipSpec) -> Callable[[], None]:
    """Says that no job has come since, and that the server still serves."""
    before = newest(generation)
    good = clip_pb2.ClipSpec()
    good.CopyFrom(small_clip)
    good.frames = good.steps = 1

    def check() -> None:
        assert newest(generation) == before
        *_, last = generation.Generate(generation_pb2.GenerateRequest(clip=good))
        assert last.job.HasField("result")

    return check


def newest(generation: Stub) -> list[str]:
    return [job.job_id for job in generation.ListJobs(generation_pb2.ListJobsRequest(page_size=1)).jobs]


@pytest.mark.parametrize(
    ("changes", "field", "code", "says"), [c[1:] for c in BAD_CLIPS], ids=[c[0] for c in BAD_CLIPS]
)
def test_a_bad_clip_is_refused_with_the_field_and_the_fix(
    generation: Stub,
    small_clip: clip_pb2.ClipSpec,
    costs_no_job: Callable[[], None],
    changes: dict[str, object],
    field: str,
    code: grpc.StatusCode,
    says: str,
) -> None:
    for name in changes:
        small_clip.ClearField(name)  # type: ignore[arg-type]
    small_clip.MergeFrom(clip_pb2.ClipSpec(**changes))  # type: ignore[arg-type]
    with pytest.raises(grpc.RpcError) as streamed:
        list(generation.Generate(generation_pb2.GenerateRequest(clip=small_clip)))
    with pytest.raises(grpc.RpcError) as submitted:
        generation.Submit(generation_pb2.SubmitRequest(clip=small_clip))
    for refused in (streamed.value, submitted.value):
        assert refused.code() == code
        assert list(violations(refused)) == [field]
        assert says in violations(refused)[field]
        assert field in refused.details()
    costs_no_job()


def test_all_that_is_wrong_is_said_at_once(generation: Stub, small_clip: clip_pb2.ClipSpec) -> None:
    small_clip.steps, small_clip.frames, small_clip.width = 0, 2, 65
    with pytest.raises(grpc.RpcError) as refused:
        generation.Submit(generation_pb2.SubmitRequest(clip=small_clip))
    assert set(violations(refused.value)) == {"clip.steps", "clip.frames", "clip.width"}


def test_a_200_megabyte_message_is_refused_by_grpc(
    generation: Stub, small_clip: clip_pb2.ClipSpec, costs_no_job: Callable[[], None]
) -> None:
    small_clip.image = bytes(200_000_000)
    with pytest.raises(grpc.RpcError) as refused:
        generation.Submit(generation_pb2.SubmitRequest(clip=small_clip))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    costs_no_job()


def test_an_unknown_job_is_not_found_by_every_method(generation: Stub) -> None:
    calls = [
        lambda: generation.GetJob(generation_pb2.GetJobRequest(job_id="nope")),
        lambda: generation.CancelJob(generation_pb2.CancelJobRequest(job_id="nope")),
        lambda: list(generation.Watch(generation_pb2.WatchRequest(job_id="nope"))),
        lambda: list(generation.Download(generation_pb2.DownloadRequest(job_id="../../etc/passwd"))),
    ]
    for call in calls:
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() == NOT_FOUND
        assert list(violations(refused.value)) == ["job_id"]


def test_a_download_past_the_end_is_out_of_range(generation: Stub, small_clip: clip_pb2.ClipSpec) -> None:
    *_, last = generation.Generate(generation_pb2.GenerateRequest(clip=small_clip))
    size = last.job.result.artifacts[0].size_bytes
    whole = b"".join(c.data for c in generation.Download(generation_pb2.DownloadRequest(job_id=last.job.job_id)))
    rest = b"".join(
        c.data for c in generation.Download(generation_pb2.DownloadRequest(job_id=last.job.job_id, offset=1000))
    )
    assert (len(whole), whole[1000:]) == (size, rest)
    for offset in (-1, size + 1):
        with pytest.raises(grpc.RpcError) as refused:
            list(generation.Download(generation_pb2.DownloadRequest(job_id=last.job.job_id, offset=offset)))
        assert refused.value.code() == grpc.StatusCode.OUT_OF_RANGE
        assert list(violations(refused.value)) == ["offset"]


def test_an_unknown_artifact_is_not_found_and_an_early_download_is_refused(
    generation: Stub, small_clip: clip_pb2.ClipSpec
) -> None:
    job = generation.Submit(generation_pb2.SubmitRequest(clip=small_clip))
    with pytest.raises(grpc.RpcError) as early:
        list(generation.Download(generation_pb2.DownloadRequest(job_id=job.job_id)))
    assert early.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    list(generation.Watch(generation_pb2.WatchRequest(job_id=job.job_id)))
    with pytest.raises(grpc.RpcError) as unknown:
        list(generation.Download(generation_pb2.DownloadRequest(job_id=job.job_id, artifact="../jobs.sqlite")))
    assert unknown.value.code() == NOT_FOUND
    assert list(violations(unknown.value)) == ["artifact"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (generation_pb2.ListJobsRequest(page_size=-1), "page_size"),
        (generation_pb2.ListJobsRequest(page_size=1001), "page_size"),
        (generation_pb2.ListJobsRequest(page_token="garbage"), "page_token"),
        (generation_pb2.ListJobsRequest(states=[77]), "states[0]"),
        (generation_pb2.ListJobsRequest(states=[1] * 300_000), "states"),
    ],
)
def test_a_bad_list_request_is_refused(generation: Stub, request_: generation_pb2.ListJobsRequest, field: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        generation.ListJobs(request_)
    assert refused.value.code() == INVALID
    assert list(violations(refused.value)) == [field]
