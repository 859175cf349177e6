"""`cinecat styles`: what clips can wear."""

import dataclasses
from typing import Annotated

import typer

from cinecat.cli import output as out
from cinecat.cli.options import DEFAULT_ADDRESS, Json, Server, connect

app = typer.Typer(help="List styles; show one.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def styles(context: typer.Context, server: Server = DEFAULT_ADDRESS, as_json: Json = False) -> None:
    """List the styles of the server; `styles show NAME` shows one."""
    if context.invoked_subcommand:
        return
    with connect(server) as client:
        found = client.styles()
    if as_json:
        out.show_json(dataclasses.asdict(found))
        return
    header = ("STYLE", "VERSION", "STRENGTH", "TITLE", "")
    rows = [
        (style.name, style.version, f"{style.default_strength:g}", style.title, style.incompatibility)
        for style in found
    ]
    out.show_table(header, rows)
    for problem in found.problems:
        out.say(f"{problem.folder}: {problem.reason}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A style, as NAME or NAME@VERSION.")],
    server: Server = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Show all that is known of a style."""
    with connect(server) as client:
        style = client.style(*name.split("@", 1))
    fields = dataclasses.asdict(style)
    if as_json:
        out.show_json(fields)
        return
    out.show_fields(fields)
