"""What wan-tiny can do, measured on held-out films through the engine core; plain data for the bench and the card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray

from cinecat.engines.core import EngineCore
from cinecat.engines.messages import Shot
from cinecat.engines.training.film import HELD_OUT, Clip, make_clip
from cinecat.engines.training.scenes import DIRECTIONS, OPEN_KINDS, SHARES, Kind, recaptioned
from cinecat.engines.training.vae import decode, encode, psnr, to_video

Frames = NDArray[np.uint8]

_NEAR = 0.35
"""Distance in RGB within which a pixel may belong to an object; no wall and no other palette colour is that near."""


@dataclass(frozen=True)
class Sampling:
    """How clips are generated for a measurement."""

    steps: int = 8
    guidance_scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ShotResult:
    """One held-out film against its generated twin.

    Attributes:
        right: whether the subject did what was asked: moved in the named direction, or stayed; None where nothing
            of the kind was asked.
        first_psnr, last_psnr, clip_psnr: decibels to the film.
    """

    kind: Kind
    caption: str
    right: bool | None
    first_psnr: float
    last_psnr: float
    clip_psnr: float


@dataclass(frozen=True)
class ModelReport:
    """The checks of the bundled model. Shares are in 0 to 1, PSNR in decibels.

    Attributes:
        vae_psnrs: per film, of encoding and decoding.
        first_frame_psnr: mean over generated clips.
        moving_right: share of moving shots whose subject moves in the named direction.
        still_right: share of still shots that stay still.
        told_first_psnr, told_last_psnr: over shots whose course the caption tells; what is not told cannot be known.
        four_right: share of clips that follow, when one first frame is given with each of four directions.
        four_all_right: share of first frames where all four do.
        few_steps_psnrs: per open shot, of 4 steps to 32 at the same seed.
    """

    height: int
    width: int
    frames: int
    shots: tuple[ShotResult, ...]
    sampling: Sampling
    vae_psnrs: tuple[float, ...]
    first_frame_psnr: float
    moving_shots: int
    moving_right: float
    still_shots: int
    still_right: float
    told_first_psnr: float
    told_last_psnr: float
    four_first_frames: int
    four_right: float
    four_all_right: float
    few_steps_psnrs: tuple[float, ...]


def measure_model(
    core: EngineCore,
    vae: AutoencoderKLWan,
    count: int = 64,
    still: int = 16,
    four: int = 8,
    open_shots: int = 8,
    frames: int = 17,
    height: int = 128,
    width: int = 128,
    sampling: Sampling = Sampling(),
    moved: Callable[[int, int], None] = lambda done, total: None,
) -> ModelReport:
    """Runs all measurements.

    Args:
        vae: of the same checkpoint.
        count: held-out films as the set mixes them.
        still, four, open_shots: further films for the checks of these names.
        moved: told (done, total) clips.
    """
    films = [make_clip(HELD_OUT + index, frames, height, width) for index in range(count)]
    stills = [make_clip(HELD_OUT + 10_000 + index, frames, height, width, kind="still") for index in range(still)]
    slides = [make_clip(HELD_OUT + 20_000 + index, frames, height, width, kind="slide") for index in range(four)]
    opens = [
        make_clip(HELD_OUT + 30_000 + index, frames, height, width, kind=kind)
        for index, kind in zip(range(open_shots), _cycle(sorted(OPEN_KINDS)), strict=False)
    ]
    total = count + still + 4 * four + 2 * open_shots
    done = 0

    def run(film: Clip, caption: str, with_sampling: Sampling = sampling) -> Frames:
        nonlocal done
        clip = generate(core, film.first_frame, caption, frames, with_sampling)
        done += 1
        moved(done, total)
        return clip

    shots = tuple(compare(film, run(film, film.caption)) for film in films)
    still_results = [compare(film, run(film, film.caption)) for film in stills]
    followed = [
        [follows(film, run(film, recaptioned(film.scene, direction)), direction) for direction in DIRECTIONS]
        for film in slides
    ]
    few = [
        _psnr(
            run(film, film.caption, Sampling(4, sampling.guidance_scale, sampling.seed)),
            run(film, film.caption, Sampling(32, sampling.guidance_scale, sampling.seed)),
        )
        for film in opens
    ]
    moving = [shot for shot in shots if shot.right is not None and shot.kind != "still"]
    told = [shot for shot in shots if shot.kind not in OPEN_KINDS]
    all_still = [*still_results, *(shot for shot in shots if shot.kind == "still")]
    return ModelReport(
        height=height,
        width=width,
        frames=frames,
        shots=shots,
        sampling=sampling,
        vae_psnrs=vae_psnrs(vae, films),
        first_frame_psnr=_mean(shot.first_psnr for shot in shots),
        moving_shots=len(moving),
        moving_right=_mean(float(bool(shot.right)) for shot in moving),
        still_shots=len(all_still),
        still_right=_mean(float(bool(shot.right)) for shot in all_still),
        told_first_psnr=_mean(shot.first_psnr for shot in told),
        told_last_psnr=_mean(shot.last_psnr for shot in told),
        four_first_frames=len(followed),
        four_right=_mean(float(right) for rights in followed for right in rights),
        four_all_right=_mean(float(all(rights)) for rights in followed),
        few_steps_psnrs=tuple(few),
    )


def generate(core: EngineCore, first_frame: Frames, prompt: str, frames: int, sampling: Sampling) -> Frames:
    """One clip, uint8 [frames, height, width, 3], as a request for it would be served."""
    job = "measured"
    core.condition(
        Shot(job, first_frame, prompt, "", frames, sampling.steps, sampling.guidance_scale, sampling.seed, ())
    )
    while (stepped := core.step(job)).step < stepped.total:
        pass
    chunks: list[torch.Tensor] = []
    while True:
        decoded = core.decode(job, lambda chunk: chunks.append(chunk.clone()))
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
    rows = []
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


def _cycle(kinds: Sequence[Kind]) -> Iterable[Kind]:
    while True:
        yield from kinds
