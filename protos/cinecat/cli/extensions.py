"""Commands of other packages and extras: entry points of the group `cinecat.commands`.

Each loads to a function with typer's annotations, or to a typer.Typer: a group of commands. They are listed without
being imported, because those of the server import torch.
"""

from importlib.metadata import EntryPoint, entry_points

import typer
import typer.main

GROUP = "cinecat.commands"
_SUMMARIES = {
    "serve": "Serve a model over gRPC.",
    "train-tiny": "Train the bundled model on the procedural film set.",
    "train-style": "Train a style on a few captioned clips.",
    "train-cat": "Distil an adapter for steps with merged tokens.",
    "film-set": "Write captioned clips of the procedural film set, in a look of choice.",
    "top": "Watch a serving Cinecat: queue, steps, tokens, slots, memory.",
    "doctor": "Tell what this machine has, and whether serve would work.",
    "engines": "Build, list, verify and prune the compiled engines on this machine.",
    "plan": "Draw which patches of an image's clip share a token.",
    "plan-capacity": "Tell what a clip would take on several cards: time, memory, traffic, and how many pay.",
    "evaluate": "Measure clips beside others of the same names, or let people choose blind.",
    "bench": "Measure Cinecat against its rivals, side by side in one run.",
}


class MissingExtra(Exception):
    """The command cannot be loaded with what is installed; the message says what to install."""


def installed() -> dict[str, EntryPoint]:
    """The commands by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def summary(entry: EntryPoint) -> str:
    """One line for the list of commands."""
    return _SUMMARIES.get(entry.name) or f"From {entry.dist.name if entry.dist else entry.module}."


def run(entry: EntryPoint, arguments: list[str]) -> object:
    """Loads and runs the command. Raises MissingExtra, and what the command raises."""
    try:
        target = entry.load()
        if not isinstance(target, typer.Typer):
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command()(target)
            target = app
        command = typer.main.get_command(target)
        return command.main(args=arguments, prog_name=f"cinecat {entry.name}", standalone_mode=False)
    except ModuleNotFoundError as error:
        # A module of this package that is missing is a broken installation, not a missing extra.
        if (error.name or "cinecat").partition(".")[0] == "cinecat":
            raise
        extra = entry.extras[0] if entry.extras else "serve"
        raise MissingExtra(
            f"cinecat {entry.name} needs an extra: pip install 'cinecat[{extra}]' (no module named {error.name!r})"
        ) from error
