"""The command line, `cinecat`. It needs the extra `cli`; without it, `main` says so."""

import sys

_EXTRA = ("typer", "rich", "click")


def main() -> None:
    """Runs the command in sys.argv and exits: 0 done, 1 the job or the server failed, 2 wrong usage or request,
    3 no server, 4 the job was cancelled, 130 interrupted.
    """
    try:
        from cinecat.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print("cinecat's command line needs an extra: pip install 'cinecat[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(run(sys.argv[1:]))
