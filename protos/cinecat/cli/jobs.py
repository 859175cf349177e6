"""`cinecat jobs`: what the server does and did."""

import dataclasses
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from cinecat.cli import output as out
from cinecat.cli.generate import describe, follow
from cinecat.cli.options import DEFAULT_ADDRESS, JobId, Json, Server, Tenant, connect
from cinecat.clip import Job
from cinecat.states import JobState
from cinecat.timeline import Span, timeline

_BAR = 32
"""Cells of a bar that is as long as the job."""

HEADER = ("JOB", "STATE", "PROGRESS", "PRIORITY", "CREATED", "SIZE", "FRAMES", "STYLE", "PROMPT")

app = typer.Typer(help="List jobs; show, trace, watch, cancel or download one.", rich_markup_mode=None)

# As people and ISO 8601 write them.
_MOMENTS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S"]


def _moment(flag: str, explanation: str) -> Any:
    return typer.Option(flag, formats=_MOMENTS, metavar="TIME", help=f"{explanation} E.g. 2026-11-25T18:30.")


@app.callback(invoke_without_command=True)
def jobs(
    context: typer.Context,
    state: Annotated[
        list[JobState] | None,
        typer.Option("--state", metavar="STATE", help="Only jobs in this state, e.g. queued; may be repeated."),
    ] = None,
    since: Annotated[datetime | None, _moment("--since", "Only jobs created then or later; local time.")] = None,
    until: Annotated[datetime | None, _moment("--until", "Only jobs created before; local time.")] = None,
    style: Annotated[
        str, typer.Option("--style", metavar="NAME", help="Only jobs whose clip wears this style, in any version.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many.")] = 20,
    server: Server = DEFAULT_ADDRESS,
    tenant: Tenant = "",
    as_json: Json = False,
) -> None:
    """List jobs, newest first; the commands below act on one."""
    if context.invoked_subcommand:
        return
    with connect(server, tenant) as client:
        found = list(islice(client.jobs(state or (), since=since, until=until, style=style), limit))
    if as_json:
        out.show_json({"jobs": [out.job_json(job) for job in found]})
        return
    out.show_table(HEADER, list(map(_row, found)))


@app.command()
def show(job_id: JobId, server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """Show all that is known of a job."""
    with connect(server, tenant) as client:
        job = client.job(job_id)
    fields = out.job_json(job)
    if as_json:
        out.show_json(fields)
    else:
        out.show_fields(fields)


@app.command()
def watch(job_id: JobId, server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """Follow a job to its end. Ctrl-C stops following, not the job."""
    with connect(server, tenant) as client:
        try:
            clip = follow(client.watch(job_id), quiet=as_json)
        except KeyboardInterrupt:
            raise out.Interrupted(f"stopped watching; job {job_id} goes on", job_id=job_id) from None
    if as_json:
        out.show_json(out.clip_json(clip))
    else:
        out.show(f"{clip.job_id}: {describe(clip)}")


@app.command()
def trace(job_id: JobId, server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """Show where a job's time went. Takes some seconds for one that still runs."""
    with connect(server, tenant) as client:
        history = client.history(job_id)
        job = client.job(job_id)
    found = timeline(job, history)
    if as_json:
        fields = ("job_id", "status", "request_id", "trace_id", "create_time")
        told = {name: value for name, value in out.job_json(job).items() if name in (*fields, "error")}
        out.show_json({**told, **dataclasses.asdict(found)})
        return
    accepted = job.create_time.astimezone().isoformat(" ", "milliseconds") if job.create_time else "unknown"
    out.show(f"{job_id}: {job.state}, {found.total_s:.3f} s" + ("" if job.state.is_final else " so far"))
    out.show(f"accepted: {accepted}" + (f", trace {job.trace_id}" if job.trace_id else ""))
    out.show_table(("STAGE", "START", "SECONDS", "", "NOTE"), [_span_row(span, found.total_s) for span in found.spans])
    if job.error is not None and job.state is JobState.FAILED:
        out.show(f"error: {job.error.code.name}: {job.error.message}")


@app.command()
def cancel(job_id: JobId, server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """Ask a job to stop."""
    with connect(server, tenant) as client:
        job = client.cancel(job_id)
    if as_json:
        out.show_json(out.job_json(job))
    elif job.state.is_final:
        out.show(f"{job.job_id}: {job.state}")
    else:
        out.show(f"{job.job_id}: stopping")


@app.command()
def profile(
    job_id: JobId,
    steps: Annotated[int, typer.Option(min=1, max=20, help="How many of its coming steps.")] = 1,
    server: Server = DEFAULT_ADDRESS,
    tenant: Tenant = "",
    as_json: Json = False,
) -> None:
    """Record coming steps of a job with torch's profiler, for operators (setting profile_dir).

    The paths are of the server's machine; the files open in Perfetto.
    """
    found = []
    with connect(server, tenant) as client:
        for recorded in client.profile(job_id, steps):
            found.append({"step": recorded.step, "path": recorded.path})
            if not as_json:
                out.show(f"step {recorded.step}: {recorded.path}")
    if as_json:
        out.show_json(found)
    elif len(found) < steps:
        out.show(f"{len(found)} of {steps} steps were recorded; the job ended, or a file could not be written")


@app.command()
def download(
    job_id: JobId,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to save it.")],
    artifact: Annotated[str, typer.Option("--artifact", help="Which file of the job; its first one if left out.")] = "",
    server: Server = DEFAULT_ADDRESS,
    tenant: Tenant = "",
    as_json: Json = False,
) -> None:
    """Save a file that a job wrote."""
    with connect(server, tenant) as client:
        path = client.download(job_id, output, artifact)
    size_bytes = path.stat().st_size
    if as_json:
        out.show_json({"job_id": job_id, "status": "succeeded", "output": str(path), "size_bytes": size_bytes})
    else:
        out.show(f"{path}: {size_bytes:,} bytes")


def _span_row(span: Span, total_s: float) -> tuple[object, ...]:
    scale = _BAR / total_s if total_s else 0.0
    before = min(_BAR - 1, int(span.start_s * scale))
    bar = " " * before + "━" * max(1, min(_BAR - before, round(span.seconds * scale)))
    name = f"  {span.name}" if span.part_of else span.name
    return name, f"{span.start_s:.3f}", f"{span.seconds:.3f}", bar.ljust(_BAR), span.note


def _row(job: Job) -> tuple[object, ...]:
    settings = job.settings
    return (
        job.job_id,
        job.state,
        f"{job.step}/{job.total_steps}" if job.total_steps else "",
        job.priority,
        job.create_time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if job.create_time else "",
        f"{settings.width}x{settings.height}",
        settings.frames,
        settings.style,
        settings.prompt[:60],
    )
