"""CAT beside its rivals on held-out films: what is run, how long it takes and how good it is. Plain data for the bench.

Every method gets the same model, threads, dtype, seed, image, caption and number of base steps. Rivals at equal tokens
spend CAT's budget in every step; rivals at equal time get the setting whose time is nearest to CAT's but not below it.
Time is that of denoising, planning included; what progressive resolution encodes besides is not held against it. The
time of a rival at equal tokens means nothing: it takes its budgets from CAT's plans, which are made too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cinecat.engines.denoise import Merged
from cinecat.engines.messages import StyleUse
from cinecat.engines.quality.lpips import load_lpips
from cinecat.engines.quality.pixels import MOST_DECIBELS, psnr, temporal_flicker
from cinecat.engines.quality.structure import structure
from cinecat.engines.slots import NO_STYLE
from cinecat.engines.tokens.adaptive import AdaptiveTokens, motion_of, price
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.rivals import EQUAL_TOKENS
from cinecat.engines.tokens.samplers import (
    ContentAdaptive,
    Parts,
    PolicyOf,
    Progressive,
    Start,
    StepCache,
    Uniform,
    adaptive,
    begin,
    begin_smaller,
    decode,
    resized,
    sample,
)
from cinecat.engines.tokens.schedule import rung_tokens, spread_steps
from cinecat.engines.training.film import HELD_OUT, Clip, make_clip
from cinecat.engines.training.scenes import OPEN_KINDS
from cinecat.engines.wardrobe import Outfit
from cinecat.plugins.registry import BUNDLED, StyleRegistry

Frames = NDArray[np.uint8]

PLAIN_CAT = "cat_plain"
"""CAT without the model's adapter, where it has one. All that merges otherwise wears it."""

AUTO_CAT = "cat_auto"
"""CAT with a PSNR to hold in place of a keep ratio."""

EQUAL_TIME = ("fewer_steps", "step_cache", "smaller", "progressive")
"""Rivals at equal time, by name."""

ADAPTER_RATIOS = (0.375, 0.5)
"""Keep ratios at which clips that wear a style are made with and without the adapter."""

_ONLY_WIDE = frozenset({"static_clusters", "smaller"})

_FIRST_SEED = HELD_OUT + 40_000
_LEAST_SIDE = 32


@dataclass(frozen=True)
class StudyWork:
    """What is compared.

    Attributes:
        model: as `cinecat serve --model`.
        steps: of the uniform result, and of whatever does not save steps.
        textures, motions: of the redundancy cells, each with each; see `draw_scene`.
        open_kinds: of shots whose course is open, a cell each.
        noise: whether there is a cell of noise, in which nothing is redundant; it counts in no mean.
        wide_ratio: keep ratio at which every rival runs, and the only one in noise; at the others those that no check
            names stay away.
        target_psnr_db: of the clips whose keep ratio follows from it.
        styles: bundled ones, worn in turn by every other film once more, to see what the adapter gains there.
        pairs: of single steps, for their times.
        minutes: in which all cells that are begun should end; the first always is. Cells that are left out are named.
    """

    model: str = "wan-tiny"
    side: int = 256
    frames: int = 17
    steps: int = 12
    guidance_scale: float = 1.0
    seed: int = 0
    keep_ratios: tuple[float, ...] = (0.75, 0.5, 0.375)
    textures: tuple[float, ...] = (0.0, 0.5, 1.0)
    motions: tuple[float, ...] = (0.0, 0.4, 1.0)
    wide_ratio: float = 0.5
    open_kinds: tuple[str, ...] = tuple(sorted(OPEN_KINDS))
    noise: bool = True
    target_psnr_db: float = 40.0
    styles: tuple[str, ...] = ("noir", "amber", "blueprint")
    pairs: int = 15
    minutes: float = 60.0

    @property
    def clips(self) -> int:
        """How many are made at most."""
        everyone = 2 + len(EQUAL_TOKENS) + len(EQUAL_TIME)
        methods = [everyone - (0 if ratio == self.wide_ratio else len(_ONLY_WIDE)) for ratio in self.keep_ratios]
        cells = len(self.textures) * len(self.motions) + len(self.open_kinds)
        styled = cells // 2 if self.styles else 0
        noisy = 1 + everyone if self.noise else 0
        return cells * (2 + sum(methods)) + noisy + styled * (1 + 2 * len(ADAPTER_RATIOS))


