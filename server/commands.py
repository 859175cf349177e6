"""The server's commands, found by the command line through the entry points `cinecat.commands`."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cinecat.server.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from cinecat.server.bench.harness import Report


def _serve(
    config: Annotated[Path | None, typer.Option(envvar="CINECAT_CONFIG", help="TOML file of settings")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="show the settings in force as JSON, and exit")
    ] = False,
    **flags: str | None,
) -> None:
    """Serve a model over gRPC.

    Every setting is a flag, an environment variable (CINECAT_MAX_STEPS) and a key of the TOML file (max_steps), in
    this order of precedence.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = load_settings(given, os.environ, config)
    except SettingsError as error:
        _refuse(f"{error}")
    if print_config:
        print(settings.model_dump_json(indent=2))
        return
    from cinecat.engines.errors import EngineError
    from cinecat.engines.logs import configure_logging
    from cinecat.server.app import serve as run_server

    configure_logging(settings.log_format, settings.log_level)
    try:
        asyncio.run(run_server(settings, lambda: load_settings(given, os.environ, config)))
    except (EngineError, SettingsError, OSError) as error:
        _refuse(f"{error}")


def _refuse(message: str) -> Any:
    print(f"cinecat serve: {message}", file=sys.stderr)
    raise typer.Exit(2)


def with_setting_flags(command: Any) -> Any:
    """Gives a command one option for each setting, so that flags, environment and file cannot drift apart."""
    signature = inspect.signature(command, eval_str=True)  # typer leaves the options of unevaluated ones out
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = []
    for name, field in Settings.model_fields.items():
        default = "" if field.is_required() or field.default_factory else f" [default: {field.default!r}]"
        option = typer.Option(help=f"{field.description}{default}", show_default=False)
        options.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
            )
        )
    command.__signature__ = signature.replace(parameters=[*own, *options])
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}
    return command


serve = with_setting_flags(_serve)


def bench(
    name: Annotated[str, typer.Argument(help="benchmark to run")],
    quick: Annotated[bool, typer.Option(help="within two minutes, with a wider spread")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for CSV files and plots")] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="tokens: planning alone, at --size and --frames; runs no model")
    ] = False,
    size: Annotated[
        str | None, typer.Option(help="tokens --plan-only: WIDTHxHEIGHT in pixels [default: 3840x2160]")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="tokens --plan-only: frames of the clip, 4k + 1 [default: 81]")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="tokens: AlexNet and LPIPS's heads in one safetensors file")
    ] = None,
) -> None:
    """Measure Cinecat against its rivals, side by side in one run."""
    from cinecat.server.bench import BENCHES
    from cinecat.server.bench.harness import as_text

    if name not in BENCHES:
        _refuse_bench(f"no benchmark {name!r}; there are: {', '.join(BENCHES)}")
    if (plan_only or lpips_weights) and name != "tokens":
        _refuse_bench(f"--plan-only and --lpips-weights belong to the benchmark tokens, not to {name}")
    if not plan_only and (size is not None or frames is not None):
        _refuse_bench("--size and --frames go with --plan-only; the benchmarks themselves have fixed work")
    try:
        if plan_only:
            report = _bench_plans(size or "3840x2160", 81 if frames is None else frames, quick, out)
        elif lpips_weights:
            report = _bench_with_lpips(quick, out, lpips_weights)
        else:
            report = BENCHES[name](quick, out)
    except ModuleNotFoundError as error:
        if (error.name or "cinecat").partition(".")[0] == "cinecat":
            raise
        _refuse_bench(f"{error.name} is missing; install the extra: pip install 'cinecat[bench]'")
    print(json.dumps(report.as_json()) if as_json else as_text(report))
    if not all(check.met for check in report.checks.values()):
        raise typer.Exit(1)


def plan(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="PNG, JPEG, WebP or TIFF")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="the picture, e.g. plan.png")],
    keep_ratio: Annotated[float, typer.Option(help="tokens over those of the uniform path, in one step")] = 0.5,
    model: Annotated[str, typer.Option(help="wan-tiny, a folder in diffusers' layout, or a hub id")] = "wan-tiny",
    size: Annotated[str, typer.Option(metavar="WxH", help="pixels of the clip, to which the image is cropped")] = "",
    frames: Annotated[int | None, typer.Option(help="of the clip, 4k + 1 [17 for wan-tiny, else 81]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Draw which patches of an image's clip share a token under CAT.

    The plan is of the image alone and takes the clip to stand still, so all that can merge over time does. A real clip
    is planned from its own prediction in every step, and what moves keeps more tokens. Left is the first latent frame,
    right one from the middle; green tokens have 2 patches, yellow ones 4, red ones 8.
    """
    # transformers warns that there is no torchvision, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from cinecat.engines.errors import EngineError
    from cinecat.server.still_plan import PlanError, plan_image

    tiny = model == "wan-tiny"
    width, _, height = (size or ("128x128" if tiny else "832x480")).lower().partition("x")
    try:
        if not (width.isdecimal() and height.isdecimal()):
            raise PlanError(f"size: {size!r} is not WIDTHxHEIGHT, e.g. 832x480")
        summary = plan_image(
            image,
            output,
            model=model,
            device=device,
            size=(int(width), int(height)),
            frames=frames if frames is not None else 17 if tiny else 81,
            keep_ratio=keep_ratio,
        )
    except (PlanError, EngineError, OSError) as error:
        print(f"cinecat plan: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    print(json.dumps(summary.as_json()) if as_json else summary.as_text())


def _bench_plans(size: str, frames: int, quick: bool, out: Path | None) -> Report:
    from cinecat.server.bench.token_plans import bench_plans

    try:
        width, height = (int(side) for side in size.lower().split("x"))
    except ValueError:
        _refuse_bench(f"--size: {size!r} is not WIDTHxHEIGHT, such as 3840x2160")
    try:
        return bench_plans(width, height, frames, quick, out)
    except ValueError as error:
        _refuse_bench(f"--{error}")


def _bench_with_lpips(quick: bool, out: Path | None, weights: Path) -> Report:
    from cinecat.engines.quality.weights import WeightsError
    from cinecat.server.bench.tokens import bench_tokens

    try:
        return bench_tokens(quick, out, weights)
    except WeightsError as error:
        _refuse_bench(f"--lpips-weights: {error}")


def _refuse_bench(message: str) -> NoReturn:
    print(f"cinecat bench: {message}", file=sys.stderr)
    raise typer.Exit(2)
