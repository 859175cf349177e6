"""`cinecat bench sharding`: every way to share a forward among ranks, beside one process.

Ranks are processes that talk through gloo on a CPU, and cards that talk through NCCL on GPUs. Every layout runs both
token paths, plain, styled and with mixed styles, with token counts that no number of ranks divides. Checked are the
largest difference of a velocity from that of one process, and the bytes that every rank counts as sent over those that
the formula of the cost model says; the worst counts. Seconds are told beside them and judge nothing: processes of one
CPU share what they have.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinecat.server.bench.harness import Check, Report

if TYPE_CHECKING:
    from cinecat.engines.messages import CoreConfig
    from cinecat.engines.sharding.study import LayoutResult

_DIFFERENCE_GOAL = 1e-3


@dataclass(frozen=True)
class ShardingWork:
    """The fixed work.

    Attributes:
        layouts: as the setting `shard` spells them.
        sizes: of clips in pixels and frames that are compared.
        timed: the size of the timings, of two rows without styles.
        pairs: of timings.
    """

    model: str = "wan-tiny"
    layouts: tuple[str, ...] = (
        *("ulysses=2", "ring=2", "cfg=2", "ring=3"),
        *("ulysses=4", "ring=4", "ulysses=2,ring=2", "ulysses=2,cfg=2", "ring=2,cfg=2"),
    )
    sizes: tuple[tuple[int, int, int], ...] = ((112, 80, 9), (128, 128, 17))
    timed: tuple[int, int, int] = (128, 128, 17)
    pairs: int = 15


def bench_sharding(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV."""
    # transformers warns that there is no torchvision, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from cinecat.engines.backends.loading import size_grids
    from cinecat.engines.backends.parity import Case, standard_cases
    from cinecat.engines.checkpoint import find_checkpoint
    from cinecat.engines.messages import CoreConfig
    from cinecat.engines.sharding.layout import parse_layout
    from cinecat.engines.sharding.study import study_layout
    from cinecat.engines.training.progress import training_bar

    work = ShardingWork()
    if quick:
        work = ShardingWork(layouts=("ulysses=2", "ring=2,cfg=2"), sizes=((112, 80, 9),), pairs=3)
    config = CoreConfig(
        model=work.model, device="auto", dtype="float32", threads=0, style_slots=2, max_rank=8, cache_bytes=0
    )
    checkpoint = find_checkpoint(work.model)
    cases = standard_cases(size_grids(checkpoint, work.sizes, 2))
    (grid,) = size_grids(checkpoint, (work.timed,), 2)
    found = []
    with training_bar("layouts", 0, len(work.layouts)) as move:
        for word in work.layouts:
            layout = parse_layout(word)
            assert layout is not None, "none of them is auto"
            found.append(study_layout(config, layout, cases, Case(grid, 1.0, (9, 9), (0, 0)), work.pairs))
            move(len(found), word)
    report = report_of(found, {**asdict(work), "dtype": "float32", **_transport(config)})
    if out is not None:
        report.write_csv(out)
    return report


def report_of(found: Sequence[LayoutResult], config: Mapping[str, Any]) -> Report:
    """What was measured, judged by the worst of all layouts, cases and ranks."""
    cases = [case for result in found for case in result.cases]
    differences = [case.difference for case in cases]
    worst_difference = math.nan if any(map(math.isnan, differences)) else max(differences)
    ratios = [ratio for case in cases for sent in case.exchanged for ratio in sent.ratios]
    # A ratio and its inverse are equally wrong, so both are bounded by 1.
    worst = max(max(ratio, 1.0 / ratio if ratio else math.inf) for ratio in ratios)
    samples: dict[str, Sequence[float]] = {}
    for result in found:
        samples[f"{result.layout}_s"] = result.together
        samples[f"{result.layout}_alone_s"] = result.alone
        samples[f"{result.layout}_exchanging_s"] = result.exchanging
    return Report(
        bench="sharding",
        config=config,
        samples=samples,
        results=[_row(result) for result in found],
        checks={
            "max_abs_difference": Check(
                worst_difference,
                f"<= {_DIFFERENCE_GOAL:g}",
                worst_difference <= _DIFFERENCE_GOAL,
                (min(differences), max(differences)),
            ),
            "bytes_measured_over_formula": Check(worst, "<= 1", worst <= 1.0, (min(ratios), max(ratios))),
        },
    )


def _row(result: LayoutResult) -> dict[str, Any]:
    exchanged = [sent for case in result.cases for sent in case.exchanged]
    return {
        "shard": str(result.layout),
        "ranks": result.layout.ranks,
        "cases": len(result.cases),
        "max_abs_difference": f"{max(case.difference for case in result.cases):.1e}",
        "counts_compared": sum(len(sent.ratios) for sent in exchanged),
        "forward_over_one_process": result.ratio,
        "exchanging_share": statistics.median(
            part / whole for part, whole in zip(result.exchanging, result.together, strict=True)
        ),
    }


def _transport(config: CoreConfig) -> dict[str, str]:
    from cinecat.engines.model import find_device

    device = find_device(config.device)
    return {"device": device.type, "transport": "nccl" if device.type == "cuda" else "gloo"}
