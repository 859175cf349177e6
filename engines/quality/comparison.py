"""Clips against their namesakes: every metric that can be had, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cinecat.engines.quality.clip_similarity import load_clip_similarity
from cinecat.engines.quality.fvd import LEAST_FRAMES, Features, frechet_distance, load_fvd
from cinecat.engines.quality.intervals import Mean, bootstrap_mean
from cinecat.engines.quality.lpips import load_lpips
from cinecat.engines.quality.motion import motion_scores
from cinecat.engines.quality.pixels import psnr, ssim, temporal_flicker
from cinecat.engines.quality.videos import FilePair, FolderError, Video, read_video
from cinecat.engines.quality.weights import Weights
from cinecat.engines.training.styles.clips import ClipError

Frames = NDArray[np.uint8]
Side = Literal["a", "b", "both", "difference"]

LEAST_SIDE, LEAST_FRAME_COUNT = 32, 2
"""Of clips that are compared: what SSIM's window, LPIPS and the flow need."""
_RATE_TOLERANCE = 0.01
NO_WEIGHTS = Weights()
_UNAVAILABLE = {
    "lpips": "needs --lpips-weights: AlexNet and the linear heads in one safetensors file",
    "clip_sim": "needs --clip-weights: a folder with a CLIP checkpoint in transformers' layout",
    "fvd": "needs --fvd-weights: an I3D trunk, StyleGAN-V's i3d_torchscript.pt",
}


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        title: for people, with its unit.
        better: which way it gets better; "" where that depends on what is wanted.
        of_pair: whether it compares two clips; otherwise it is measured on each.
    """

    title: str
    better: Literal["higher", "lower", ""]
    of_pair: bool


METRICS: dict[str, Metric] = {
    "psnr_db": Metric("PSNR, dB", "higher", True),
    "ssim": Metric("SSIM", "higher", True),
    "lpips": Metric("LPIPS", "lower", True),
    "clip_sim": Metric("CLIP-SIM", "higher", True),
    "temporal_flicker": Metric("temporal flicker", "higher", False),
    "warped_error": Metric("warped error, 1e-3", "lower", False),
    "motion_score": Metric("MotionScore, %/s", "", False),
}
"""Metrics of clips by name; FVD is one figure of all clips together."""


@dataclass(frozen=True)
class PairScores:
    """What was measured on one pair.

    Attributes:
        a, b: metrics of each clip, by name; those that cannot be had for it are left out.
        both: metrics of the pair.
    """

    name: str
    frames: int
    width: int
    height: int
    a: Mapping[str, float]
    b: Mapping[str, float]
    both: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """Pairs of clips, compared.

    Attributes:
        fvd: of all pairs together, or None.
        unavailable: why, by the name of a metric.
        left_out: sentences on files that were not compared.
    """

    pairs: Sequence[PairScores]
    fvd: float | None
    unavailable: Mapping[str, str]
    left_out: Sequence[str]

    def mean(self, metric: str, side: Side) -> Mean | None:
        """Over all pairs that have the metric; "difference" is a - b, pair by pair. None where none has it."""
        if side == "difference":
            values = [pair.a[metric] - pair.b[metric] for pair in self.pairs if metric in pair.a and metric in pair.b]
        else:
            values = [scores[metric] for pair in self.pairs if metric in (scores := getattr(pair, side))]
        return bootstrap_mean(values) if values else None


class Meter:
    """Every metric for which there are weights."""

    def __init__(self, weights: Weights = NO_WEIGHTS) -> None:
        """Raises WeightsError for weights that cannot be used."""
        self._pair_metrics: dict[str, Callable[[Frames, Frames], float]] = {"psnr_db": psnr, "ssim": ssim}
        if weights.lpips is not None:
            self._pair_metrics["lpips"] = load_lpips(weights.lpips)
        if weights.clip is not None:
            self._pair_metrics["clip_sim"] = load_clip_similarity(weights.clip)
        self.trunk = load_fvd(weights.fvd) if weights.fvd is not None else None
        have = {*self._pair_metrics, *(["fvd"] if self.trunk else [])}
        self.unavailable = {name: reason for name, reason in _UNAVAILABLE.items() if name not in have}

    def of_pair(self, a: Frames, b: Frames) -> dict[str, float]:
        """Of two clips uint8 [frames, height, width, 3] of one shape, the second the reference."""
        return {name: measure(a, b) for name, measure in self._pair_metrics.items()}

    def of_clip(self, clip: Frames, fps: float) -> dict[str, float]:
        """Of one clip uint8 [frames, height, width, 3]; what it cannot tell is left out."""
        motion = motion_scores(clip, fps)
        scores = {"temporal_flicker": temporal_flicker(clip), **vars(motion)}
        return {name: value for name, value in scores.items() if not math.isnan(value)}


def compare_pairs(
    files: Sequence[FilePair], weights: Weights = NO_WEIGHTS, moved: Callable[[int], None] = lambda done: None
) -> Comparison:
    """Compares clips pair by pair; the second of each is the reference.

    Args:
        moved: told how many pairs are done.

    Raises:
        FolderError: no pair can be compared.
        WeightsError: weights cannot be used.
    """
    meter = Meter(weights)
    pairs: list[PairScores] = []
    left_out: list[str] = []
    features: list[tuple[Features, Features]] = []
    for done, pair in enumerate(files):
        moved(done)
        try:
            first, second = read_video(pair.a), read_video(pair.b)
        except ClipError as error:
            left_out.append(str(error))
            continue
        if problem := _unlike(first, second):
            left_out.append(f"{pair.name}: {problem}")
            continue
        pairs.append(_measured(meter, pair, first, second))
        if meter.trunk is not None and len(first.frames) >= LEAST_FRAMES:
            features.append((meter.trunk(first.frames), meter.trunk(second.frames)))
    moved(len(files))
    if not pairs:
        raise FolderError(f"no pair can be compared: {'; '.join(left_out)}")
    unavailable = dict(meter.unavailable)
    fvd = None
    if len(features) >= 2:
        fvd = frechet_distance([one for one, _ in features], [other for _, other in features])
    elif meter.trunk is not None:
        unavailable["fvd"] = f"needs two pairs or more of at least {LEAST_FRAMES} frames"
    return Comparison(pairs, fvd, unavailable, left_out)


def _measured(meter: Meter, pair: FilePair, a: Video, b: Video) -> PairScores:
    count, height, width, _ = a.frames.shape
    return PairScores(
        name=pair.name,
        frames=count,
        width=width,
        height=height,
        a=meter.of_clip(a.frames, a.fps),
        b=meter.of_clip(b.frames, b.fps),
        both=meter.of_pair(a.frames, b.frames),
    )


def _unlike(a: Video, b: Video) -> str:
    """Why two videos cannot be compared; empty where they can."""
    for what, first, second in (
        ("size", f"{a.frames.shape[2]}x{a.frames.shape[1]}", f"{b.frames.shape[2]}x{b.frames.shape[1]}"),
        ("length", f"{len(a.frames)} frames", f"{len(b.frames)} frames"),
    ):
        if first != second:
            return f"has another {what} in each folder, {first} and {second}; make them alike"
    if abs(a.fps - b.fps) > _RATE_TOLERANCE * b.fps:
        return f"has another frame rate in each folder, {a.fps:g} and {b.fps:g}; make them alike"
    if min(a.frames.shape[1:3]) < LEAST_SIDE:
        return f"has frames of {a.frames.shape[2]}x{a.frames.shape[1]}; at least {LEAST_SIDE}x{LEAST_SIDE} are needed"
    if len(a.frames) < LEAST_FRAME_COUNT:
        return f"has {len(a.frames)} frame; at least {LEAST_FRAME_COUNT} are needed"
    return ""
