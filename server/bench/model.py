"""`cinecat bench model`: what the bundled model can do, on films that it never saw.

The generated clips come from the engine core as a request for them would, with the model's own defaults.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cinecat.engines.messages import CoreConfig
from cinecat.server.bench.harness import Check, Report, mean_check, share_check
from cinecat.server.images import decode_image, fit_image
from cinecat.server.models import describe_model
from cinecat.server.settings import Settings

if TYPE_CHECKING:
    from cinecat.engines.training.evaluation import ModelReport, PhotographResult

_MODEL = "wan-tiny"
_FRAMES, _SIDE, _LARGE_SIDE = 17, 128, 256
_PHOTOGRAPHS = ("astronaut", "coffee", "rocket")


def bench_model(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV."""
    from cinecat.engines.checkpoint import find_checkpoint
    from cinecat.engines.core import EngineCore
    from cinecat.engines.model import load_model
    from cinecat.engines.training.evaluation import (
        Amounts,
        Sampling,
        kinds_table,
        measure_model,
        measure_photographs,
    )
    from cinecat.engines.training.progress import training_bar

    checkpoint = find_checkpoint(_MODEL)
    core = EngineCore(checkpoint, CoreConfig(_MODEL, "cpu", "float32", 0, style_slots=1, max_rank=1, cache_bytes=2**26))
    vae = load_model(checkpoint, "cpu", "float32").vae
    defaults = describe_model(core.model_info, Settings()).defaults
    sampling = Sampling(defaults.steps, defaults.guidance_scale)
    amounts = Amounts(6, 2, 1, 1) if quick else Amounts()
    large = Amounts(1, 1, 0, 0) if quick else Amounts(8, 2, 2, 0)
    photographs = _photographs(_SIDE)
    done = itertools.count(1)
    with training_bar("clips", 0, amounts.clips + large.clips + len(photographs)) as move:

        def made() -> None:
            move(next(done), "")

        report = measure_model(core, vae, amounts, sampling, _FRAMES, _SIDE, made)
        larger = measure_model(core, vae, large, sampling, _FRAMES, _LARGE_SIDE, made)
        photos = measure_photographs(core, photographs, _FRAMES, sampling, made)
    bench = Report(
        bench="model",
        config={
            "model": _MODEL,
            "frames": _FRAMES,
            "side": _SIDE,
            "steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "shots": amounts.shots,
            "large_side": _LARGE_SIDE,
            "large_shots": large.shots,
        },
        samples=_samples(report) | {f"{name}_at_256": values for name, values in _samples(larger).items() if values},
        results=[
            *({"side": _SIDE, **row} for row in kinds_table(report)),
            *({"side": _LARGE_SIDE, **row} for row in kinds_table(larger)),
            *(_photograph_row(name, photo) for name, photo in photos.items()),
        ],
        checks=checks_of(report)
        | {f"{name}_at_256": check for name, check in _without_goals(checks_of(larger)).items()},
    )
    if out is not None:
        bench.write_csv(out)
    return bench


def _samples(report: ModelReport) -> dict[str, list[float]]:
    return {
        "vae_psnr_db": list(report.vae_psnrs),
        "first_frame_psnr_db": [shot.first_psnr for shot in report.shots],
        "last_frame_psnr_drop_db": [shot.first_psnr - shot.last_psnr for shot in report.told],
        "open_few_to_many_steps_psnr_db": list(report.open_psnrs),
    }


def checks_of(report: ModelReport) -> dict[str, Check]:
    goals = {
        "vae_psnr_db": ">= 33",
        "first_frame_psnr_db": ">= 30",
        "last_frame_psnr_drop_db": "<= 6",
        "open_few_to_many_steps_psnr_db": "< 35",
    }
    checks = {name: mean_check(values, goals[name]) for name, values in _samples(report).items() if values}
    shares = {
        "motion_accuracy": report.moving,
        "still_accuracy": report.still,
        "four_directions_accuracy": [right for rights in report.four for right in rights],
    }
    return checks | {name: share_check(outcomes, ">= 0.95") for name, outcomes in shares.items() if outcomes}


def _without_goals(checks: Mapping[str, Check]) -> dict[str, Check]:
    """The second size is reported, not judged."""
    return {name: Check(check.value, "", True, check.spread) for name, check in checks.items()}


def _photographs(side: int) -> dict[str, NDArray[np.uint8]]:
    """The example image, and some of scikit-image's where it is installed: uint8 [side, side, 3]."""
    example = resources.files("cinecat.server").joinpath("examples", "chelsea.png").read_bytes()
    found = {"chelsea": example}
    if importlib.util.find_spec("skimage") is not None:
        folder = resources.files("skimage.data")
        for name in _PHOTOGRAPHS:
            file = next((f for f in folder.iterdir() if f.name.split(".")[0] == name), None)
            if file is not None:
                found[name] = file.read_bytes()
    return {
        name: fit_image(decode_image(data, max_bytes=len(data), max_pixels=4_000_000), side, side).pixels
        for name, data in found.items()
    }


def _photograph_row(name: str, photo: PhotographResult) -> dict[str, Any]:
    return {"side": _SIDE, "photograph": name, **vars(photo)}
