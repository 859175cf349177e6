"""After a script of successes, refusals, failures, cancels, a preemption and a killed core, every metric says what the
script did.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from cinecat.engines.tokens.budget import step_tokens
from cinecat.engines.tokens.grid import Grid
from cinecat.server.costs import rows_of
from cinecat.server.local_server import LocalServer
from cinecat.server.metrics import priority_name, tokenization_name
from cinecat.server.scrapes import Scrape
from cinecat.server.top import scrape
from cinecat.v1 import clip_pb2, generation_pb2, generation_pb2_grpc
from cinecat.v1 import job_pb2 as pb
from tests.e2e.conftest import ServerFactory

STEPS_SAVED, SLOTS = 4, 2

# Nothing is saved for the time that it took: then the steps alone say when.
OPTIONS = ("--checkpoint-steps", str(STEPS_SAVED), "--checkpoint-seconds", "3600", "--style-slots", str(SLOTS))

FINAL = {pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED}
LONG = 60


@dataclass
class Slots:
    """What a core does with its style slots, one job after the other. The first one has its warm-up's style in one."""

    resident: OrderedDict[frozenset[str], None] = field(
        default_factory=lambda: OrderedDict({frozenset({"warm-up"}): None})
    )
    hits: int = 0
    loads: int = 0
    evictions: int = 0

    def dress(self, clip: clip_pb2.ClipSpec) -> None:
        """One slot for a clip's styles together, and one for them with the adapter of merged tokens."""
        styles = frozenset(style.name for style in clip.styles)
        cat = clip.tokenization.mode == clip_pb2.Tokenization.CAT
        for worn in filter(None, (styles, styles | {"the adapter"} if cat else None)):
            if worn in self.resident:
                self.hits += 1
            else:
                self.loads += 1
                self.evictions += len(self.resident) == SLOTS
                if len(self.resident) == SLOTS:
                    self.resident.popitem(last=False)
            self.resident[worn] = None
            self.resident.move_to_end(worn)


