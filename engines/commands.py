"""Commands of the engine room: training, films to train on, and the judging of clips."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from cinecat.engines.errors import EngineError
from cinecat.plugins.errors import StyleError


def train_tiny(
    folder: Annotated[Path, typer.Argument(help="Folder for the checkpoint; it must not exist yet.")],
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints, latents and curves; a stopped run goes on from here.")
    ] = Path("out/train-tiny"),
    scale: Annotated[
        float, typer.Option(min=0.001, help="Length of the training: 1 has the steps and films of the bundled weights.")
    ] = 1.0,
    compile: Annotated[
        bool, typer.Option(help="Compile the transformer first: a minute, then faster steps. Needs a C++ compiler.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> None:
    """Trains the bundled model wan-tiny on the procedural film set."""
    try:
        import torch

        from cinecat.engines.training.recipe import TrainingPlan
        from cinecat.engines.training.recipe import train_tiny as run
    except ModuleNotFoundError as error:
        raise _missing("train-tiny", error) from error
    if threads:
        torch.set_num_threads(threads)
    try:
        run(folder, work, TrainingPlan().scaled(scale), compiled=compile)
    except FileExistsError as error:
        typer.echo(f"train-tiny: FOLDER: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{folder} written; serve it with: cinecat serve --model {folder}")


def train_style(
    clips_dir: Annotated[
        Path,
        typer.Argument(metavar="CLIPS_DIR", help="Folder of clips, each with a .txt beside it, or a metadata.jsonl."),
    ],
    name: Annotated[str, typer.Option(help="What the style is called: lower-case letters, digits and dashes.")],
    model: Annotated[str, typer.Option(help="wan-tiny, a folder in diffusers' layout, or a hub id.")] = "wan-tiny",
    out: Annotated[Path, typer.Option(help="Folder that the style's own folder is made in.")] = Path("styles"),
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints and encoded clips; a stopped run goes on from here.")
    ] = Path("out/train-style"),
    title: Annotated[str, typer.Option(help="Its name for people.")] = "",
    version: Annotated[str, typer.Option(help="Three numbers.")] = "1.0.0",
    description: Annotated[str, typer.Option(help="What it does.")] = "",
    author: Annotated[str, typer.Option(help="Who made it.")] = "",
    license: Annotated[str, typer.Option(help="Its licence.")] = "",
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Rank of the LoRA.")] = 8,
    alpha: Annotated[float, typer.Option(min=0.001, max=1e6, help="Its effect is alpha / rank.")] = 16.0,
    targets: Annotated[str, typer.Option(help="Which linears: cross-attention, attention or all.")] = "cross-attention",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps, at most.")] = 500,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-8, max=1.0, help="Its peak [0.002 for wan-tiny, else 0.0001].")
    ] = None,
    accumulation: Annotated[int, typer.Option(min=1, help="Clips per optimiser step and process.")] = 4,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between two validations.")] = 25,
    patience: Annotated[int, typer.Option(min=1, help="Validations without a new best before it stops.")] = 6,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the clips to validate on.")] = 0.15,
    prompt_template: Annotated[
        str, typer.Option(help="What becomes of captions and prompts, e.g. 'film noir, {prompt}'.")
    ] = "",
    width: Annotated[int | None, typer.Option(help="Of the clips, in pixels [128 for wan-tiny, else 832].")] = None,
    height: Annotated[int | None, typer.Option(help="Of the clips, in pixels [128 for wan-tiny, else 480].")] = None,
    frames: Annotated[int | None, typer.Option(help="Of each clip, 4k + 1 [17 for wan-tiny, else 81].")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second [8 for wan-tiny, else 16].")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of every draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    checkpoint_activations: Annotated[
        bool, typer.Option(help="Compute blocks twice rather than keep what is inside them.")
    ] = True,
    lpips_weights: Annotated[
        Path | None,
        typer.Option(
            help="safetensors file of AlexNet and LPIPS' heads; LPIPS then decides when to stop, not the loss."
        ),
    ] = None,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds between two checkpoints; 0 is every step.")
    ] = 60.0,
    start: Annotated[Path | None, typer.Option(help="File of a LoRA to train further, of the same layers.")] = None,
    scale: Annotated[
        float,
        typer.Option(min=0.01, max=4.0, help="What strength 1 is of the LoRA as trained; less keeps more motion."),
    ] = 1.0,
    preview: Annotated[bool, typer.Option(help="Render one with the engine.")] = True,
) -> None:
    """Trains a style on a few captioned clips, for any Wan2.1 I2V checkpoint."""
    # transformers warns that there is no torchvision, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from cinecat.engines.training.styles.clips import ClipError
        from cinecat.engines.training.styles.recipe import StyleRecipe
        from cinecat.engines.training.styles.session import StyleTraining, run_training
    except ModuleNotFoundError as error:
        raise _missing("train-style", error) from error
    texts = {"title": title, "version": version, "description": description, "author": author, "license": license}
    asked = StyleTraining(
        clips=clips_dir,
        name=name,
        model=model,
        out=out,
        work=work,
        recipe=StyleRecipe(
            rank=rank,
            alpha=alpha,
            targets=targets,
            steps=steps,
            accumulation=accumulation,
            held_out=held_out,
            evaluate_every=evaluate_every,
            patience=patience,
            prompt_template=prompt_template,
            checkpoint_activations=checkpoint_activations,
            seed=seed,
        ),
        texts={**texts, "prompt_template": prompt_template},
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        learning_rate=learning_rate,
        device=device,
        dtype=dtype,
        preview=preview,
        lpips_weights=lpips_weights,
        save_seconds=save_seconds,
        start=start,
        scale=scale,
    )
    # Under `accelerate launch` every process comes here, and one of them speaks.
    main = os.environ.get("RANK", "0") == "0"
    try:
        folder = run_training(asked, lambda sentence: typer.echo(sentence, err=True))
    except (EngineError, StyleError, ClipError, OSError) as error:
        if main:
            typer.echo(f"train-style: {error}", err=True)
        raise typer.Exit(2) from error
    if main:
        typer.echo(f"{folder} written; use it on a running server with:")
        typer.echo(f"  cinecat styles install {folder}")
        typer.echo(f"  cinecat generate IMAGE --prompt '...' --style {name} -o clip.mp4")


def train_cat(
    model: Annotated[str, typer.Option(help="wan-tiny, a folder in diffusers' layout, or a hub id.")] = "wan-tiny",
    out: Annotated[Path, typer.Option(help="Folder for the adapter; it must not exist yet.")] = Path("out/train-cat"),
    work: Annotated[
        Path, typer.Option(help="Folder for the teacher's courses and checkpoints; a stopped run goes on from here.")
    ] = Path("out/train-cat-work"),
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Rank of the LoRA.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 160,
    max_seconds: Annotated[
        float, typer.Option(min=0, help="Of all optimiser steps; the schedule then ends by time. 0 has no limit.")
    ] = 0.0,
    learning_rate: Annotated[float, typer.Option(min=1e-8, max=1.0, help="Its peak.")] = 2e-3,
    accumulation: Annotated[int, typer.Option(min=1, help="Samples per optimiser step.")] = 8,
    films: Annotated[int, typer.Option(min=1, help="To train on; the teacher denoises each once.")] = 96,
    held_out: Annotated[int, typer.Option(min=1, help="Films to measure on.")] = 12,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between two measurements and checkpoints.")] = 20,
    sizes: Annotated[str, typer.Option(help="Of the films in pixels, in turn.")] = "128x128,256x256",
    frames: Annotated[int, typer.Option(help="Of each film, 4k + 1.")] = 17,
    styles: Annotated[
        str | None, typer.Option(help="Names of styles to train with; all of the model's when left out, '' for none.")
    ] = None,
    styles_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder of further styles, beside the bundled ones; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of every draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> None:
    """Distils an adapter for steps with merged tokens, so that they predict what all tokens would."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import torch

        from cinecat.engines.training.cat.recipe import CatRecipe, parse_sizes
        from cinecat.engines.training.cat.session import CatTraining, run_training
    except ModuleNotFoundError as error:
        raise _missing("train-cat", error) from error
    if threads:
        torch.set_num_threads(threads)
    try:
        asked = CatTraining(
            model=model,
            out=out,
            work=work,
            recipe=CatRecipe(
                rank=rank,
                alpha=float(rank),
                steps=steps,
                accumulation=accumulation,
                learning_rate=learning_rate,
                sizes=parse_sizes(sizes),
                frames=frames,
                films=films,
                held_out=held_out,
                evaluate_every=evaluate_every,
                seed=seed,
            ),
            styles_dirs=tuple(styles_dir or ()),
            styles=None if styles is None else tuple(word.strip() for word in styles.split(",") if word.strip()),
            device=device,
            dtype=dtype,
            max_seconds=max_seconds or math.inf,
        )
        folder = run_training(asked, lambda sentence: typer.echo(sentence, err=True))
    except (EngineError, StyleError, OSError) as error:
        typer.echo(f"train-cat: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{folder} written")


