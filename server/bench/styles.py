"""`cinecat bench styles`: what changing and mixing styles costs, beside diffusers' ways to do it.

Both sides run the same forwards of the same transformer on the same inputs and files, in float32 and with the same
threads. A style is in memory when a change begins; what a file adds is a sample of its own (the files are in the page
cache, on both sides). Before anything is measured, both sides must predict the same with the same style.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cinecat.server.bench.harness import Check, Report, interleave, ratio_check
from cinecat.server.bench.serve import load_reference
from cinecat.server.bench.style_sides import (
    AdaptersSet,
    ClipShape,
    Denoising,
    Hotswapped,
    Reloaded,
    Slotted,
    predict,
    shot_inputs,
    write_styles,
)

_PAIRS, _QUICK_PAIRS = 21, 3
_SWAP_GOAL, _RESIDENT_GOAL, _MIXED_GOAL, _IDLE_GOAL = 0.25, 0.01, 1.03, 1.03
_MOST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class StylesWork:
    """The fixed work.

    Attributes:
        model: as `cinecat serve --model`.
        slots: of our side; one style more than fit is swapped around, so that every swap copies.
        ranks: of the styles, over and over.
        forwards: that one sample of a step is the mean of.
        swaps: that one sample of a change is the mean of.
        requests, steps: of the interleaved run, which has as many styles as `ranks`.
    """

    model: str = "wan-tiny"
    width: int = 128
    height: int = 128
    frames: int = 17
    slots: int = 8
    max_rank: int = 32
    ranks: tuple[int, ...] = (8, 16, 24, 32)
    forwards: int = 3
    swaps: int = 4
    requests: int = 8
    steps: int = 4


def bench_styles(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV."""
    report = measure(StylesWork(), _QUICK_PAIRS if quick else _PAIRS, warm_up=1 if quick else 2)
    if out is not None:
        report.write_csv(out)
    return report


def measure(work: StylesWork, pairs: int, warm_up: int) -> Report:
    """Measures all sides.

    Raises:
        RuntimeError: the sides do not predict the same.
    """
    import torch

    pipeline = load_reference(work.model)
    shape = ClipShape(work.width, work.height, work.frames)
    with tempfile.TemporaryDirectory(prefix="cinecat-bench-") as scratch:
        bench = _Bench(work, pipeline, shape, Path(scratch))
        difference = bench.difference()
        swaps = interleave(bench.swaps(), pairs, warm_up)
        forwards = interleave(bench.forwards(), pairs, warm_up)
        served = interleave(bench.interleaved(), pairs, warm_up=1)
    samples = {**swaps, **forwards, **served}
    return Report(
        bench="styles",
        config={
            **asdict(work),
            "pairs": pairs,
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "tokens": bench.tokens,
        },
        samples=samples,
        results=[{"relative_difference_to_diffusers": difference}],
        checks=_checks(samples),
    )


def _checks(samples: Mapping[str, Sequence[float]]) -> dict[str, Check]:
    return {
        "load_swap_ratio_vs_diffusers": ratio_check(samples["loaded_ms"], samples["diffusers_hotswap_ms"], _SWAP_GOAL),
        "cold_swap_ratio_vs_diffusers": ratio_check(samples["cold_ms"], samples["diffusers_hotswap_cold_ms"]),
        "resident_swap_step_fraction": ratio_check(samples["resident_ms"], samples["styled_step_ms"], _RESIDENT_GOAL),
        "mixed_over_single_style_ratio": ratio_check(
            samples["four_styles_step_ms"], samples["one_style_step_ms"], _MIXED_GOAL
        ),
        "idle_slot_step_ratio": ratio_check(samples["idle_step_ms"], samples["no_slots_step_ms"], _IDLE_GOAL),
        # Throughput is the inverse of time.
        "interleaved_throughput_ratio": ratio_check(
            samples["diffusers_one_after_the_other_ms"], samples["interleaved_ms"]
        ),
        "interleaved_throughput_ratio_vs_swap_per_step": ratio_check(
            samples["diffusers_interleaved_ms"], samples["interleaved_ms"]
        ),
    }