@dataclass(frozen=True)
class Cell:
    """A film, and what kind of redundancy it stands for.

    Attributes:
        texture, motion: None for an open shot and for noise.
        counts: whether it is in the means.
        style: that its clips wear; empty for none.
    """

    name: str
    film: Clip
    texture: float | None = None
    motion: float | None = None
    counts: bool = True
    style: str = ""

    @property
    def redundant(self) -> bool:
        """Much repeats in it, in space or in time, and in neither little."""
        return self.texture is not None and self.motion is not None and self.texture + self.motion <= 0.5


@dataclass(frozen=True)
class Outcome:
    """One clip by one method.

    Attributes:
        keep_ratio: of CAT, that the method is compared at; 1 for the uniform result and where it follows from a target.
        method: "uniform", AUTO_CAT, "cat", PLAIN_CAT, a key of EQUAL_TOKENS or one of EQUAL_TIME.
        setting: what was chosen for it, for people.
        tokens: mean over base steps, over those of the uniform path.
        seconds: of denoising, planning included.
        clip_seconds: with encoding and decoding.
        scores: metrics by name; "..._uniform" against the uniform result, "..._film" against the film, "object_..."
            inside the object's mask.
    """

    cell: str
    keep_ratio: float
    method: str
    setting: str
    tokens: float
    seconds: float
    clip_seconds: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """All that was measured.

    Attributes:
        step_seconds: samples of single steps, by name: "uniform", "coarse", "keep_050", "keep_025", "tokens_N" for
            merged steps of N tokens, "side_N" for a smaller clip; planning, merge and unmerge included.
        motion: by cell, what the first step predicts, as `adaptive.motion_of`.
        grid: of the films' patches.
        steps: of the uniform path.
        left_out: names of cells for which there was no time.
    """

    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]
    step_seconds: Mapping[str, Sequence[float]]
    motion: Mapping[str, float]
    grid: Grid
    steps: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to a clip.

    Attributes:
        side: of the clip that it makes; a smaller one is scaled up by Lanczos.
    """

    name: str
    setting: str
    policy: PolicyOf
    steps: int
    side: int


@dataclass(frozen=True)
class Costs:
    """Medians of single steps, relative to a uniform one."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> float:
        return statistics.median(self.seconds[name]) / statistics.median(self.seconds["uniform"])

    def of_run(self, tokens: Sequence[int], count: int) -> float:
        """Uniform steps that a run costs whose steps spend these tokens."""
        return sum(0.0 if spent == 0 else 1.0 if spent == count else self.of(f"tokens_{spent}") for spent in tokens)


def make_cells(work: StudyWork) -> list[Cell]:
    """The films in the order in which they are run, open ones between the others, after every other its styled twin.

    The most and the least redundant come first: where time runs out, the cells that the checks compare have been run.
    """
    known = [
        Cell(
            f"texture {texture:g}, motion {motion:g}",
            _film(work, index, texture=texture, motion=motion),
            texture,
            motion,
        )
        for index, (texture, motion) in enumerate((t, m) for t in work.textures for m in work.motions)
    ]
    if len(known) > 2:
        known.insert(1, known.pop())
    opened = [Cell(kind, _film(work, 100 + index, kind=kind)) for index, kind in enumerate(work.open_kinds)]
    every = len(known) // max(1, len(opened)) or 1
    cells: list[Cell] = []
    for index, cell in enumerate(known):
        cells.append(cell)
        if opened and (index + 1) % every == 0:
            cells.append(opened.pop(0))
    cells += opened
    if work.styles:
        for index, cell in enumerate(cells[1::2]):
            style = work.styles[index % len(work.styles)]
            twin = replace(cell, name=f"{cell.name}, {style}", counts=False, style=style)
            cells.insert(3 * index + 2, twin)
    if work.noise:
        cells.append(Cell("noise", _noise(work), counts=False))
    return cells


