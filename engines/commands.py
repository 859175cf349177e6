"""Commands of the engine room: training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train_tiny(
    folder: Annotated[Path, typer.Argument(help="Folder for the checkpoint; it must not exist yet.")],
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints, latents and curves; a stopped run goes on from here.")
    ] = Path("out/train-tiny"),
    scale: Annotated[
        float, typer.Option(min=0.001, help="Length of the training: 1 has the steps and films of the bundled weights.")
    ] = 1.0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> None:
    """Trains the bundled model wan-tiny on the procedural film set."""
    try:
        import torch

        from cinecat.engines.training.recipe import TrainingPlan
        from cinecat.engines.training.recipe import train_tiny as run
    except ModuleNotFoundError as error:
        typer.echo(f"train-tiny: {error.name} is missing; install the extra: pip install 'cinecat[train]'", err=True)
        raise typer.Exit(2) from error
    if threads:
        torch.set_num_threads(threads)
    try:
        run(folder, work, TrainingPlan().scaled(scale))
    except FileExistsError as error:
        typer.echo(f"train-tiny: FOLDER: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{folder} written; serve it with: cinecat serve --model {folder}")
