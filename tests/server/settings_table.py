"""Writes docs/configuration.md from the Settings model: `python -m tests.server.settings_table`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from cinecat.server.settings import Settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"

_INTRODUCTION = """\
<!-- Written by `python -m tests.server.settings_table`; a test keeps it current. -->
# Configuration

Every setting of `cinecat serve` can be given in three places. A flag wins over an environment variable, which wins over
a TOML file:

| where | how |
|---|---|
| flag | `cinecat serve --max-steps 50` |
| environment | `CINECAT_MAX_STEPS=50` |
| TOML file, named by `--config` or `CINECAT_CONFIG` | `max_steps = 50` |

`cinecat serve --print-config` prints the values in force as JSON and exits. A setting that does not exist is an error
that names the near miss. That holds for every variable that starts with `CINECAT_`, but for `CINECAT_CONFIG`, for
`CINECAT_SERVER` and `CINECAT_TENANT` (the server that the client commands talk to, and on whose behalf), and for those
that Kubernetes sets in every pod beside a service named `cinecat` (`CINECAT_PORT...`, `CINECAT_SERVICE_...`). Several
folders in `styles_dirs` are separated by `:`, or are a list in the TOML file.

"""

_DATABASE = """
## The job database

By default the jobs are in a SQLite file, `jobs.sqlite` in `data_dir`. `database_url` puts them into PostgreSQL
(tested with 15) instead, for back-ups and monitoring beside those of your other databases: `pip install
'cinecat[postgres]'`, create an empty database, and give the server a URL such as
`postgresql+psycopg://cinecat:PASSWORD@db.example.net/cinecat`. Best give it in `CINECAT_DATABASE_URL`, where other
users do not see it; the server masks the password in all that it prints. The server creates and updates the tables
itself, and refuses a database that a newer server has written. A database is for one server at a time: it holds a
session-level advisory lock, so connect it directly, or through a pooler in session mode. When the connection drops,
the server connects and takes the lock anew, and stores then what had to wait. Jobs do not move from one database to
another, and `data_dir` still holds the inputs of accepted jobs.

With `retain_days` and `retain_gib`, jobs that have ended go with their files, those that ended first before the
others. A job whose file is being downloaded stays until the download has ended; a download that broke off and is
resumed after the job went answers NOT_FOUND. The folder of `artifact_url` is for one server alone: it removes files
there that belong to no job of its database.
"""


def document() -> str:
    """The whole text of docs/configuration.md."""
    rows = ["| setting | default | allowed | what it is |", "|---|---|---|---|"]
    schema = Settings.model_json_schema()["properties"]
    # Defaults that follow the user's folders are shown as they are for somebody who moved none.
    with mock.patch.dict(os.environ, {"XDG_STATE_HOME": "~/.local/state", "XDG_CACHE_HOME": "~/.cache"}):
        defaults = Settings()
    for name, field in Settings.model_fields.items():
        cells = (f"`{name}`", _shown(getattr(defaults, name)), _allowed(schema[name]), field.description or "")
        rows.append("| " + " | ".join(cells) + " |")
    return _INTRODUCTION + "\n".join(rows) + "\n" + _DATABASE


def _shown(value: object) -> str:
    if value in (None, "", (), {}):
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    low, high = (None if bound is None else int(bound) for bound in (schema.get("minimum"), schema.get("maximum")))
    if low is None:
        return ""
    return f"at least {low}" if high is None else f"{low} to {high}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