def _film(work: StudyWork, index: int, **drawn: object) -> Clip:
    return make_clip(_FIRST_SEED + index, work.frames, work.side, work.side, **drawn)  # type: ignore[arg-type]


def _noise(work: StudyWork) -> Clip:
    """A still picture of independent pixels."""
    film = _film(work, 200, motion=0.0)
    frame = np.random.default_rng(work.seed).integers(0, 256, (work.side, work.side, 3), dtype=np.uint8)
    scene = replace(film.scene, caption="nothing moves")
    nowhere = np.zeros_like(film.mask)
    return replace(film, scene=scene, frames=np.repeat(frame[None], work.frames, axis=0), mask=nowhere)


def study(
    work: StudyWork, lpips_weights: Path | None = None, moved: Callable[[int], object] = lambda done: None
) -> Study:
    """Runs everything.

    Args:
        moved: told after every clip how many are made.

    Raises:
        WeightsError: the LPIPS weights cannot be used.
    """
    meter = _Meter(load_lpips(lpips_weights) if lpips_weights is not None else None)
    deadline = time.monotonic() + 60.0 * work.minutes
    parts = Parts.load(work.model)
    cells = make_cells(work)
    first = _begin(parts, work, cells[0])
    runs = {
        ratio: sample(parts, first, work.steps, adaptive(ratio)(first.grid, work.steps)) for ratio in work.keep_ratios
    }
    counts = sorted({spent for run in runs.values() for spent in run.tokens} - {0, first.grid.count})
    steps = time_steps(parts, work, first, cells[0].film, counts)
    costs = Costs(steps)
    methods = {
        ratio: list(methods_at(work, ratio, costs.of_run(run.tokens, first.grid.count) / work.steps, costs))
        for ratio, run in runs.items()
    }
    styles = StyleRegistry([BUNDLED])
    outcomes: list[Outcome] = []
    motion: dict[str, float] = {}
    slowest = 0.0
    for index, cell in enumerate(cells):
        began = time.monotonic()
        if index > 0 and began + slowest > deadline:
            left = tuple(cell.name for cell in cells[index:])
            return Study(tuple(cells[:index]), tuple(outcomes), steps, motion, first.grid, work.steps, left)
        outfit = parts.wardrobe.dress(_use(styles, cell.style), merging=True)
        start = _begin(parts, work, cell, outfit)
        watched = _Watched()
        uniform = Method("uniform", f"{work.steps} steps", lambda grid, steps: watched, work.steps, work.side)  # noqa: B023 -- run at once
        reference, outcome = _run(parts, work, cell, start, uniform, 1.0, meter, None)
        outcomes.append(outcome)
        moved(len(outcomes))
        assert watched.first is not None
        motion[cell.name] = motion_of(watched.first)
        # In alternating order, so that a machine that slows down slows everybody.
        planned = list(_planned(work, cell, methods, parts.has_adapter))
        for ratio, method in planned if index % 2 == 0 else planned[::-1]:
            _, outcome = _run(parts, work, cell, start, method, ratio, meter, reference)
            outcomes.append(outcome)
            moved(len(outcomes))
        parts.wardrobe.undress(outfit)
        slowest = max(slowest, time.monotonic() - began)
    return Study(tuple(cells), tuple(outcomes), steps, motion, first.grid, work.steps)


@dataclass
class _Watched(Uniform):
    """The uniform path, and what its first step predicts: [1, 16, T, H, W]."""

    first: torch.Tensor | None = None

    def observe(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: float, tokens: int) -> None:
        if self.first is None:
            self.first = latents - sigma * velocity


