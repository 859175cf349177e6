"""`cinecat plan-capacity`: what a clip would take on several cards."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cinecat.cli import output as out

if TYPE_CHECKING:
    from cinecat.engines.capacity.calibration import Calibration
    from cinecat.engines.capacity.projection import Asked, Projection

_GIB = 2**30
_UNITS = {
    "linear_flops": ("linears", 1e12, "TFLOP/s"),
    "attention_flops": ("attention", 1e12, "TFLOP/s"),
    "vae_flops": ("VAE", 1e12, "TFLOP/s"),
    "layer_seconds": ("of each layer besides", 1e-6, "us"),
    "link_bytes": ("sent while as much is received", 1e9, "GB/s"),
    "message_seconds": ("of each exchange besides", 1e-6, "us"),
}


def plan_capacity(
    model: Annotated[
        str, typer.Option(help="14B (the published layout, without weights), wan-tiny, a folder or a hub id")
    ] = "14B",
    size: Annotated[
        str, typer.Option(metavar="WxH", help="pixels of the clip [128x128 for wan-tiny, else 1280x720]")
    ] = "",
    frames: Annotated[int | None, typer.Option(help="of the clip, 4k + 1 [17 for wan-tiny, else 81]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="of the clip")] = 50,
    guidance: Annotated[bool, typer.Option(help="two rows a step, or one")] = True,
    keep_ratio: Annotated[float, typer.Option(help="tokens over those of the uniform path, over all steps")] = 1.0,
    cards: Annotated[int, typer.Option(min=1, max=4096, help="GPUs at hand; a replica's are in one machine")] = 8,
    card_memory_gib: Annotated[float, typer.Option(min=0.001, help="of each card")] = 80.0,
    shard: Annotated[str, typer.Option(help="one layout, as the setting shard [all that share out the cards]")] = "",
    shard_weights: Annotated[Literal["none", "fsdp"], typer.Option(help="as the setting")] = "none",
    offload: Annotated[Literal["none", "encoders"], typer.Option(help="as the setting")] = "none",
    style_slots: Annotated[int, typer.Option(min=1, help="as the setting")] = 8,
    max_rank: Annotated[int, typer.Option(min=1, help="as the setting")] = 32,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16, or --measure's device's")
    ] = "auto",
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="TFLOP/s that a card achieves in the blocks [400, assumed]")
    ] = None,
    attention_tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="in self-attention, where that differs [as --tflops]")
    ] = None,
    vae_tflops: Annotated[float | None, typer.Option(min=1e-6, help="in the VAE, in float32 [30, assumed]")] = None,
    bandwidth_gbs: Annotated[
        float | None, typer.Option(min=1e-6, help="GB/s that a card sends while it receives as much [300, assumed]")
    ] = None,
    latency_us: Annotated[
        float | None, typer.Option(min=0.0, help="microseconds of each exchange besides [20, assumed]")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="calibrate on this machine, and reckon sizes that it was not fitted to")
    ] = False,
    device: Annotated[str, typer.Option(help="of --measure: auto, cpu, cuda or cuda:N")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Tell what a clip would take on several cards: time, memory and traffic of every layout, and how many pay.

    All of it is projected: reckoned by formula from speeds that were measured, given or assumed, which it tells. The
    exit code is 0 when a layout fits into the cards' memory, 1 when none does, and 2 when an option is wrong.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from cinecat.engines.capacity.projection import Asked
        from cinecat.engines.errors import EngineError
        from cinecat.engines.memory_plan import Clip
    except ModuleNotFoundError as error:
        if (error.name or "cinecat").partition(".")[0] == "cinecat":
            raise
        _refuse(f"{error.name} is missing; install the extra: pip install 'cinecat[serve]'", 1)
    if device != "auto" and not measure:
        _refuse(f"--device: {device} is where to measure; add --measure, or leave it out")
    tiny = model == "wan-tiny"
    attention = attention_tflops if attention_tflops is not None else tflops
    given = {
        "linear_flops": (tflops, 1e12),
        "attention_flops": (attention, 1e12),
        "vae_flops": (vae_tflops, 1e12),
        "link_bytes": (bandwidth_gbs, 1e9),
        "message_seconds": (latency_us, 1e-6),
    }
    try:
        width, height = _pixels(size or ("128x128" if tiny else "1280x720"))
        asked = Asked(
            model=model,
            clip=Clip(width, height, frames if frames is not None else 17 if tiny else 81, 2 if guidance else 1),
            steps=steps,
            keep_ratio=keep_ratio,
            cards=cards,
            card_bytes=int(card_memory_gib * _GIB),
            shard=shard,
            shard_weights=shard_weights,
            offload=offload,
            style_slots=style_slots,
            max_rank=max_rank,
            dtype=dtype,
            device=device if measure else "",
            given={name: value * unit for name, (value, unit) in given.items() if value is not None},
        )
        found = _projected(asked)
    except (EngineError, ValueError) as error:
        _refuse(f"--{error}")
    if as_json:
        out.show_json(found.as_json())
    else:
        _show(found)
    if not any(plan.fits for plan in found.plans):
        raise typer.Exit(1)


def _projected(asked: Asked) -> Projection:
    """With a bar while it measures."""
    from cinecat.engines.capacity.projection import project

    if not asked.device:
        return project(asked, lambda doing, share: None)
    columns = TextColumn("measuring {task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=1.0)
        return project(asked, lambda doing, share: progress.update(task, description=doing, completed=share))


def _pixels(size: str) -> tuple[int, int]:
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size: {size!r} is not WIDTHxHEIGHT, e.g. 832x480")
    return int(width), int(height)


def _refuse(message: str, code: int = 2) -> NoReturn:
    print(f"cinecat plan-capacity: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _show(found: Projection) -> None:
    asked, clip = found.asked, found.asked.clip
    if found.calibration is not None:
        _show_calibration(found.calibration)
        print()
    path = "uniform" if asked.keep_ratio == 1.0 else f"CAT, keep ratio {asked.keep_ratio:g}"
    rows = "with guidance" if clip.rows == 2 else "without guidance"
    out.show(f"{asked.model}, {found.dtype}: {clip.width}x{clip.height}, {clip.frames} frames, {clip.tokens:,} tokens")
    out.show(f"{asked.steps} steps {rows}, {path}")
    out.show(f"{asked.cards} cards of {asked.card_bytes / _GIB:g} GiB")
    print()
    speeds = found.speeds.named().items()
    words = {
        name: (what, f"{value / _UNITS[name][1]:.4g}", _UNITS[name][2])
        for name, value in speeds
        for what in [_UNITS[name][0]]
    }
    out.show_table(("SPEEDS", "", "", ""), [(*words[name], found.speeds.sources[name]) for name in words])
    print()
    out.show("All that follows is projected from these speeds; nothing of it was run.")
    print()
    _show_plans(found)
    if found.stops:
        print()
        out.show_table(
            ("DOUBLING RANKS", "PAYS UP TO", "RANKS", "A CLIP IS", "THEN"),
            [
                (stop.family, stop.layout, stop.layout.ranks, f"{stop.speed_up:.1f}x as fast", stop.reason)
                for stop in found.stops
            ],
        )
    print()
    _show_legend(found)


def _show_plans(found: Projection) -> None:
    header = (
        "SHARD",
        "RANKS",
        "REPLICAS",
        "S/STEP",
        "CLIP S",
        "CLIPS/H",
        "TOKENS/S",
        "A2A GB",
        "RING GB",
        "EXCHANGES",
        "EFFICIENCY",
        "LEADER GIB",
        "OTHERS GIB",
        "",
    )
    rows = []
    for plan in found.plans:
        follower = plan.memory.follower
        remark = "does not fit" if not plan.fits else "VAE in tiles" if plan.tiles else ""
        if plan.layout == found.auto:
            remark = "auto" if not remark else f"auto, {remark}"
        rows.append(
            (
                plan.layout,
                plan.layout.ranks,
                plan.replicas,
                _seconds(plan.step.total),
                _seconds(plan.clip.total),
                f"{plan.clips_per_hour:.3g}",
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.traffic.all_to_all / 1e9:.3g}",
                f"{plan.traffic.ring / 1e9:.3g}",
                f"{plan.communicating:.1%}",
                f"{plan.efficiency:.1%}",
                f"{plan.memory.leader.taken(found.asked.card_bytes) / _GIB:.1f}",
                "" if follower is None else f"{follower.taken(found.asked.card_bytes) / _GIB:.1f}",
                remark,
            )
        )
    out.show_table(header, rows)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100.0 else f"{value:.3g}"


def _show_legend(found: Projection) -> None:
    out.show(
        "A2A GB, RING GB: sent by one card in a step. EXCHANGES: their share of a step; nothing is taken to overlap."
    )
    out.show("CLIPS/H: of all replicas. LEADER, OTHERS: GiB at the peak, of a replica's first card and of each other.")
    for note in found.notes:
        out.show(f"note: {note}")


def _show_calibration(calibration: Calibration) -> None:
    where = f"{calibration.device}, {calibration.dtype}, {calibration.threads} threads, {calibration.layers} layers"
    out.show_table(
        (f"MEASURED: {where}", "TOKENS", "MEASURED S", "RECKONED S", "RECKONED / MEASURED", ""),
        [
            (
                f"{sample.what} {sample.size}",
                sample.tokens or "",
                f"{sample.measured:.4g}",
                f"{sample.reckoned:.4g}",
                f"{sample.ratio:.2f}",
                "fitted" if sample.fitted else "not fitted: a test",
            )
            for sample in calibration.samples
        ],
    )
