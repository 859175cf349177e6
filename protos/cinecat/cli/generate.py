"""`cinecat generate`: an image and a prompt become a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cinecat.cli import output as out
from cinecat.cli.options import DEFAULT_ADDRESS, Json, Server, Tenant, connect
from cinecat.cli.previews import PreviewFolder
from cinecat.cli.progress import ProgressDisplay
from cinecat.client import Client, Generation
from cinecat.clip import Clip
from cinecat.errors import CinecatError, NotFound
from cinecat.events import Event, Finished
from cinecat.previews import Previews


def generate(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The first frame: PNG, JPEG, WebP or TIFF.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What happens in the clip.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to save the mp4.")
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option("--style", "-s", metavar="NAME[:STRENGTH]", help="A style to wear; may be repeated."),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels, e.g. 832x480.")] = None,
    frames: Annotated[int | None, typer.Option("--frames", help="Frames in the clip, 4k + 1.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    run_steps: Annotated[
        int | None,
        typer.Option(
            "--run-steps", metavar="N", help="Steps that run the model; the others carry its predictions on. Lossy."
        ),
    ] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 switches it off.")] = None,
    shift: Annotated[float | None, typer.Option("--shift", help="Shift of the noise schedule.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the noise; drawn when left out.")] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Frames per second of the mp4.")] = None,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", help="What must not happen.")] = "",
    prompt_as_is: Annotated[
        bool, typer.Option("--prompt-as-is", help="Keep the prompt as it is, whatever templates the styles have.")
    ] = False,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="crop|pad|stretch", help="How the image is brought to size.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="A model that `cinecat models` lists.")] = "",
    tokenization: Annotated[
        str | None,
        typer.Option(
            "--tokenization", metavar="uniform|cat", help="cat spends fewer tokens where little happens; it is lossy."
        ),
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option("--keep-ratio", help="Share of the tokens that cat may spend, e.g. 0.5.")
    ] = None,
    target_psnr: Annotated[
        float | None,
        typer.Option("--target-psnr", metavar="DB", help="Or the PSNR to the uniform clip that cat is to hold."),
    ] = None,
    frames_f32: Annotated[
        Path | None,
        typer.Option("--frames-f32", metavar="FILE", help="Also save the decoded frames, as float32 safetensors."),
    ] = None,
    previews: Annotated[
        Path | None,
        typer.Option(
            "--previews",
            metavar="DIR",
            help="Show the clip as it is made: the newest estimate of it as estimate-NNNN.webp, decoded frames as "
            "frame-NNNN.webp. Such files of an earlier clip are removed.",
        ),
    ] = None,
    preview_every: Annotated[
        int | None,
        typer.Option("--preview-every", metavar="STEPS", help="Steps from one estimate to the next; 1, or 0 for none."),
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(
            "--priority",
            metavar="interactive|batch",
            help="Interactive takes over from batch; batch with --detach, interactive else.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit, print the job's id and leave.")] = False,
    server: Server = DEFAULT_ADDRESS,
    tenant: Tenant = "",
    as_json: Json = False,
) -> None:
    """Make a clip from an image and a prompt."""
    if preview_every is not None and previews is None:
        raise out.usage_error("--preview-every is for --previews DIR")
    if detach and previews:
        raise out.usage_error(
            "--detach leaves before there is anything to see; --previews DIR is for clips that are awaited"
        )
    if detach and (output or frames_f32):
        raise out.usage_error("--detach saves nothing; fetch the files later with: cinecat jobs download ID -o FILE")
    if not detach and output is None:
        raise out.usage_error("where should the clip go? Give -o FILE, or --detach")
    # What the strings may be is checked by the client, as for every caller.
    clip: dict[str, Any] = {
        "image": image,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "style": style,
        "size": size,
        "frames": frames,
        "steps": steps,
        "run_steps": run_steps,
        "guidance": guidance,
        "shift": shift,
        "prompt_as_is": prompt_as_is,
        "seed": seed,
        "fps": fps,
        "fit": fit,
        "model": model,
        "tokenization": tokenization,
        "keep_ratio": keep_ratio,
        "target_psnr_db": target_psnr,
        "artifacts": ("mp4", "frames_f32") if frames_f32 else (),
        "priority": priority,
    }
    with connect(server, tenant) as client:
        if detach:
            job = client.submit(**clip)
            out.show_json(out.job_json(job)) if as_json else out.show(job.job_id)
            return
        if previews:
            every = 1 if preview_every is None else preview_every
            clip["previews"] = Previews(every_steps=every, frames=True)
        generation = client.generate(output=output, **clip)
        made = _run(generation, PreviewFolder(previews) if previews else None, quiet=as_json)
        files = {"frames_f32": str(_save_frames(client, made, frames_f32))} if frames_f32 else {}
    if as_json:
        out.show_json(out.clip_json(made, output) | files)
    else:
        _tell(made, output)


def follow(events: Iterator[Event], folder: PreviewFolder | None = None, *, quiet: bool) -> Clip:
    """Shows `events` as they come, their pictures in `folder`, and returns the clip at their end."""
    with ProgressDisplay(quiet=quiet) as display:
        for event in events:
            display.show(event)
            if folder is not None:
                folder.show(event)
            if isinstance(event, Finished):
                return event.clip
    raise CinecatError("the server ended the events without a result")


def describe(clip: Clip) -> str:
    """A clip in one line."""
    seconds = sum(clip.timings.values())
    return (
        f"{clip.frames} frames {clip.width}x{clip.height} at {clip.fps:g} fps, seed {clip.seed}, style {clip.style}, "
        f"{clip.tokenization}{' (lossy)' if clip.keep_ratio < 1.0 else ''} {clip.tokens_used}/{clip.tokens_uniform} "
        f"tokens, {_steps(clip)}{clip.engine}, {seconds:.1f} s"
    )


def _steps(clip: Clip) -> str:
    """Says where not all steps ran the model."""
    return f"{clip.steps_run} of {clip.steps} steps run, " if clip.steps_run < clip.steps else ""


def _run(generation: Generation, folder: PreviewFolder | None, *, quiet: bool) -> Clip:
    try:
        return follow(generation, folder, quiet=quiet)
    except KeyboardInterrupt:
        if not generation.job_id:
            raise out.Interrupted("interrupted before the server had named the job") from None
        generation.cancel()
        raise out.Interrupted(f"interrupted; job {generation.job_id} cancelled", job_id=generation.job_id) from None


def _save_frames(client: Client, clip: Clip, output: Path) -> Path:
    for artifact in clip.artifacts:
        if artifact.format == "frames_f32":
            return client.download(clip.job_id, output, artifact.name)
    raise NotFound(f"job {clip.job_id} wrote no frames_f32", job_id=clip.job_id)


def _tell(clip: Clip, output: Path | None) -> None:
    for note in clip.notes:
        out.say(note)
    out.show(f"{output}: {describe(clip)}")
