"""Puts the commands together, runs one, and turns every error into a message and an exit code."""

from collections.abc import Sequence
from importlib.metadata import EntryPoint, version
from typing import Annotated

import typer
import typer.main

from cinecat.cli import extensions, jobs, styles
from cinecat.cli import output as out
from cinecat.cli.generate import generate
from cinecat.cli.models import models
from cinecat.errors import CinecatError


def run(arguments: Sequence[str]) -> int:
    """Runs the command in `arguments` and returns its exit code; `cinecat.cli.main` lists them."""
    as_json = "--json" in arguments
    commands = extensions.installed()
    try:
        if arguments and arguments[0] in commands:
            result = extensions.run(commands[arguments[0]], list(arguments[1:]))
        else:
            command = typer.main.get_command(_app(commands))
            result = command.main(args=list(arguments), prog_name="cinecat", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _report(out.Interrupted("interrupted"), as_json=as_json)
    except CinecatError as error:
        return _report(error, as_json=as_json)
    except extensions.MissingExtra as error:
        return _report(out.usage_error(str(error)), as_json=as_json, prefix="")
    except OSError as error:
        return _report(CinecatError(str(error)), as_json=as_json)
    except UnicodeEncodeError as error:
        return _report(out.usage_error(f"{error.object!r} is not UTF-8 text"), as_json=as_json)
    except Exception as error:
        # typer's usage errors come from click or from its own copy of it, depending on its version.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "cinecat"
        message = str(describe()).rstrip(".")
        message += "" if message.endswith("?") else "."
        return _report(out.usage_error(f"{message} See: {where} --help"), as_json=as_json)
    return result if isinstance(result, int) else 0


def _report(error: CinecatError, *, as_json: bool, prefix: str = "cinecat: ") -> int:
    if as_json:
        out.show_json(out.error_json(error))
    elif len(error.violations) > 1:
        out.say(f"{prefix}the request was refused")
        for violation in error.violations:
            out.say(f"  {violation}")
    else:
        out.say(f"{prefix}{error.message}")
    return out.exit_code(error)


def _app(commands: dict[str, EntryPoint]) -> typer.Typer:
    # Without markup, brackets in help texts stay what they are.
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback(invoke_without_command=True)(_root)
    app.command()(generate)
    app.add_typer(styles.app, name="styles")
    app.add_typer(jobs.app, name="jobs")
    app.command()(models)
    for entry in commands.values():
        # `run` takes these over before typer parses anything; here they are for the help and for near misses.
        app.command(entry.name, help=extensions.summary(entry))(_listed_only)
    return app


def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Image-to-video generation with styles, from a Cinecat server."""
    if show_version:
        out.show(f"cinecat {version('cinecat')}")
    elif context.invoked_subcommand is None:
        out.show(context.get_help())


def _listed_only() -> None: ...