class _Bench:
    """All sides, ready to be measured; every measurement is in milliseconds."""

    def __init__(self, work: StylesWork, pipeline: Any, shape: ClipShape, folder: Path) -> None:
        self._work = work
        self._pipeline = pipeline
        self._plain = pipeline.transformer
        # Each with slots of its own, so that what one side chooses is not resident for the other.
        self._ours, self._loaded, self._cold = (
            Slotted(pipeline.transformer, work.slots, work.max_rank) for _ in range(3)
        )
        ranks = [work.ranks[number % len(work.ranks)] for number in range(work.slots + 1)]
        paths = write_styles(folder, self._ours.slots.targets, ranks)
        self._names = [path.stem for path in paths]
        for side in (self._ours, self._loaded, self._cold):
            side.learn(paths)
        self._hotswapped = Hotswapped(pipeline, paths, work.max_rank)
        self._adapters = AdaptersSet(pipeline, paths)
        self._reloaded = Reloaded(pipeline, paths)
        self._one_row = shot_inputs(pipeline, shape, rows=1)
        self._rows = shot_inputs(pipeline, shape, rows=len(work.ranks))

    @property
    def tokens(self) -> int:
        """Of one row."""
        _, _, frames, height, width = self._one_row["hidden_states"].shape
        patch_t, patch_h, patch_w = self._plain.config.patch_size
        return int(frames // patch_t * (height // patch_h) * (width // patch_w))

    def difference(self) -> float:
        """The largest relative difference of a prediction to diffusers', over all styles and ways.

        Raises:
            RuntimeError: it is too large for a comparison of times to mean anything.
        """
        worst = 0.0
        for name in self._names:
            self._ours.choose(name)
            ours = predict(self._ours.transformer, self._one_row)
            for side in (self._hotswapped, self._adapters, self._reloaded):
                side.choose(name)
                theirs = predict(side.transformer, self._one_row)
                worst = max(worst, ((ours - theirs).norm() / theirs.norm()).item())
        if not worst <= _MOST_DIFFERENCE:
            raise RuntimeError(
                f"ours and diffusers' predictions differ by {worst:.2g}, {_MOST_DIFFERENCE:g} is allowed"
            )
        return worst

    def swaps(self) -> dict[str, Callable[[int], float]]:
        """From "style chosen" to "the first step may run"."""
        resident, ours = self._names[0], self._ours
        return {
            "resident_ms": self._timed(lambda _: ours.choose(resident), before=lambda: ours.choose(resident)),
            "loaded_ms": self._timed(self._loaded.choose),
            "cold_ms": self._timed(self._cold.choose_from_file),
            "diffusers_set_adapters_ms": self._timed(self._adapters.choose),
            "diffusers_hotswap_ms": self._timed(self._hotswapped.choose),
            "diffusers_hotswap_cold_ms": self._timed(self._hotswapped.choose_from_file),
            "diffusers_delete_and_load_ms": self._timed(self._reloaded.choose),
        }

    def forwards(self) -> dict[str, Callable[[int], float]]:
        ours, names = self._ours, self._names[: len(self._work.ranks)]

        def batch(styles: Sequence[str]) -> Callable[[int], float]:
            def measure(number: int) -> float:
                ours.dress([ours.choose(name) for name in styles])
                return self._forward_ms(ours.transformer, self._rows)

            return measure

        def styled(number: int) -> float:
            ours.choose(names[0])
            return self._forward_ms(ours.transformer, self._one_row)

        def idle(number: int) -> float:
            ours.dress([])
            return self._forward_ms(ours.transformer, self._one_row)

        return {
            "four_styles_step_ms": batch(names),
            "one_style_step_ms": batch(names[-1:] * len(names)),
            "idle_step_ms": idle,
            "no_slots_step_ms": lambda _: self._forward_ms(self._plain, self._one_row),
            "styled_step_ms": styled,
        }

    def interleaved(self) -> dict[str, Callable[[int], float]]:
        """All requests, whose styles come in turns: ours and diffusers step by step, diffusers one by one too."""
        ours, theirs = self._ours, self._hotswapped

        def in_turns(choose: Callable[[str], object], transformer: Any) -> Callable[[int], float]:
            def run() -> None:
                requests = self._requests()
                for _ in range(self._work.steps):
                    for request in requests:
                        choose(request.style)
                        request.advance(transformer)

            return lambda _: _milliseconds(run)

        def one_by_one() -> None:
            for request in self._requests():
                theirs.choose(request.style)
                for _ in range(self._work.steps):
                    request.advance(theirs.transformer)

        return {
            "interleaved_ms": in_turns(ours.choose, ours.transformer),
            "diffusers_one_after_the_other_ms": lambda _: _milliseconds(one_by_one),
            "diffusers_interleaved_ms": in_turns(theirs.choose, theirs.transformer),
        }

    def _requests(self) -> list[Denoising]:
        styles = self._names[: len(self._work.ranks)]
        return [
            Denoising(self._pipeline, self._one_row, self._work.steps, styles[number % len(styles)])
            for number in range(self._work.requests)
        ]

    def _timed(
        self, choose: Callable[[str], object], before: Callable[[], object] = lambda: None
    ) -> Callable[[int], float]:
        """The mean of some changes to the next style and the next. There is one more than slots, and the one that was
        used longest ago gives way: the next one is never resident.
        """
        count = self._work.swaps
        position = 0

        def measure(number: int) -> float:
            nonlocal position
            before()
            names = [self._names[(position + offset) % len(self._names)] for offset in range(count)]
            position += count
            return _milliseconds(lambda: [choose(name) for name in names]) / count

        return measure

    def _forward_ms(self, transformer: Any, inputs: Mapping[str, Any]) -> float:
        def forwards() -> None:
            for _ in range(self._work.forwards):
                predict(transformer, inputs)

        return _milliseconds(forwards) / self._work.forwards


def _milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)
