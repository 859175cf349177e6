"""`cinecat engines`: the compiled engines on this machine."""

from __future__ import annotations

import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cinecat.cli import output as out
from cinecat.engines.backends.store import EngineStore
from cinecat.engines.backends.store_entry import EngineEntry
from cinecat.engines.backends.store_folder import DEFAULT_MAX_GIB, default_engine_folder
from cinecat.engines.errors import EngineCacheError, EngineError, SettingError
from cinecat.engines.messages import CoreConfig
from cinecat.errors import CinecatError

app = typer.Typer(help="Compiled engines on this machine.", rich_markup_mode=None)

EngineCacheDir = Annotated[
    Path | None,
    typer.Option(
        "--engine-cache-dir",
        envvar="CINECAT_ENGINE_CACHE_DIR",
        metavar="DIR",
        help="Where they are kept; what the setting engine_cache_dir of the server says "
        "[$XDG_CACHE_HOME/cinecat/engines].",
    ),
]
# The same variables as the server reads, so that both mean the same engine.
Model = Annotated[
    str, typer.Option(envvar="CINECAT_MODEL", help="wan-tiny, a folder in diffusers' layout, or a hub id.")
]
Variant = Annotated[
    str, typer.Option(envvar="CINECAT_MODEL_VARIANT", help="File whose changes are fused into the model.")
]
Device = Annotated[str, typer.Option(envvar="CINECAT_DEVICE", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(envvar="CINECAT_DTYPE", help="auto, float32, bfloat16 or float16.")]
Slots = Annotated[int, typer.Option(envvar="CINECAT_STYLE_SLOTS", min=1, help="As the server's.")]
Rank = Annotated[int, typer.Option(envvar="CINECAT_MAX_RANK", min=1, help="As the server's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


@app.command("list")
def list_engines(engine_cache_dir: EngineCacheDir = None, as_json: Json = False) -> None:
    """List the engines, the longest unused first."""
    folder = _folder(engine_cache_dir)
    entries = _entries(_store(folder))
    if as_json:
        out.show_json({"engine_cache_dir": folder, "engines": [_entry_json(entry) for entry in entries]})
        return
    header = ("ENGINE", "SIZE", "LAST USED", "BUILT IN", "STATE", "KEY")
    out.show_table(header, [_row(entry) for entry in entries])


@app.command()
def build(
    backend: Annotated[str, typer.Option(help="inductor, onnxruntime, tensorrt or torch_tensorrt.")],
    model: Model = "wan-tiny",
    model_variant: Variant = "",
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxHxF",
            help="Width, height and frames of clips to build for, where the backend's engines have fixed shapes; may "
            "be repeated.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of tensorrt: version_compatible, same_compute_capability or ampere_plus; may be repeated."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    style_slots: Slots = 8,
    max_rank: Rank = 32,
    engine_cache_dir: EngineCacheDir = None,
    as_json: Json = False,
) -> None:
    """Build the engine that a server with the same settings loads; nothing is done when it is there."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from cinecat.engines.backends.building import build_engine
    except ModuleNotFoundError as error:
        raise CinecatError(f"{error.name} is missing; pip install 'cinecat[serve]'") from error
    config = CoreConfig(
        model=model,
        device=device,
        dtype=dtype,
        threads=0,
        style_slots=style_slots,
        max_rank=max_rank,
        cache_bytes=0,
        model_variant=model_variant,
        engine=backend,
        engine_sizes=tuple(map(_size_of, size or _words("CINECAT_ENGINE_SIZES"))),
        engine_options=tuple(option or _words("CINECAT_ENGINE_OPTIONS")),
        engine_cache_dir=str(engine_cache_dir or ""),
    )
    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("starting", total=None)
        try:
            built = build_engine(config, lambda step: progress.update(task, description=step))
        except SettingError as error:
            raise out.usage_error(str(error)) from error
        except EngineError as error:
            raise CinecatError(str(error)) from error
    if as_json:
        out.show_json({**vars(built), "folder": str(built.folder)})
        return
    how = f"built in {built.seconds:.0f} s" if built.seconds else "there already"
    out.show(f"{built.backend} {built.digest[:12]}: {how}, {_size(built.size_bytes)}")


@app.command()
def accept(
    backend: Annotated[
        list[str] | None, typer.Option(help="Try these alone, e.g. torch or onnxruntime; may be repeated.")
    ] = None,
    model: Model = "wan-tiny",
    model_variant: Variant = "",
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxHxF",
            help="Width, height and frames of clips to try; may be repeated [64x64x17, 128x128x17, 192x192x17].",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    style_slots: Slots = 8,
    max_rank: Rank = 32,
    pairs: Annotated[int, typer.Option(min=1, help="Samples of each timing.")] = 15,
    report: Annotated[Path, typer.Option(metavar="FILE", help="The page that is written.", dir_okay=False)] = Path(
        "accept.html"
    ),
    engine_cache_dir: EngineCacheDir = None,
    as_json: Json = False,
) -> None:
    """Build every backend that can run here, compare it with diffusers, time it, and write a report.

    The exit code is 1 when one that can run cannot be built or computes something else than diffusers.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from cinecat.engines.backends import acceptance, acceptance_page
    except ModuleNotFoundError as error:
        raise CinecatError(f"{error.name} is missing; pip install 'cinecat[serve]'") from error
    config = CoreConfig(
        model=model,
        device=device,
        dtype=dtype,
        threads=0,
        style_slots=style_slots,
        max_rank=max_rank,
        cache_bytes=0,
        model_variant=model_variant,
        engine_sizes=tuple(map(_size_of, size)) if size else acceptance.SIZES,
        engine_cache_dir=str(engine_cache_dir or ""),
    )
    names = tuple(dict.fromkeys(backend or acceptance.backend_names()))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=1.0)
        try:
            found = acceptance.accept(
                config, names, pairs, lambda step, done: progress.update(task, description=step, completed=done)
            )
        except SettingError as error:
            raise out.usage_error(str(error)) from error
        except EngineError as error:
            raise CinecatError(str(error)) from error
        progress.update(task, description="done", completed=1.0)
    try:
        report.write_text(acceptance_page.page(found), encoding="utf-8")
    except OSError as error:
        raise CinecatError(f"--report: {report} cannot be written: {error.strerror}") from error
    if as_json:
        out.show_json({**found.as_json(), "report": str(report)})
    else:
        header = ("BACKEND", "STATE", "ERROR", "VS DIFFUSERS", "VS TORCH", "VERDICT")
        rows = [
            (
                each.name,
                each.state,
                acceptance_page.largest_error(each),
                acceptance_page.speed(each, acceptance.DIFFUSERS),
                acceptance_page.speed(each, "torch"),
                acceptance_page.verdict(each),
            )
            for each in found.backends
        ]
        out.show_table(header, rows)
        out.show(f"{'accepted' if found.accepted else 'not accepted'}; the report is {report}")
    raise typer.Exit(0 if found.accepted else 1)


def _words(variable: str) -> list[str]:
    """What a variable of the server's lists, with commas between."""
    return [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]


def _size_of(word: str) -> tuple[int, int, int]:
    parts = word.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise out.usage_error(f"--size: {word!r} is not WIDTHxHEIGHTxFRAMES, e.g. 832x480x81")
    width, height, frames = map(int, parts)
    return width, height, frames


@app.command()
def verify(engine_cache_dir: EngineCacheDir = None, as_json: Json = False) -> None:
    """Compare all checksums. The exit code is 1 when an engine is damaged; it is then built anew when it is needed."""
    folder = _folder(engine_cache_dir)
    store = _store(folder)
    entries = _entries(store)
    found: dict[str, list[str]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=sum(entry.size_bytes for entry in entries))
        for entry in entries:
            try:
                found[entry.digest] = store.verify(entry, lambda size: progress.advance(task, size))
            except EngineCacheError as error:
                raise CinecatError(str(error)) from error
    damaged = {digest: problems for digest, problems in found.items() if problems}
    if as_json:
        engines = [_entry_json(entry) | {"problems": found[entry.digest]} for entry in entries]
        out.show_json({"engine_cache_dir": folder, "engines": engines, "damaged": len(damaged)})
    else:
        for digest, problems in damaged.items():
            out.show(f"{digest[:12]}: {'; '.join(problems)}")
        out.show(f"{folder}: engines: {len(entries)}, damaged: {len(damaged)}")
        if damaged:
            out.say("a damaged engine is built anew when it is needed; remove it now with: cinecat engines prune")
    raise typer.Exit(1 if damaged else 0)


@app.command()
def prune(
    engine_cache_dir: EngineCacheDir = None,
    engine_cache_gib: Annotated[
        float,
        typer.Option(
            "--engine-cache-gib", envvar="CINECAT_ENGINE_CACHE_GIB", min=0, help="What may stay; 0 removes all."
        ),
    ] = DEFAULT_MAX_GIB,
    as_json: Json = False,
) -> None:
    """Remove damaged engines, leftovers of killed builds, and the longest unused engines beyond a size.

    What a process uses stays; the exit code is 1 when it leaves more than the size.
    """
    folder = _folder(engine_cache_dir)
    if not math.isfinite(engine_cache_gib):
        raise out.usage_error(f"--engine-cache-gib: {engine_cache_gib} is no size; give a number of GiB")
    try:
        pruned = _store(folder).prune(round(engine_cache_gib * 2**30))
    except EngineCacheError as error:
        raise CinecatError(str(error)) from error
    freed = sum(entry.size_bytes for entry in pruned.removed)
    if as_json:
        removed, in_use = ([entry.digest for entry in entries] for entries in (pruned.removed, pruned.in_use))
        sizes = {"freed_bytes": freed, "kept_bytes": pruned.kept_bytes}
        out.show_json({"engine_cache_dir": folder, "removed": removed, "in_use": in_use, **sizes})
    else:
        out.show(f"{folder}: engines removed: {len(pruned.removed)}, {_size(freed)}; {_size(pruned.kept_bytes)} stay")
        for entry in pruned.in_use:
            out.say(f"{entry.digest[:12]} is in use and stays; stop the process that uses it to remove it")
    raise typer.Exit(1 if pruned.in_use else 0)


def _folder(given: Path | None) -> Path:
    """Where the engines are. What was named must be there: a wrong name would look like an empty folder."""
    given = given.expanduser() if given is not None else None
    if given is not None and not given.is_dir():
        raise out.usage_error(
            f"--engine-cache-dir: {given} is not a folder; name the one that the server's engine_cache_dir names"
        )
    return given or default_engine_folder()


def _store(folder: Path) -> EngineStore:
    return EngineStore(folder, None, announce=lambda event: None)


def _entries(store: EngineStore) -> list[EngineEntry]:
    try:
        return store.entries()
    except EngineCacheError as error:
        raise CinecatError(str(error)) from error


def _entry_json(entry: EngineEntry) -> dict[str, object]:
    manifest = entry.manifest
    return {
        "digest": entry.digest,
        "path": str(entry.files),
        "size_bytes": entry.size_bytes,
        "last_used": _time(entry.last_used),
        "created": _time(manifest.created) if manifest else None,
        "build_seconds": manifest.build_seconds if manifest else None,
        "key": manifest.key.fields if manifest else None,
        "problems": list(entry.problems),
    }


def _row(entry: EngineEntry) -> tuple[object, ...]:
    manifest = entry.manifest
    return (
        entry.digest[:12],
        _size(entry.size_bytes),
        _time(entry.last_used).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        f"{manifest.build_seconds:.1f} s" if manifest else "",
        "; ".join(entry.problems) or "ok",
        manifest.key.describe() if manifest else "",
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
