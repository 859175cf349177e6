"""`cinecat bench engines`: steps and whole clips on every engine of this machine, beside plain diffusers.

A step is one forward of one row, from latents to velocities: patch embedding, blocks and head, and in a step on merged
tokens their plan. Both sides read the same inputs: a prompt of ten words, padded to 512 positions, and the image's
tokens; in float32 and with the same threads. A clip is the first request for its image and prompt, so that no cache
helps, against `WanImageToVideoPipeline` in one process.

Part of our gain is that keys and values of prompt and image are computed once per request, and that the padding of the
prompt is one key with a weight. At 14B this means little. So each check is there once more `..._without_context_gain`:
our engines made to project every position of the padded context again in every step, as diffusers does.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinecat.server.bench.engine_clips import STAGES, measure_clips
from cinecat.server.bench.harness import Check, Report, interleave, mean_check, ratio_check
from cinecat.server.bench.serve import load_reference

if TYPE_CHECKING:
    from cinecat.engines.backends.study import BackendFacts
    from cinecat.engines.messages import CoreConfig

UNIFORM, FULL_CONTEXT, CAT = "uniform", "uniform_full_context", "cat_050"
"""Steps of ours, as the engines name them."""

WITHOUT_GAIN = "_without_context_gain"

_DIFFUSERS = "diffusers"
_PAIRS, _QUICK_PAIRS, _QUICK_CLIPS = 15, 5, 3
_BEST_GOAL, _WORST_GOAL, _CLIP_GOAL, _FRAMES_GOAL = 0.7, 1.0, 0.75, "<= 0.002"


@dataclass(frozen=True)
class Size:
    """A clip's size in pixels and frames, and how many forwards one sample of a step is the mean of."""

    width: int
    height: int
    frames: int
    forwards: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class EnginesWork:
    """The fixed work.

    Attributes:
        model: as `cinecat serve --model`.
        backends: that take part where they can run.
        sizes: of the steps.
        main: the one of them that `best_step_ratio_vs_diffusers` and the clip have.
        steps, guidance_scale: of the clip; the scale is wan-tiny's default.
        style_slots, max_rank: as a server has them by default, so that it finds the same engines in the cache.
    """

    model: str = "wan-tiny"
    backends: tuple[str, ...] = ("torch", "inductor", "onnxruntime", "tensorrt", "torch_tensorrt")
    sizes: tuple[Size, ...] = (Size(64, 64, 5, 8), Size(128, 128, 17, 2), Size(256, 256, 17, 1))
    main: Size = Size(128, 128, 17, 2)
    steps: int = 8
    guidance_scale: float = 1.0
    style_slots: int = 8
    max_rank: int = 32


Samples = Mapping[str, Sequence[float]]