def _use(styles: StyleRegistry, name: str) -> tuple[StyleUse, ...]:
    if not name:
        return ()
    style = styles.find(name)
    return (StyleUse(str(style.weights_path), style.fingerprint, 1.0),)


def _planned(
    work: StudyWork, cell: Cell, methods: Mapping[float, Sequence[Method]], has_adapter: bool
) -> Iterator[tuple[float, Method]]:
    """What is run on a film besides the uniform path."""
    if cell.counts:
        target = work.target_psnr_db
        auto = Method(AUTO_CAT, f"{target:g} dB", _holding(target), work.steps, work.side)
        yield 1.0, auto
    for ratio, some in methods.items():
        for method in some:
            if method.name == PLAIN_CAT and not has_adapter:
                continue
            if cell.style:
                runs = method.name in ("cat", PLAIN_CAT) and ratio in ADAPTER_RATIOS
            elif cell.counts:
                runs = ratio == work.wide_ratio or method.name not in _ONLY_WIDE
            else:
                runs = ratio == work.wide_ratio
            if runs:
                yield ratio, method


def _holding(target_psnr_db: float) -> PolicyOf:
    return lambda grid, steps: ContentAdaptive(AdaptiveTokens(grid, steps, target_psnr_db=target_psnr_db))


def _begin(parts: Parts, work: StudyWork, cell: Cell, outfit: Outfit | None = None) -> Start:
    film = cell.film
    return begin(parts, film.first_frame, film.caption, work.frames, work.guidance_scale, work.seed, outfit)


def _run(
    parts: Parts,
    work: StudyWork,
    cell: Cell,
    start: Start,
    method: Method,
    ratio: float,
    meter: _Meter,
    reference: Frames | None,
) -> tuple[Frames, Outcome]:
    """One clip, measured; without a reference it is its own."""
    own = start
    if method.side != work.side:
        own = begin_smaller(parts, start, cell.film.first_frame, work.frames, method.side, method.side)
    sampled = sample(parts, own, method.steps, method.policy(own.grid, method.steps))
    decoding = time.perf_counter()
    frames = decode(parts, sampled.latents)
    if method.side != work.side:
        frames = np.stack([resized(frame, work.side, work.side) for frame in frames])
    clip_seconds = own.seconds + sampled.seconds + time.perf_counter() - decoding
    outcome = Outcome(
        cell=cell.name,
        keep_ratio=ratio,
        method=method.name,
        setting=method.setting,
        tokens=sum(sampled.tokens) / (work.steps * start.grid.count),
        seconds=sampled.seconds,
        clip_seconds=clip_seconds,
        scores=meter.scores(frames, frames if reference is None else reference, cell.film),
    )
    return frames, outcome


def methods_at(work: StudyWork, ratio: float, cost: float, costs: Costs) -> Iterator[Method]:
    """What is compared at a keep ratio.

    Args:
        cost: of CAT there, over that of the uniform path.
        costs: of single steps.
    """

    def whole(name: str, setting: str, policy: PolicyOf) -> Method:
        return Method(name, setting, policy, work.steps, work.side)

    steps = work.steps
    yield whole("cat", f"keep ratio {ratio:g}", adaptive(ratio))
    yield whole(PLAIN_CAT, f"keep ratio {ratio:g}, without the adapter", adaptive(ratio, adapted=False))
    for name, partition in EQUAL_TOKENS.items():
        yield whole(name, f"keep ratio {ratio:g}", adaptive(ratio, partition))
    runs = min(steps, math.ceil(steps * cost - 1e-9))
    yield Method("fewer_steps", f"{runs} steps", lambda grid, steps: Uniform(), runs, work.side)
    yield whole("step_cache", f"{runs} of {steps} steps run", lambda grid, steps: StepCache(spread_steps(steps, runs)))
    sides = [side for side in smaller_sides(work.side) if costs.of(f"side_{side}") >= cost]
    side = sides[0] if sides else work.side
    yield Method("smaller", f"{side}x{side}", lambda grid, steps: Uniform(), steps, side)
    if "coarse" in costs.seconds:
        # n coarse steps and steps - n whole ones cost at least as much as CAT.
        coarse = max(0, min(steps - 1, math.floor(steps * (1.0 - cost) / max(1e-9, 1.0 - costs.of("coarse")) + 1e-9)))
        yield whole("progressive", f"{coarse} of {steps} steps at half size", lambda grid, steps: Progressive(coarse))


