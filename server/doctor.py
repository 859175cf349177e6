"""`cinecat doctor`: whether `cinecat serve` would work here with the settings in force."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cinecat.cli import output as out
from cinecat.server.cards import next_seat
from cinecat.server.commands import with_setting_flags
from cinecat.server.settings import SettingsError, clip_size, load_settings

if TYPE_CHECKING:
    from cinecat.engines.doctor import Diagnosis


def _doctor(
    config: Annotated[Path | None, typer.Option(envvar="CINECAT_CONFIG", help="TOML file of settings")] = None,
    width: Annotated[
        int | None, typer.Option(help="of the largest clip, in pixels [128 for wan-tiny, else 832]")
    ] = None,
    height: Annotated[int | None, typer.Option(help="in pixels [128 for wan-tiny, else 480]")] = None,
    frames: Annotated[int | None, typer.Option(help="of the longest clip, 4k + 1 [17 for wan-tiny, else 81]")] = None,
    guidance_rows: Annotated[int, typer.Option(help="1 without guidance, 2 with it")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
    **flags: str | None,
) -> None:
    """Tell what this machine has, which backends can run, and whether serve would work.

    Takes the settings of serve, from the same places. The exit code is 0 when serve would work, 1 when it would not,
    and 2 when a setting is wrong. Nothing is loaded and nothing is downloaded.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        settings = load_settings(
            {name: value for name, value in flags.items() if value is not None}, os.environ, config
        )
    except SettingsError as error:
        raise _refused(f"{error}") from error
    try:
        from cinecat.engines.doctor import Asked, diagnose
        from cinecat.engines.memory_plan import Clip
    except ModuleNotFoundError as error:
        if (error.name or "cinecat").partition(".")[0] == "cinecat":
            raise
        print(
            f"cinecat doctor: {error.name} is missing; install the extra: pip install 'cinecat[serve]'", file=sys.stderr
        )
        raise typer.Exit(1) from error
    tiny = settings.model == "wan-tiny"
    try:
        clip = Clip(
            width if width is not None else 128 if tiny else 832,
            height if height is not None else 128 if tiny else 480,
            frames if frames is not None else 17 if tiny else 81,
            guidance_rows,
        )
    except ValueError as error:
        raise _refused(f"{error}") from error
    found = diagnose(
        Asked(
            model=settings.model,
            model_variant="" if settings.model_variant is None else str(settings.model_variant),
            device=next_seat(settings.device, settings.shard, ()).device,
            dtype=settings.dtype,
            engine=settings.engine,
            style_slots=settings.style_slots,
            max_rank=settings.max_rank,
            clip=clip,
            offload=settings.offload,
            storage_dtype=settings.storage_dtype,
            shard=settings.shard,
            shard_weights=settings.shard_weights,
            engine_sizes=tuple(map(clip_size, settings.engine_sizes)),
        ),
        {"data_dir": settings.data_dir, "engine_cache_dir": settings.engine_cache_dir},
    )
    if as_json:
        out.show_json(found.as_json())
    else:
        _show(found)
    if not found.serves:
        raise typer.Exit(1)


doctor = with_setting_flags(_doctor)


def _refused(message: str) -> typer.Exit:
    print(f"cinecat doctor: {message}", file=sys.stderr)
    return typer.Exit(2)


def _show(found: Diagnosis) -> None:
    from cinecat.engines.memory import in_words

    def size(bytes_: int | None) -> str:
        return "unknown" if bytes_ is None else in_words(bytes_)

    machine = found.machine
    rows: list[tuple[str, object]] = [
        ("CPU", f"{machine.cpu}, {machine.cores:g} cores"),
        ("memory", f"{size(machine.memory_bytes)}, {size(machine.available_bytes)} available"),
    ]
    rows += [
        (
            f"GPU {index}",
            f"{gpu.name} ({gpu.compute_capability}), {size(gpu.memory_bytes)}, {size(gpu.available_bytes)} left",
        )
        for index, gpu in enumerate(machine.gpus)
    ] or [("GPU", "none")]
    rows += [
        ("driver", machine.driver or "none"),
        ("torch", f"{machine.torch}, CUDA {machine.cuda or 'none'}"),
        ("onnxruntime", machine.onnxruntime or "none"),
        ("TensorRT", machine.tensorrt or "none"),
    ]
    rows += [
        (
            disk.purpose,
            f"{disk.folder}, " + ("not writable" if disk.free_bytes is None else f"{size(disk.free_bytes)} free"),
        )
        for disk in found.disks
    ]
    out.show_table(("MACHINE", ""), rows)
    print()
    out.show_table(("BACKEND", ""), [(name, "runs" if why is None else why) for name, why in found.backends.items()])
    print()
    if found.memory is not None:
        parts = [(name.replace("_", " "), size(value)) for name, value in found.memory.parts().items()]
        left = f"{size(found.available_bytes)} available on {found.device}"
        out.show_table(
            (f"MEMORY: {found.model}, {found.dtype}", ""),
            [*parts, ("at the peak", size(found.memory.needed)), ("", left)],
        )
        print()
    for note in found.notes:
        out.show(f"note: {note}")
    for problem in found.problems:
        out.show(f"problem: {problem}")
    out.show("serve would work" if found.serves else "serve would not work")
