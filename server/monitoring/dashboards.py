"""The dashboards, and the files of them: `python -m cinecat.server.monitoring.dashboards` writes these again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cinecat.server.monitoring.engine_and_memory import ENGINE_AND_MEMORY
from cinecat.server.monitoring.overview import OVERVIEW
from cinecat.server.monitoring.paths_and_styles import PATHS_AND_STYLES

DASHBOARDS = (OVERVIEW, PATHS_AND_STYLES, ENGINE_AND_MEMORY)
FOLDER = Path(__file__).parent / "grafana" / "dashboards"


def files() -> Mapping[Path, str]:
    """What each file in FOLDER holds."""
    return {FOLDER / f"{each.uid}.json": json.dumps(each.to_json(), indent=1) + "\n" for each in DASHBOARDS}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
