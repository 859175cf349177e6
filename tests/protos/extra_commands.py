"""Commands as another package would offer them."""

import typer

from cinecat.errors import NotFound


def function(count: int = 1) -> None:
    """A plain function."""
    print(f"function {count}")


app = typer.Typer()


@app.command()
def first(name: str) -> None:
    print(f"first {name}")


@app.command()
def second() -> None:
    raise NotFound("nothing here")