@dataclass
class Script:
    """What was done, and how it ended.

    Attributes:
        jobs: as they ended.
        begun: how many of them were worked on, by priority.
        pictured: how many showed an estimate.
        cached_texts: finished clips whose prompt was known.
    """

    server: LocalServer
    generation: generation_pb2_grpc.GenerationStub
    image: bytes
    slots: Slots = field(default_factory=Slots)
    jobs: list[pb.Job] = field(default_factory=list)
    begun: Counter[str] = field(default_factory=Counter)
    pictured: Counter[str] = field(default_factory=Counter)
    cached_texts: int = 0

    def clip(self, prompt: str, *styles: str, keep: float = 0.0, **fields: object) -> clip_pb2.ClipSpec:
        shape = {"width": 64, "height": 64, "frames": 5, "steps": 4, "guidance_scale": 1.0, "seed": 5, **fields}
        clip = clip_pb2.ClipSpec(image=self.image, prompt=prompt, prompt_as_is=True, **shape)  # type: ignore[arg-type]
        for style in styles:
            clip.styles.add(name=style, strength=0.5)
        if keep:
            clip.tokenization.mode, clip.tokenization.keep_ratio = clip_pb2.Tokenization.CAT, keep
        return clip

    def submit(
        self,
        clip: clip_pb2.ClipSpec,
        priority: pb.Priority.ValueType = pb.PRIORITY_INTERACTIVE,
        tenant: str = "studio",
        every_steps: int = 0,
        request_id: str = "",
    ) -> str:
        previews = pb.Previews(every_steps=every_steps)
        request = generation_pb2.SubmitRequest(clip=clip, priority=priority, previews=previews, request_id=request_id)
        return self.generation.Submit(request, metadata=[("cinecat-tenant", tenant)]).job_id

    def follow(self, job_id: str) -> Iterator[pb.JobEvent]:
        return self.generation.Watch(generation_pb2.WatchRequest(job_id=job_id))

    def reaches(self, job_id: str, step: int) -> None:
        for event in self.follow(job_id):
            assert event.job.state not in FINAL
            if event.job.progress.step >= step:
                return

    def ends(self, job_id: str, *, begun: bool = True) -> int:
        """Waits for the end of a job, and says what it was."""
        job = list(self.follow(job_id))[-1].job
        self.jobs.append(job)
        self.begun[priority_name(job)] += begun
        self.pictured[priority_name(job)] += bool(job.previews.every_steps)
        return job.state

    def cancel(self, job_id: str) -> None:
        while self.generation.CancelJob(generation_pb2.CancelJobRequest(job_id=job_id)).state not in FINAL:
            time.sleep(0.01)

    def data(self, *parts: str) -> Path:
        return self.server.log.parent.joinpath("data", *parts)

    def scrape(self) -> Scrape:
        return scrape(f"http://127.0.0.1:{self.server.metrics_port}/metrics")

    @contextmanager
    def core_held_up(self) -> Iterator[None]:
        """The core does nothing meanwhile, so that what comes stays in the queue."""
        core = self.server.core_pid
        os.kill(core, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(core, signal.SIGCONT)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_clips(script: Script) -> None:
    """Uniform and CAT, plain and styled, guided and not, of both priorities and of two tenants."""
    together = [
        (script.clip("one", guidance_scale=3.0), pb.PRIORITY_INTERACTIVE, "studio", 1),
        (script.clip("two"), pb.PRIORITY_BATCH, "edit", 0),
        (script.clip("three", keep=0.6, width=128, steps=8), pb.PRIORITY_INTERACTIVE, "edit", 4),
        (script.clip("four"), pb.PRIORITY_BATCH, "edit", 0),
    ]
    one_by_one = [
        (script.clip("five", "noir", steps=8), pb.PRIORITY_BATCH, "edit", 0),
        (script.clip("six", "noir", frames=9), pb.PRIORITY_INTERACTIVE, "edit", 0),
        (
            script.clip("seven", "noir", keep=0.5, frames=9, guidance_scale=3.0, steps=8),
            pb.PRIORITY_BATCH,
            "studio",
            0,
        ),
        (script.clip("eight", "noir", "amber"), pb.PRIORITY_BATCH, "edit", 2),
    ]
    for shots in (together, *([shot] for shot in one_by_one)):
        for clip, *_ in shots:
            script.slots.dress(clip)
        job_ids = [script.submit(*shot) for shot in shots]
        assert [script.ends(job_id) for job_id in job_ids] == [pb.JOB_STATE_SUCCEEDED] * len(shots)
    # The same again finds its prompt in the cache; the same request again is no other job.
    clip = one_by_one[0][0]
    again = script.submit(clip, request_id="once")
    assert script.submit(clip, request_id="once") == again
    script.slots.dress(clip)
    script.cached_texts += 1
    assert script.ends(again) == pb.JOB_STATE_SUCCEEDED


def be_refused(script: Script) -> Counter[tuple[str, str]]:
    stub, refused = script.generation, Counter[tuple[str, str]]()
    odd = script.clip("odd", width=63)
    for method, call in (
        ("Submit", lambda: stub.Submit(generation_pb2.SubmitRequest(clip=odd))),
        ("Generate", lambda: list(stub.Generate(generation_pb2.GenerateRequest(clip=odd)))),
        ("GetJob", lambda: stub.GetJob(generation_pb2.GetJobRequest(job_id="nobody"))),
        ("CancelJob", lambda: stub.CancelJob(generation_pb2.CancelJobRequest(job_id="nobody"))),
        ("Submit", lambda: stub.Submit(generation_pb2.SubmitRequest(clip=script.clip("worn", "no-such-style")))),
    ):
        with pytest.raises(grpc.RpcError) as error:
            call()
        refused[method, error.value.code().name] += 1
    return refused


def fail_cancel_and_kill(script: Script) -> None:
    """A job that goes on after its core was killed; meanwhile one that cannot begin and one that is called off."""
    kept = script.submit(script.clip("kept", steps=LONG), every_steps=10)
    script.reaches(kept, STEPS_SAVED + 1)
    with script.core_held_up():
        failing = script.submit(script.clip("no first frame"), pb.PRIORITY_BATCH, "edit")
        called_off = script.submit(script.clip("called off"), pb.PRIORITY_BATCH)
        waiting = script.submit(script.clip("waiting"))
        script.data("inputs", f"{failing}.png").unlink()
        script.cancel(called_off)
        seen = script.scrape()
        assert seen.by("priority", "cinecat_queue_depth") == {"interactive": 1, "batch": 1}
        states = {state: jobs for state, jobs in seen.by("state", "cinecat_jobs").items() if jobs}
        assert states == {"denoising": 1, "queued": 2}
    assert script.ends(waiting) == pb.JOB_STATE_SUCCEEDED
    assert script.ends(called_off, begun=False) == pb.JOB_STATE_CANCELLED
    step = script.generation.GetJob(generation_pb2.GetJobRequest(job_id=kept)).progress.step
    assert STEPS_SAVED < step < LONG - STEPS_SAVED
    os.kill(script.server.core_pid, signal.SIGKILL)
    script.slots.resident.clear()
    # While there is no core, nothing is in its slots, and what it held waits.
    eventually(lambda: script.scrape().total("cinecat_ready") == 0)
    seen = script.scrape()
    assert seen.total("cinecat_style_slots_resident") == 0
    assert seen.total("cinecat_jobs", state="queued") == sum(seen.by("state", "cinecat_jobs").values())
    assert seen.total("cinecat_queue_depth") == seen.total("cinecat_jobs", state="queued")
    assert script.ends(kept) == pb.JOB_STATE_SUCCEEDED
    assert script.ends(failing) == pb.JOB_STATE_FAILED


def cancel_running(script: Script) -> None:
    running = script.submit(script.clip("stopped", steps=LONG), pb.PRIORITY_BATCH, every_steps=1)
    script.reaches(running, 3)
    script.cancel(running)
    assert script.ends(running) == pb.JOB_STATE_CANCELLED


def fail_at_its_files(script: Script) -> None:
    """The folder that frames are written to goes while a clip is denoised."""
    scratch = script.data("artifacts", ".scratch")
    job = script.submit(script.clip("no room", steps=12), pb.PRIORITY_BATCH)
    script.reaches(job, 1)
    scratch.rename(scratch.with_name("away"))
    assert script.ends(job) == pb.JOB_STATE_FAILED
    scratch.with_name("away").rename(scratch)


def send_out(script: Script) -> None:
    """A batch job wears all slots, and leaves for an interactive one."""
    clip, urgent = (script.clip(style, style, keep=0.5, steps=24) for style in ("amber", "blueprint"))
    leaving = script.submit(clip, pb.PRIORITY_BATCH)
    script.reaches(leaving, 3)
    assert script.ends(script.submit(urgent)) == pb.JOB_STATE_SUCCEEDED
    assert script.ends(leaving) == pb.JOB_STATE_SUCCEEDED
    for worn in (clip, urgent, clip):
        script.slots.dress(worn)


def grid(clip: clip_pb2.ClipSpec) -> Grid:
    return Grid((clip.frames - 1) // 4 + 1, clip.height // 16, clip.width // 16)


def check_work(script: Script, seen: Scrape) -> None:
    """Steps and tokens, computed from the clips: those that were done twice after the kill are of one uniform clip."""
    steps, tokens, uniform = 0, Counter[str](), Counter[str]()
    for job in script.jobs:
        clip, path = job.clip, tokenization_name(job.clip)
        spent = step_tokens(grid(clip), clip.steps, clip.tokenization.keep_ratio or 1.0)[: job.progress.step]
        if job.state == pb.JOB_STATE_SUCCEEDED:
            assert tuple(job.result.step_tokens) == spent
        steps += len(spent)
        tokens[path] += rows_of(clip) * sum(spent)
        uniform[path] += rows_of(clip) * grid(clip).count * len(spent)
    repeated = seen.total("cinecat_engine_steps_total") - steps
    assert 0 <= repeated <= STEPS_SAVED
    for counts in (tokens, uniform):
        counts["uniform"] += round(repeated) * 32  # tokens of 64x64x5
    assert seen.by("tokenization", "cinecat_tokens_total") == tokens
    assert seen.by("tokenization", "cinecat_tokens_uniform_total") == uniform
    assert seen.total("cinecat_step_jobs_sum") == steps + repeated
    forwards = seen.total("cinecat_step_jobs_count")
    assert seen.total("cinecat_step_seconds_count") == forwards
    assert seen.total("cinecat_quantum_seconds_count", kind="step") - forwards in (0, 1)  # the one that was killed
    assert seen.by("engine", "cinecat_engine_steps_total").keys() == {"torch"}


def check_clips(script: Script, seen: Scrape) -> None:
    made = [job for job in script.jobs if job.state == pb.JOB_STATE_SUCCEEDED]
    frames, pixels = Counter[str](), Counter[str]()
    for job in made:
        path = tokenization_name(job.clip)
        frames[path] += job.clip.frames
        pixels[path] += job.clip.frames * job.clip.width * job.clip.height
    assert seen.by("tokenization", "cinecat_frames_total") == frames
    megapixels = {path: count / 1e6 for path, count in pixels.items()}
    assert seen.by("tokenization", "cinecat_megapixels_total") == pytest.approx(megapixels)
    ratios = [job.result.keep_ratio for job in made if job.clip.tokenization.mode == clip_pb2.Tokenization.CAT]
    assert seen.total("cinecat_keep_ratio_count") == len(ratios)
    assert seen.total("cinecat_keep_ratio_sum") == pytest.approx(sum(ratios))
    stages = dict.fromkeys(
        ("queue", "text_encode", "image_encode", "vae_encode", "denoise", "vae_decode", "mux"), len(made)
    )
    assert seen.by("stage", "cinecat_stage_seconds_count") == {**stages, "plan": len(ratios)}
    cached = seen.total("cinecat_stage_seconds_count", stage="text_encode", cached="true")
    assert cached == script.cached_texts
    # From their acceptance on, as the jobs themselves tell it.
    queued = sum(
        timing.duration.ToNanoseconds()
        for job in made
        for timing in job.result.timings
        if timing.stage == pb.STAGE_QUEUE
    )
    assert seen.total("cinecat_stage_seconds_sum", stage="queue") == pytest.approx(queued / 1e9, abs=1e-3)


def check_jobs(script: Script, seen: Scrape) -> None:
    priorities, made, outcomes = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    seconds = 0.0
    for job in script.jobs:
        priority, outcome = priority_name(job), pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        priorities[priority] += 1
        outcomes[outcome, priority] += 1
        made[priority] += job.state == pb.JOB_STATE_SUCCEEDED
        seconds += (job.end_time.ToNanoseconds() - job.create_time.ToNanoseconds()) / 1e9
    assert seen.by("priority", "cinecat_jobs_accepted_total") == priorities
    for name in ("cinecat_jobs_ended_total", "cinecat_job_seconds_count"):
        assert by_two(seen, name, "outcome", "priority") == outcomes
    assert seen.total("cinecat_job_seconds_sum") == pytest.approx(seconds)
    assert by_two(seen, "cinecat_job_errors_total", "code", "state") == {
        ("INTERNAL", "conditioning"): 1,
        ("UNAVAILABLE", "decoding"): 1,
    }
    assert seen.by("priority", "cinecat_queue_seconds_count") == script.begun
    assert seen.by("priority", "cinecat_first_preview_seconds_count") == script.pictured
    assert seen.by("priority", "cinecat_first_frame_seconds_count") == made
    assert set(seen.by("state", "cinecat_jobs").values()) == {0.0}
    assert seen.by("priority", "cinecat_queue_depth") == {"interactive": 0, "batch": 0}


def check_core(script: Script, seen: Scrape) -> None:
    assert seen.total("cinecat_core_restarts_total") == 1
    assert seen.total("cinecat_preemptions_total") == 1
    assert seen.total("cinecat_resumes_total") == 2
    assert seen.total("cinecat_quantum_seconds_count", kind="evict") == 1
    slots = script.slots
    for what, count in (("hits", slots.hits), ("loads", slots.loads), ("evictions", slots.evictions)):
        assert seen.total(f"cinecat_style_slot_{what}_total") == count
    assert seen.total("cinecat_style_swap_seconds_count") == slots.loads
    assert seen.total("cinecat_style_slots") == SLOTS
    assert seen.total("cinecat_style_slots_resident") == len(slots.resident)
    by_tenant = seen.by("tenant", "cinecat_tenant_device_seconds_total")
    assert by_tenant.keys() == {"studio", "edit"}
    assert sum(by_tenant.values()) == pytest.approx(seen.total("cinecat_quantum_seconds_sum"))
    assert seen.by("style", "cinecat_style_device_seconds_total").keys() == {"none", "noir", "amber", "blueprint"}


def by_two(seen: Scrape, name: str, first: str, second: str) -> dict[tuple[str, str], float]:
    return {
        (one, two): count
        for one in seen.by(first, name)
        for two, count in seen.by(second, name, **{first: one}).items()
        if count
    }


@pytest.mark.slow
def test_every_count_says_what_was_done(start_server: ServerFactory, tmp_path: Path, frame_png: bytes) -> None:
    with start_server(tmp_path, *OPTIONS) as server, grpc.insecure_channel(server.address) as channel:
        script = Script(server, generation_pb2_grpc.GenerationStub(channel), frame_png)
        assert script.scrape().total("cinecat_style_slots_resident") == len(script.slots.resident)
        make_clips(script)
        refused = be_refused(script)
        fail_cancel_and_kill(script)
        cancel_running(script)
        fail_at_its_files(script)
        send_out(script)
        # A job's stages are counted when it has been told to have succeeded.
        made = sum(job.state == pb.JOB_STATE_SUCCEEDED for job in script.jobs)
        eventually(lambda: script.scrape().total("cinecat_stage_seconds_count", stage="mux") == made)
        seen = script.scrape()
        assert by_two(seen, "cinecat_requests_refused_total", "method", "code") == refused
        check_jobs(script, seen)
        check_work(script, seen)
        check_clips(script, seen)
        check_core(script, seen)
