"""Writes docs/configuration.md from the Settings model: `python -m tests.server.settings_table`."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

from cinecat.server.settings import NOT_INHERITED, PER_MODEL, Settings

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

_MODELS = f"""
## Several replicas, several models

With `replicas` a model has several engine cores that share its queue: whoever is free takes the next job, and the jobs
of a core that dies go on in the others. Each has the weights of its own, so on GPUs each takes a card:

- `device = "auto"` or `"cuda"`: every replica of the server takes the first GPU that no other one is on, or with
  `shard` the first so many in a row: two replicas are on `cuda:0` and `cuda:1`, two of two ranks each on 0, 1 and 2, 3.
  One more than there are GPUs for is refused.
- `device = "cuda:2,cuda:5"`: replicas take these in turn, with `shard` as their first GPUs. A GPU that is named twice,
  or by two models, is shared.
- `device = "cpu"`: all of them share it; give each its `threads`.

Further models are tables of the TOML file. What a table does not say is as for the first model, but for
{", ".join(f"`{name}`" for name in sorted(NOT_INHERITED))}:

```toml
model = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
replicas = 2

[models.wan-720p]
model = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
max_batch = 2
```

The same as JSON is `--models '{{"wan-720p": {{"model": "Wan-AI/..."}}}}'`, or `CINECAT_MODELS`. A table may have
@PER_MODEL@.

A request names its model as `cinecat models` lists it: further models are called what their tables are called. One that
names none is for the model whose `default_size` (or own size: 1280x720 where the checkpoint's name has `720P`, 832x480
for other checkpoints of Wan) is the smallest with at least as many pixels as the clip, or else the largest one; a
request without a size is for the first model. `max_queue` counts the waiting jobs of all models; shares of tenants and
ETAs are of each model.

## Reading the settings again

SIGHUP lets the server read its file and environment again, while flags stay what they were, and changes what it can
with jobs running:

- `replicas`: those that are wanted besides are loaded and take work at once; those that leave end their jobs within
  `drain_seconds`, or save them, and others go on with them.
- A table of `models` that is new: the model is loaded, then offered.
- A table of `models` that is gone: no request is for that model any more; the jobs that it has accepted are done first,
  then its cores leave.
- What a core is started with, such as `model`, `max_rank` or `engine`: replicas are replaced one after the other. The
  new one is loaded first, on the old one's device unless `device` changes too, then the old one drains; a device
  without room for both keeps the old one. Jobs that wait meanwhile are made by whichever is free.
- `max_batch`, `max_steps`, `max_tokens` and `default_size`: hold for requests from then on.
- Anything else stays as it is until a restart, and the log names it.

A file that cannot be used changes nothing, and a model that cannot be loaded leaves the old one in place; the log says
why. A checkpoint that is replaced under the same path is not noticed: give each its own path.
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
    per_model = ", ".join(f"`{name}`" for name in Settings.model_fields if name in PER_MODEL)
    models = _MODELS.replace("@PER_MODEL@", "\n".join(textwrap.wrap(per_model, 118)))
    return _INTRODUCTION + "\n".join(rows) + "\n" + models + _DATABASE


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