def bench_engines(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV, and a plot."""
    work = EnginesWork()
    pairs, clips = (_QUICK_PAIRS, _QUICK_CLIPS) if quick else (_PAIRS, _PAIRS)
    report = measure(work, pairs, clips, warm_up=1 if quick else 2)
    if out is not None:
        report.write_csv(out)
        draw(report.results, out / "engines.png")
    return report


def measure(work: EnginesWork, pairs: int, clips: int, warm_up: int) -> Report:
    """Measures all sides.

    Args:
        pairs: of steps.
        clips: pairs of clips.

    Raises:
        ModelError: the model cannot be loaded here.
    """
    import torch

    from cinecat.engines.backends.study import StepSides
    from cinecat.engines.model import find_device

    config = _config(work)
    pipeline = load_reference(work.model).to(find_device(config.device))
    sides = StepSides(config, pipeline.transformer, work.backends, _announce)
    steps: dict[str, Samples] = {}
    differences: dict[str, dict[str, float]] = {}
    for size in work.sizes:
        functions = sides.steps(size.width, size.height, size.frames)
        differences[size.name] = dict(sides.differences(functions))
        timed: dict[str, Callable[[int], float]] = {
            name: lambda _, step=step, forwards=size.forwards: sides.seconds(step, forwards)  # type: ignore[misc]
            for name, step in functions.items()
        }
        steps[size.name] = interleave(timed, pairs, warm_up)
    best = best_backend(steps, work.main.name, UNIFORM)
    clip, frames_difference = measure_clips(work, config, pipeline, best, clips, warm_up)
    return report_of(
        work,
        steps,
        clip,
        sides.facts,
        differences,
        frames_difference,
        {
            "pairs": pairs,
            "clips": clips,
            "threads": torch.get_num_threads(),
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "device": sides.device.type,
            "tokens": {size.name: sides.grid(size.width, size.height, size.frames).count for size in work.sizes},
            "context_positions": sides.context_positions,
        },
    )


def report_of(
    work: EnginesWork,
    steps: Mapping[str, Samples],
    clip: Samples,
    facts: Sequence[BackendFacts],
    differences: Mapping[str, Mapping[str, float]],
    frames_difference: float,
    config: Mapping[str, Any],
) -> Report:
    """What was measured, judged.

    Args:
        steps: seconds by size, then by name: diffusers', and every backend's with what follows its underscore.
        clip: seconds of whole clips by side, and of our stages.
        differences: of the velocities, relative to diffusers', by size and step.
        frames_difference: the largest between both sides' frames, which are in [0, 1].
    """
    rows = step_rows(steps, differences)
    checks: dict[str, Check] = {}
    judged: list[dict[str, Any]] = []
    for kind, suffix, counts in ((UNIFORM, "", True), (FULL_CONTEXT, WITHOUT_GAIN, False)):
        best = best_backend(steps, work.main.name, kind)
        checks[f"best_step_ratio_vs_diffusers{suffix}"] = _step_check(
            steps[work.main.name], best, kind, _BEST_GOAL if counts else None
        )
        judged.append({"check": f"best_step_ratio_vs_diffusers{suffix}", "backend": best, "size": work.main.name})
        evenest, worst = evenest_backend(steps, kind)
        checks[f"worst_step_ratio_vs_diffusers{suffix}"] = _step_check(
            steps[worst], evenest, kind, _WORST_GOAL if counts else None
        )
        judged.append({"check": f"worst_step_ratio_vs_diffusers{suffix}", "backend": evenest, "size": worst})
    checks["clip_ratio_vs_diffusers"] = ratio_check(clip["ours_s"], clip["diffusers_s"], _CLIP_GOAL)
    checks[f"clip_ratio_vs_diffusers{WITHOUT_GAIN}"] = ratio_check(clip["full_context_s"], clip["diffusers_s"])
    checks["clip_max_abs_difference"] = mean_check([frames_difference], _FRAMES_GOAL)
    engine = best_backend(steps, work.main.name, UNIFORM)
    judged.append({"check": "clip_ratio_vs_diffusers", "backend": engine, "size": work.main.name})
    stages = [{"clip_stage": stage, "median_ms": 1e3 * statistics.median(clip[f"ours_{stage}_s"])} for stage in STAGES]
    samples: dict[str, Sequence[float]] = {
        f"{size}_{name}_s": values for size, sides in steps.items() for name, values in sides.items()
    }
    samples |= {f"clip_{name}": values for name, values in clip.items()}
    return Report(
        bench="engines",
        config={**asdict(work), **config},
        samples=samples,
        results=[*rows, *judged, *stages, *({"backend": each.name, **_facts(each)} for each in facts)],
        checks=checks,
    )


def step_rows(steps: Mapping[str, Samples], differences: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row a size, backend and step: its ratio to diffusers' step, and the relative difference of the velocities."""
    return [
        {
            "size": size,
            "backend": backend,
            "step": kind,
            "median_ms": 1e3 * statistics.median(sides[f"{backend}_{kind}"]),
            "ratio_vs_diffusers": _step_check(sides, backend, kind).value,
            "velocity_difference": differences[size].get(f"{backend}_{kind}"),
        }
        for size, sides in steps.items()
        for backend in backends_of(sides)
        for kind in (UNIFORM, FULL_CONTEXT, CAT)
    ]


def backends_of(sides: Samples) -> list[str]:
    """The backends that were measured."""
    return [name.removesuffix(f"_{CAT}") for name in sides if name.endswith(f"_{CAT}")]


def best_backend(steps: Mapping[str, Samples], size: str, kind: str) -> str:
    """The backend with the lowest ratio at a size."""
    return min(backends_of(steps[size]), key=lambda backend: _step_check(steps[size], backend, kind).value)


def evenest_backend(steps: Mapping[str, Samples], kind: str) -> tuple[str, str]:
    """The backend whose ratio at its worst size is the lowest, and that size."""

    def at(backend: str, size: str) -> float:
        return _step_check(steps[size], backend, kind).value

    backends = backends_of(next(iter(steps.values())))
    worst = {backend: max(steps, key=lambda size: at(backend, size)) for backend in backends}
    backend = min(backends, key=lambda backend: at(backend, worst[backend]))
    return backend, worst[backend]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Every step's ratio to diffusers', a panel a size, as PNG.

    Args:
        rows: of `step_rows`; others are passed over.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if "ratio_vs_diffusers" in row]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure = Figure(figsize=(4.2 * len(sizes), 3.6), layout="constrained")
    labels = {UNIFORM: "uniform", FULL_CONTEXT: "uniform, no gain from context", CAT: "CAT, half the tokens"}
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], sizes, strict=True):
        for number, (kind, label) in enumerate(labels.items()):
            values = [row["ratio_vs_diffusers"] for row in rows if row["size"] == size and row["step"] == kind]
            axes.bar([place + 0.27 * (number - 1) for place in range(len(backends))], values, 0.25, label=label)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(backends)), backends)
        axes.set_title(size)
    first = figure.axes[0]
    first.set_ylabel("time of a step over diffusers'")
    first.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _step_check(sides: Samples, backend: str, kind: str, at_most: float | None = None) -> Check:
    return ratio_check(sides[f"{backend}_{kind}"], sides[_DIFFUSERS], at_most)


def _facts(facts: BackendFacts) -> dict[str, Any]:
    if facts.left_out:
        return {"left_out": facts.left_out}
    size = None if facts.size_bytes is None else facts.size_bytes / 2**20
    return {"build_seconds": facts.build_seconds, "engine_mib": size}


def _config(work: EnginesWork) -> CoreConfig:
    from cinecat.engines.messages import CoreConfig

    return CoreConfig(
        model=work.model,
        device="auto",
        dtype="float32",
        threads=0,
        style_slots=work.style_slots,
        max_rank=work.max_rank,
        cache_bytes=2**30,
        engine_sizes=tuple((size.width, size.height, size.frames) for size in work.sizes),
    )


def _announce(what: str) -> None:
    print(what, file=sys.stderr)
