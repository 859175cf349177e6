"""`cinecat styles`: what clips can wear."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cinecat.catalog import StyleInfo
from cinecat.cli import output as out
from cinecat.cli.options import DEFAULT_ADDRESS, Json, Server, Tenant, connect
from cinecat.errors import NotFound
from cinecat.upload import OnProgress

app = typer.Typer(help="List styles; show, install, remove or warm one.", rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A style, as NAME or NAME@VERSION.")]


@app.callback(invoke_without_command=True)
def styles(
    context: typer.Context, server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False
) -> None:
    """List the styles of the server; the commands below act on one."""
    if command := context.invoked_subcommand:
        for parameter, option in (("server", "--server"), ("tenant", "--tenant"), ("as_json", "--json")):
            source = context.get_parameter_source(parameter)
            if source is not None and source.name == "COMMANDLINE":
                raise out.usage_error(f"{option} goes behind the command: cinecat styles {command} ... {option}")
        return
    _list(server, tenant, as_json)


@app.command("list")
def list_styles(server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """List the styles of the server, and what cannot be offered."""
    _list(server, tenant, as_json)


@app.command()
def show(
    name: Name,
    preview: Annotated[
        Path | None, typer.Option("--preview", metavar="FILE", help="Save the picture or clip of what it does.")
    ] = None,
    server: Server = DEFAULT_ADDRESS,
    tenant: Tenant = "",
    as_json: Json = False,
) -> None:
    """Show all that is known of a style."""
    with connect(server, tenant) as client:
        style = client.style(*name.split("@", 1), with_preview=preview is not None)
    if preview is not None:
        if style.preview is None:
            raise NotFound(f"{style.name}@{style.version} has no preview")
        preview.write_bytes(style.preview.data)
    if as_json:
        out.show_json(_as_dict(style))
        return
    out.show_fields(_as_dict(style))


@app.command()
def install(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A folder with a style.toml, or a .safetensors file and --name.")
    ],
    name: Annotated[str, typer.Option("--name", help="What the style is called.")] = "",
    version: Annotated[str, typer.Option("--version", help="Three numbers; one above the newest when left out.")] = "",
    title: Annotated[str, typer.Option("--title", help="Its name for people.")] = "",
    description: Annotated[str, typer.Option("--description", help="What it does.")] = "",
    base_model: Annotated[
        str, typer.Option("--base-model", help="The model family it was made for; the server's when left out.")
    ] = "",
    trigger_word: Annotated[
        list[str] | None, typer.Option("--trigger-word", help="A word that brings it out; may be repeated.")
    ] = None,
    prompt_template: Annotated[
        str, typer.Option("--prompt-template", help="What becomes of a prompt, e.g. 'film noir, {prompt}'.")
    ] = "",
    strength: Annotated[
        float | None, typer.Option("--strength", help="Its strength where a request says none.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps where a request says none.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Guidance where a request says none.")] = None,
    shift: Annotated[float | None, typer.Option("--shift", help="Shift where a request says none.")] = None,
    preview: Annotated[
        Path | None, typer.Option("--preview", metavar="FILE", help="An image or a short clip of what it does.")
    ] = None,
    license: Annotated[str, typer.Option("--license", help="Its licence.")] = "",
    author: Annotated[str, typer.Option("--author", help="Who made it.")] = "",
    server: Server = DEFAULT_ADDRESS,
    tenant: Tenant = "",
    as_json: Json = False,
) -> None:
    """Upload a style. A version that exists never changes: other content is another version."""
    with connect(server, tenant) as client, _bar(path.name) as on_progress:
        installed = client.install_style(
            path,
            on_progress=on_progress,
            name=name,
            version=version,
            title=title,
            description=description,
            base_model=base_model,
            trigger_words=trigger_word or [],
            prompt_template=prompt_template,
            default_strength=strength,
            steps=steps,
            guidance=guidance,
            shift=shift,
            preview=preview,
            license=license,
            author=author,
        )
    if as_json:
        out.show_json({**dataclasses.asdict(installed), "style": _as_dict(installed.style)})
        return
    style = installed.style
    for note in installed.notes:
        out.say(note)
    for key, reason in style.ignored_keys.items():
        out.say(f"ignored: {key}: {reason}")
    if style.ignored_key_count > len(style.ignored_keys):
        out.say(f"ignored: {style.ignored_key_count - len(style.ignored_keys)} more")
    done = "was there already" if installed.unchanged else "installed"
    out.show(f"{style.name}@{style.version}: {done}, rank {style.rank}, {style.weights_size_bytes:,} bytes")


@app.command()
def remove(name: Name, server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """Take an installed style away. Accepted jobs finish with it."""
    with connect(server, tenant) as client:
        style = client.remove_style(*name.split("@", 1))
    if as_json:
        out.show_json(_as_dict(style))
        return
    finishing = f"; {style.jobs} jobs finish with it" if style.jobs else ""
    out.show(f"{style.name}@{style.version}: removed{finishing}")


@app.command()
def warm(name: Name, server: Server = DEFAULT_ADDRESS, tenant: Tenant = "", as_json: Json = False) -> None:
    """Load a style into a slot, so that the first clip that wears it need not wait."""
    with connect(server, tenant) as client:
        style = client.warm_style(*name.split("@", 1))
    if as_json:
        out.show_json(_as_dict(style))
        return
    out.show(f"{style.name}@{style.version}: in slot {_slots(style)}")


def _list(server: str, tenant: str, as_json: bool) -> None:
    with connect(server, tenant) as client:
        found = client.styles()
    if as_json:
        problems = [dataclasses.asdict(problem) for problem in found.problems]
        out.show_json({"styles": [_as_dict(style) for style in found], "problems": problems})
        return
    header = ("STYLE", "VERSION", "STRENGTH", "TITLE", "FROM", "SLOT", "USES", "")
    rows = [
        (
            style.name,
            style.version,
            f"{style.default_strength:g}",
            style.title,
            style.origin,
            _slots(style),
            style.uses or "",
            style.incompatibility,
        )
        for style in found
    ]
    out.show_table(header, rows)
    for problem in found.problems:
        out.say(f"{problem.folder}: {problem.reason}")


def _as_dict(style: StyleInfo) -> dict[str, object]:
    """A style as scripts read it, without the bytes of its preview."""
    fields = dataclasses.asdict(style) | {"resident": style.resident}
    if style.preview is not None:
        del fields["preview"]["data"]
    return fields


def _slots(style: StyleInfo) -> str:
    return ", ".join(map(str, style.slots))


@contextmanager
def _bar(label: str) -> Iterator[OnProgress | None]:
    """A bar for the bytes of an upload, where there is a terminal to show it on."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(out.plain(label), total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)
