"""`cinecat evaluate A_DIR B_DIR`, from the folders to what is printed and written."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from cinecat.engines.quality.comparison import compare_pairs
from cinecat.engines.quality.report import as_json, show_table, write_csv
from cinecat.engines.quality.videos import pair_files
from cinecat.engines.quality.weights import Weights
from cinecat.engines.training.progress import training_bar


def run_evaluation(a: Path, b: Path, weights: Weights, out: Path | None, json_only: bool) -> None:
    """Compares two folders, prints the result, and writes a CSV per clip where `out` is given.

    Raises:
        FolderError, WeightsError, OSError: as `pair_files`, `compare_pairs` and `write_csv` do.
    """
    pairs, strays = pair_files(a, b)
    with training_bar("pairs", 0, len(pairs)) as move:
        compared = compare_pairs(pairs, weights, lambda done: move(done, ""))
    comparison = replace(compared, left_out=[*strays, *compared.left_out])
    for sentence in comparison.left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    if out is not None:
        print(f"{write_csv(comparison, out)} written", file=sys.stderr)
    if json_only:
        print(json.dumps(as_json(comparison)))
    else:
        show_table(comparison)