def smaller_sides(side: int) -> list[int]:
    """Sides of whole patches below one, from half of it up."""
    return list(range(max(_LEAST_SIDE, -(-side // 32) * 16), side, 16))


@torch.inference_mode()
def time_steps(
    parts: Parts, work: StudyWork, start: Start, film: Clip, counts: Sequence[int]
) -> dict[str, list[float]]:
    """Seconds of single steps, interleaved, by name as in `Study`; two rounds of warm-up do not count.

    Args:
        counts: tokens of merged steps to be timed, besides those of keep 0.5 and 0.25.
    """
    timestep = parts.model.new_scheduler(work.steps).timesteps[work.steps // 2]
    clean = start.condition[:, 4:].contiguous()

    def plain(own: Start, coarse: bool = False) -> Callable[[], object]:
        condition = start.coarse if coarse and start.coarse is not None else own.condition
        latents = own.noise[..., : condition.shape[3], : condition.shape[4]].contiguous()
        return lambda: parts.denoiser.velocities(latents, condition, timestep, own.branches, NO_STYLE)

    def merged(tokens: int) -> Callable[[], object]:
        def step() -> object:
            plan = price(start.grid, clean).allocate(tokens)
            together = Merged(plan, clean)
            worn = start.outfit.merged
            return parts.denoiser.velocities(start.noise, start.condition, timestep, start.branches, worn, together)

        return step

    sides = {"uniform": plain(start)}
    sides |= {"keep_050": merged(rung_tokens(start.grid, 0.5)), "keep_025": merged(rung_tokens(start.grid, 0.25))}
    sides |= {f"tokens_{count}": merged(count) for count in counts}
    if start.coarse is not None:
        sides["coarse"] = plain(start, coarse=True)
    for side in smaller_sides(work.side):
        sides[f"side_{side}"] = plain(begin_smaller(parts, start, film.first_frame, work.frames, side, side))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-2, work.pairs):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            began = time.perf_counter()
            sides[name]()
            if number >= 0:
                samples[name].append(time.perf_counter() - began)
    return samples


class _Meter:
    """Every metric for which there is what it needs."""

    def __init__(self, lpips: Callable[[Frames, Frames], float] | None) -> None:
        self._lpips = lpips

    def scores(self, clip: Frames, uniform: Frames, film: Clip) -> dict[str, float]:
        found = {"flicker": temporal_flicker(clip), "film_flicker": temporal_flicker(film.frames)}
        for name, other in (("uniform", uniform), ("film", film.frames)):
            found[f"psnr_{name}"] = psnr(clip, other)
            alike = structure(clip, other)
            found[f"ssim_{name}"] = alike.ssim
            if alike.ms_ssim is not None:
                found[f"ms_ssim_{name}"] = alike.ms_ssim
            if film.mask.any():
                found[f"object_psnr_{name}"] = object_psnr(clip, other, film.mask)
            if self._lpips is not None:
                found[f"lpips_{name}"] = self._lpips(clip, other)
        return found


def object_psnr(a: Frames, b: Frames, mask: NDArray[np.bool_]) -> float:
    """As `psnr`, over the pixels of a mask [frames, height, width], of which there is one or more."""
    error = float(np.square(a[mask].astype(np.float64) - b[mask]).mean())
    return MOST_DECIBELS if error == 0 else min(MOST_DECIBELS, 10 * math.log10(255**2 / error))
