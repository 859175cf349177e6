"""What wan-tiny can do, measured on held-out films through the engine core; plain data for the bench and the card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray

from cinecat.engines.core import EngineCore
from cinecat.engines.messages import Shot, StyleUse
from cinecat.engines.training.film import HELD_OUT, Clip, make_clip
from cinecat.engines.training.scenes import DIRECTIONS, OPEN_KINDS, SHARES, Kind, recaptioned
from cinecat.engines.training.vae import decode, encode, psnr, to_video

Frames = NDArray[np.uint8]

_NEAR = 0.35
"""Distance in RGB within which a pixel may belong to an object; no wall and no other palette colour is that near."""


@dataclass(frozen=True)
class Sampling:
    """How clips are generated for a measurement."""

    steps: int
    guidance_scale: float
    seed: int = 0


@dataclass(frozen=True)
class ShotResult:
    """One held-out film against its generated twin.

    Attributes:
        told: whether first frame and caption tell all that is seen: the course, and the ground that it goes over.
        right: whether the subject did what was asked: moved in the named direction, or stayed; None where nothing
            of the kind was asked.
        first_psnr, last_psnr, clip_psnr: decibels to the film.
    """

    kind: Kind
    caption: str
    told: bool
    right: bool | None
    first_psnr: float
    last_psnr: float
    clip_psnr: float


@dataclass(frozen=True)
class ModelReport:
    """What was measured at one frame size; PSNR in decibels.

    Attributes:
        shots: of held-out films as the set mixes them.
        stills: of further still films.
        four: per first frame, whether the clip follows each of the four directions that it was asked for.
        open_psnrs: per open shot, of few steps to many at the same seed.
        vae_psnrs: per film of `shots`, of encoding and decoding it.
    """

    shots: tuple[ShotResult, ...]
    stills: tuple[ShotResult, ...]
    four: tuple[tuple[bool, ...], ...]
    open_psnrs: tuple[float, ...]
    vae_psnrs: tuple[float, ...]

    @property
    def moving(self) -> tuple[bool, ...]:
        """Whether the subject moved in the named direction, of every shot that names one."""
        return tuple(bool(shot.right) for shot in self.shots if shot.right is not None and shot.kind != "still")

    @property
    def still(self) -> tuple[bool, ...]:
        """Whether the shot stayed still, of every still one."""
        return tuple(bool(shot.right) for shot in (*self.shots, *self.stills) if shot.kind == "still")

    @property
    def told(self) -> tuple[ShotResult, ...]:
        """Shots of which all is told; what is not told cannot be known."""
        return tuple(shot for shot in self.shots if shot.told)


@dataclass(frozen=True)
class Amounts:
    """How much is measured: numbers of films, and the steps that open shots compare."""

    shots: int = 64
    stills: int = 12
    four: int = 12
    open_shots: int = 16
    few_steps: int = 4
    many_steps: int = 32

    @property
    def clips(self) -> int:
        return self.shots + self.stills + len(DIRECTIONS) * self.four + 2 * self.open_shots


def measure_model(
    core: EngineCore,
    vae: AutoencoderKLWan,
    amounts: Amounts,
    sampling: Sampling,
    frames: int = 17,
    side: int = 128,
    made: Callable[[], None] = lambda: None,
) -> ModelReport:
    """Generates held-out films' twins and compares them.

    Args:
        vae: of the same checkpoint.
        frames, side: of the films.
        made: called after every clip.
    """

    def films(first: int, count: int, kinds: Sequence[Kind | None]) -> list[Clip]:
        seeds = range(HELD_OUT + first, HELD_OUT + first + count)
        return [make_clip(seed, frames, side, side, kind=kinds[seed % len(kinds)]) for seed in seeds]

    def run(film: Clip, caption: str, steps: int = sampling.steps) -> Frames:
        clip = generate(core, film.first_frame, caption, frames, replace(sampling, steps=steps))
        made()
        return clip

    shown = films(0, amounts.shots, [None])
    return ModelReport(
        shots=tuple(compare(film, run(film, film.caption)) for film in shown),
        stills=tuple(compare(film, run(film, film.caption)) for film in films(10_000, amounts.stills, ["still"])),
        four=tuple(
            tuple(follows(film, run(film, recaptioned(film.scene, direction)), direction) for direction in DIRECTIONS)
            for film in films(20_000, amounts.four, ["slide"])
        ),
        open_psnrs=tuple(
            _psnr(run(film, film.caption, amounts.few_steps), run(film, film.caption, amounts.many_steps))
            for film in films(30_000, amounts.open_shots, sorted(OPEN_KINDS))
        ),
        vae_psnrs=vae_psnrs(vae, shown),
    )


@dataclass(frozen=True)
class PhotographResult:
    """A clip from a photograph whose caption asks for nothing to move.

    Attributes:
        first_psnr, last_psnr: decibels to the photograph.
        detail_growth: mean absolute difference of neighbouring pixels in the last frame over that in the first:
            artefacts that grow add detail.
        flicker: mean absolute difference of frames that follow each other, in grey levels.
    """

    first_psnr: float
    last_psnr: float
    detail_growth: float
    flicker: float


PHOTOGRAPH_CAPTION = "nothing moves"


def measure_photographs(
    core: EngineCore,
    photographs: Mapping[str, Frames],
    frames: int,
    sampling: Sampling,
    made: Callable[[], None] = lambda: None,
) -> dict[str, PhotographResult]:
    """Generates a still clip from each photograph, uint8 [height, width, 3]."""
    results = {}
    for name, photograph in photographs.items():
        clip = generate(core, photograph, PHOTOGRAPH_CAPTION, frames, sampling)
        change = np.abs(np.diff(clip.astype(np.float32), axis=0))
        results[name] = PhotographResult(
            first_psnr=_psnr(clip[0], photograph),
            last_psnr=_psnr(clip[-1], photograph),
            detail_growth=_detail(clip[-1]) / _detail(clip[0]),
            flicker=float(change.mean()),
        )
        made()
    return results


def _detail(frame: Frames) -> float:
    values = frame.astype(np.float32)
    return float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean())


def generate(
    core: EngineCore,
    first_frame: Frames,
    prompt: str,
    frames: int,
    sampling: Sampling,
    styles: tuple[StyleUse, ...] = (),
) -> Frames:
    """One clip, uint8 [frames, height, width, 3], as a request for it would be served."""
    job = "measured"
    core.condition(
        Shot(job, first_frame, prompt, "", frames, sampling.steps, sampling.guidance_scale, sampling.seed, styles)
    )
    while (stepped := core.step_alone(job)).step < stepped.total:
        pass
    chunks: list[torch.Tensor] = []
    while True:
        decoded = core.decode(job, lambda chunk: chunks.append(chunk.cpu()))
        if decoded.first + decoded.count >= decoded.total:
            break
    core.release(job)
    return np.asarray((torch.cat(chunks) * 255.0).round().to(torch.uint8).numpy())


def compare(film: Clip, clip: Frames) -> ShotResult:
    """A generated clip against the film whose first frame and caption it was given."""
    right: bool | None = None
    if film.scene.kind == "still":
        right = stays(film, clip)
    elif film.scene.direction is not None and film.scene.kind in ("slide", "pass"):
        right = follows(film, clip, film.scene.direction)
    return ShotResult(
        kind=film.scene.kind,
        caption=film.caption,
        told=not (film.scene.open or film.scene.uncovers),
        right=right,
        first_psnr=_psnr(clip[0], film.frames[0]),
        last_psnr=_psnr(clip[-1], film.frames[-1]),
        clip_psnr=_psnr(clip, film.frames),
    )


def follows(film: Clip, clip: Frames, direction: str) -> bool:
    """Whether the subject of a slide, found by its colour, moves in `direction`.

    It must go at least a third of the way that it was told to, and farther along than across.
    """
    centres = track(film, clip)
    seen = np.flatnonzero(~np.isnan(centres[:, 0]))
    if len(seen) < 2:
        return False
    way = centres[seen[-1]] - centres[seen[0]]
    along = np.array(DIRECTIONS[direction])
    forward = float(way @ along)
    across = float(np.abs(way @ along[::-1]))
    side = min(clip.shape[1:3])
    # A subject that leaves the frame is seen to move less than it does.
    told = film.scene.speed * side * (seen[-1] - seen[0])
    room = _room(film, direction)
    return bool(forward > min(told, room) / 3 and forward > across)


def stays(film: Clip, clip: Frames) -> bool:
    """Whether the subject keeps its place within a sixty-fourth of the frame and the picture within 25 dB."""
    centres = track(film, clip)
    if np.isnan(centres).any():
        return False
    drift = np.linalg.norm(centres - centres[0], axis=1).max()
    return bool(drift <= min(clip.shape[1:3]) / 64) and _psnr(clip[0], clip[-1]) >= 25.0


def track(film: Clip, clip: Frames) -> NDArray[np.float64]:
    """Centre (x, y) per frame of what has the subject's colour, [frames, 2]; NaN where it is gone.

    The colour is the film's own, in its first frame where the subject is seen.
    """
    areas = film.mask.sum(axis=(1, 2))
    seen = int(np.argmax(areas > 0))
    if areas[seen] == 0:
        return np.full((len(clip), 2), np.nan)
    colour = film.frames[seen][film.mask[seen]].mean(axis=0) / 255.0
    distance = np.linalg.norm(clip.astype(np.float32) / 255.0 - colour.astype(np.float32), axis=-1)
    weight = np.clip(1.0 - distance / _NEAR, 0.0, None)
    own = float((weight[0] * film.mask[0]).sum()) or float(weight.sum(axis=(1, 2)).max())
    total = weight.sum(axis=(1, 2))
    y, x = np.mgrid[: clip.shape[1], : clip.shape[2]]
    with np.errstate(invalid="ignore", divide="ignore"):
        centres = np.stack([(weight * x).sum(axis=(1, 2)) / total, (weight * y).sum(axis=(1, 2)) / total], axis=1)
    centres[total < 0.1 * own] = np.nan
    return centres


@torch.no_grad()
def vae_psnrs(vae: AutoencoderKLWan, films: Sequence[Clip]) -> tuple[float, ...]:
    """PSNR of each film after encoding and decoding."""
    values = []
    for film in films:
        video = to_video(film.frames)[None]
        values.append(psnr(decode(vae, encode(vae, video)).clamp(-1.0, 1.0), video))
    return tuple(values)


def kinds_table(report: ModelReport) -> list[dict[str, Any]]:
    """Means per kind of shot, for tables."""
    rows: list[dict[str, Any]] = []
    for kind in SHARES:
        some = [shot for shot in report.shots if shot.kind == kind]
        if some:
            asked = [shot.right for shot in some if shot.right is not None]
            rows.append(
                {
                    "kind": kind,
                    "shots": len(some),
                    "right": _mean(float(right) for right in asked) if asked else None,
                    "first_psnr": _mean(shot.first_psnr for shot in some),
                    "last_psnr": _mean(shot.last_psnr for shot in some),
                    "clip_psnr": _mean(shot.clip_psnr for shot in some),
                }
            )
    return rows


def _room(film: Clip, direction: str) -> float:
    """Pixels that the subject's centre can move in `direction` until it reaches the frame's edge."""
    height, width = film.frames.shape[1:3]
    x, y = film.track[0]
    return float({"left": x, "right": width - 1 - x, "up": y, "down": height - 1 - y}[direction])


def _psnr(first: Frames, second: Frames) -> float:
    return psnr(torch.tensor(first.copy()), torch.tensor(second.copy()), peak=255.0)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else float("nan")
