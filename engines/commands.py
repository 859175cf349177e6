"""Commands of the engine room: training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def train_tiny(
    folder: Annotated[Path, typer.Argument(help="Folder for the checkpoint; it must not exist yet.")],
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints, latents and curves; a stopped run goes on from here.")
    ] = Path("out/train-tiny"),
    vae_steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of the VAE.")] = 1200,
    small_steps: Annotated[int, typer.Option(min=1, help="Transformer steps on 64x64 windows.")] = 1000,
    full_steps: Annotated[int, typer.Option(min=1, help="Transformer steps on 128x128 frames.")] = 500,
    large_steps: Annotated[int, typer.Option(min=1, help="Transformer steps on 256x256 frames.")] = 120,
    small_films: Annotated[int, typer.Option(min=64, help="Films for the windows.")] = 2000,
    full_films: Annotated[int, typer.Option(min=64, help="Films of 128x128.")] = 700,
    large_films: Annotated[int, typer.Option(min=16, help="Films of 256x256.")] = 120,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> None:
    """Trains the bundled model wan-tiny on the procedural film set."""
    try:
        import torch

        from cinecat.engines.training.recipe import TrainingPlan
        from cinecat.engines.training.recipe import train_tiny as run
        from cinecat.engines.training.vae import VaeRecipe
    except ModuleNotFoundError as error:
        typer.echo(f"train-tiny: {error.name} is missing; install the extra: pip install 'cinecat[train]'", err=True)
        raise typer.Exit(2) from error
    if threads:
        torch.set_num_threads(threads)
    amounts = ((small_steps, small_films), (full_steps, full_films), (large_steps, large_films))
    plan = TrainingPlan(
        vae=VaeRecipe(steps=vae_steps),
        stages=tuple(
            replace(stage, clips=films, recipe=replace(stage.recipe, steps=steps))
            for stage, (steps, films) in zip(TrainingPlan().stages, amounts, strict=True)
        ),
    )
    try:
        run(folder, work, plan)
    except FileExistsError as error:
        typer.echo(f"train-tiny: FOLDER: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{folder} written; serve it with: cinecat serve --model {folder}")