def film_set(
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the films; it must hold none yet.")],
    clips: Annotated[int, typer.Option(min=1, help="How many.")] = 24,
    grade: Annotated[str, typer.Option(help="The films' look: none, noir, amber or blueprint.")] = "none",
    first_seed: Annotated[int, typer.Option(min=0, help="Of the first film; the others follow.")] = 0,
    width: Annotated[int, typer.Option(min=16, max=4096, help="In pixels.")] = 128,
    height: Annotated[int, typer.Option(min=16, max=4096, help="In pixels.")] = 128,
    frames: Annotated[int, typer.Option(min=1, max=1001, help="Of each film.")] = 17,
    fps: Annotated[float, typer.Option(min=1, max=240, help="Frames a second.")] = 8.0,
    kinds: Annotated[str, typer.Option(help="Kinds of shots, in turn, e.g. slide,still; all when left out.")] = "",
    from_model: Annotated[
        str, typer.Option(help="A model, as --model of train-style, whose own clips of the films are written instead.")
    ] = "",
) -> None:
    """Writes captioned clips of the procedural film set, in a look of choice, to train a style on."""
    try:
        from cinecat.engines.training.film_set import played_by, write_film_set
        from cinecat.engines.training.grades import GRADES
        from cinecat.engines.training.progress import training_bar
        from cinecat.engines.training.scenes import SHARES
        from cinecat.engines.training.styles.clips import ClipShape
    except ModuleNotFoundError as error:
        raise _missing("film-set", error) from error
    if grade not in GRADES:
        typer.echo(f"film-set: grade: {grade!r} is not one of {', '.join(GRADES)}", err=True)
        raise typer.Exit(2)
    words = [word.strip() for word in kinds.split(",") if word.strip()]
    chosen = [kind for word in words for kind in SHARES if kind == word]
    if len(chosen) < len(words):
        wrong = next(word for word in words if word not in SHARES)
        typer.echo(f"film-set: kinds: {wrong!r} is not one of {', '.join(SHARES)}", err=True)
        raise typer.Exit(2)
    done = 0
    with training_bar("films", 0, clips) as move:

        def made() -> None:
            nonlocal done
            done += 1
            move(done, "")

        shape = ClipShape(width, height, frames, fps)
        try:
            play = played_by(from_model, shape) if from_model else None
            write_film_set(out_dir, clips, grade, shape, first_seed, chosen, made, play)
        except EngineError as error:
            typer.echo(f"film-set: {error}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            typer.echo(f"film-set: OUT_DIR: {error}", err=True)
            raise typer.Exit(2) from error
    typer.echo(f"{out_dir}: {clips} films written; train a style on them with:")
    typer.echo(f"  cinecat train-style {out_dir} --name my-{'style' if grade == 'none' else grade}")


def evaluate(
    a_dir: Annotated[Path, typer.Argument(metavar="A_DIR", help="Folder of the clips that are judged.")],
    b_dir: Annotated[Path, typer.Argument(metavar="B_DIR", help="Folder of the reference, with the same file names.")],
    blind: Annotated[bool, typer.Option("--blind", help="Let people choose, on a local page.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a CSV per clip; with --blind, the file of votes [votes.csv].")
    ] = None,
    lpips_weights: Annotated[Path | None, typer.Option(help="safetensors file of AlexNet and LPIPS' heads.")] = None,
    fvd_weights: Annotated[Path | None, typer.Option(help="I3D as TorchScript, as StyleGAN-V has it.")] = None,
    clip_weights: Annotated[Path | None, typer.Option(help="Folder of a CLIP checkpoint.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 0,
    question: Annotated[str, typer.Option(help="What people are asked.")] = "Which clip do you prefer?",
    voter: Annotated[str, typer.Option(help="Whose votes they are; no pair is shown to a voter twice.")] = "me",
) -> None:
    """Measures clips beside others of the same names, or lets people choose between them blind."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from cinecat.engines.quality.videos import FolderError
        from cinecat.engines.quality.votes import VotesError

        if blind:
            from cinecat.engines.quality.blind import run_blind

            def run() -> None:
                run_blind(a_dir, b_dir, out or Path("votes.csv"), question, voter, port, as_json)
        else:
            from cinecat.engines.quality.evaluate import run_evaluation
            from cinecat.engines.quality.weights import Weights

            def run() -> None:
                run_evaluation(a_dir, b_dir, Weights(lpips_weights, fvd_weights, clip_weights), out, as_json)
    except ModuleNotFoundError as error:
        raise _missing("evaluate", error, "bench") from error
    try:
        run()
    except (FolderError, VotesError, EngineError, OSError) as error:
        typer.echo(f"evaluate: {error}", err=True)
        raise typer.Exit(2) from error


def _missing(command: str, error: ModuleNotFoundError, extra: str = "train") -> typer.Exit:
    """The end of a command whose extra is not installed. Raises the error when a module of this package is missing."""
    if (error.name or "cinecat").partition(".")[0] == "cinecat":
        raise error
    typer.echo(f"{command}: {error.name} is missing; install the extra: pip install 'cinecat[{extra}]'", err=True)
    return typer.Exit(2)
