"""How fast this machine is with a model, and how well the reckoning does on sizes that it was not fitted to.

No weights are read: random ones of the same shapes take as long.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from numpy.typing import NDArray
from torch import Tensor

from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.capacity.speeds import Speeds
from cinecat.engines.capacity.times import step_seconds
from cinecat.engines.capacity.work import ClipWork, Steps, decode_flops, vae_of
from cinecat.engines.context import Branch
from cinecat.engines.denoise import TOGETHER_TOKENS, Denoiser, EngineBlocks
from cinecat.engines.errors import ModelError
from cinecat.engines.memory_plan import ModelSizes, empty_transformer
from cinecat.engines.model import synchronize
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.slots import NO_STYLE
from cinecat.engines.tokens.flops import forward_flops
from cinecat.engines.vae import Stream, decoder_layers, lay_out

_WHOLE_BYTES = 2**30
_LAYERS = 2
_FRAMES = 17
_SIDES = (64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536)
_LEAST_SIZES = 7

Announce = Callable[[str, float], object]
"""Hears what is being done, and the share of all that is done."""


@dataclass(frozen=True)
class Sample:
    """One size, measured and reckoned.

    Attributes:
        what: "step" or "decode", a chunk of 4 frames.
        size: of the clip or the frames, in pixels.
        tokens: of each row of a step; 0 of a decode.
        fitted: whether the speeds were fitted to it; otherwise the reckoning is tested on it.
        measured, reckoned: seconds.
    """

    what: str
    size: str
    tokens: int
    fitted: bool
    measured: float
    reckoned: float

    @property
    def ratio(self) -> float:
        return self.reckoned / self.measured


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        layers: of the model that was run; a step of it was reckoned with as many.
        speeds: with what was measured in the place of what was not.
    """

    device: str
    dtype: str
    threads: int
    layers: int
    speeds: Speeds
    samples: tuple[Sample, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data; the speeds are told with the projection."""
        samples = [{**asdict(sample), "ratio": sample.ratio} for sample in self.samples]
        return {
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "layers": self.layers,
            "samples": samples,
        }


def measure(
    sizes: ModelSizes,
    work: ClipWork,
    speeds: Speeds,
    device: torch.device,
    dtype: torch.dtype,
    announce: Announce,
    longest_seconds: float = 1.0,
    rounds: int = 7,
) -> Calibration:
    """Runs steps and decodes of growing sizes, fits speeds to every second one, and reckons all.

    Small models run whole; of others two layers do, and time is taken to grow with their number.

    Args:
        work: of a clip of the model, for its sizes and rows.
        speeds: those that are not measured stay.
        longest_seconds: larger sizes than the first that takes longer are not tried.
        rounds: of all sizes in turn, of which the median counts.

    Raises:
        ModelError: the device has too little memory.
    """
    layers = work.model.layers if work.block_bytes <= _WHOLE_BYTES else min(_LAYERS, work.model.layers)
    small = replace(work, model=replace(work.model, layers=layers))
    try:
        with torch.inference_mode():
            step = _StepRunner(sizes, small, device, dtype)
            steps = _timed(step, device, longest_seconds, rounds, lambda share: announce("steps", share / 2))
            decode = _DecodeRunner(sizes, device)
            decodes = _timed(
                decode, device, longest_seconds, rounds, lambda share: announce("decoding", 0.5 + share / 2)
            )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"measure: {device} has too little memory for {layers} layers of the model") from error
    tokens = {side: _tokens(side) for side in steps}
    costs = _fit([_features(small, tokens[side]) for side in _fitted(steps)], [steps[side] for side in _fitted(steps)])
    linear, attention, layer = costs
    vae_costs = _fit([(decode.flops(side),) for side in _fitted(decodes)], [decodes[side] for side in _fitted(decodes)])
    found = speeds.changed(
        "measured",
        linear_flops=1.0 / linear if linear else None,
        attention_flops=1.0 / attention if attention else None,
        vae_flops=1.0 / vae_costs[0],
        layer_seconds=layer,
    )
    samples = [
        Sample(
            "step",
            f"{side}x{side}x{_FRAMES}",
            tokens[side],
            side in _fitted(steps),
            seconds,
            step_seconds(small, Steps(1, tokens[side], False), Layout(), found).total,
        )
        for side, seconds in steps.items()
    ]
    samples += [
        Sample("decode", f"{side}x{side}", 0, side in _fitted(decodes), seconds, decode.flops(side) / found.vae_flops)
        for side, seconds in decodes.items()
    ]
    name = str(dtype).removeprefix("torch.")
    return Calibration(str(device), name, torch.get_num_threads(), layers, found, tuple(samples))


class _StepRunner:
    """A model's step without its solver, guided or not, at any size."""

    def __init__(self, sizes: ModelSizes, work: ClipWork, device: torch.device, dtype: torch.dtype) -> None:
        transformer = _random_transformer({**sizes.transformer, "num_layers": work.model.layers}, device, dtype)
        self._denoiser = Denoiser(transformer, EngineBlocks(transformer, TorchEngine(WanStack(transformer)), None))
        self._device, self._dtype, dim = device, dtype, work.model.dim

        def states(tokens: int) -> Tensor:
            return torch.randn(1, tokens, dim, device=device, dtype=dtype)

        # As many text keys as the work counts, of which one is for the empty positions.
        words = work.model.text - 1
        self._branches = [Branch(states(work.model.image), states(words + 1), 512 - words) for _ in range(work.rows)]

    def __call__(self, side: int) -> Callable[[], object]:
        """A step on frames of side x side pixels."""
        shape = ((_FRAMES - 1) // 4 + 1, side // 8, side // 8)
        latents = torch.randn(1, 16, *shape, device=self._device)
        condition = torch.randn(1, 20, *shape, device=self._device)
        timestep = torch.tensor(500.0)
        return lambda: self._denoiser.velocities(latents, condition, timestep, self._branches, NO_STYLE)


class _DecodeRunner:
    """Decoding a chunk of 4 frames."""

    def __init__(self, sizes: ModelSizes, device: torch.device) -> None:
        self._vae, self._meta, self._device = lay_out(vae_of(sizes, device)), vae_of(sizes, "meta"), device
        self._stride = int(self._vae.config.scale_factor_spatial)

    def __call__(self, side: int) -> Callable[[], object]:
        latent = torch.randn(1, 16, side // self._stride, side // self._stride, device=self._device)

        def run() -> object:
            # The frame before is not timed: `_timed` runs everything once before.
            return stream(latent)

        stream = Stream(decoder_layers(self._vae))
        stream(latent)
        return run

    def flops(self, side: int) -> float:
        """Of one chunk."""
        of = [decode_flops(self._meta, frames, side // self._stride, side // self._stride) for frames in (1, 2)]
        return of[1] - of[0]


def _random_transformer(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    transformer = empty_transformer(config, dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(0.0, 0.02)
    return transformer


def _timed(
    runner: Callable[[int], Callable[[], object]],
    device: torch.device,
    longest_seconds: float,
    rounds: int,
    announce: Callable[[float], object],
) -> dict[int, float]:
    """Seconds by side, of as many sides as are run in reasonable time.

    Medians of what a side takes of its round, by the median of the rounds: whatever else the machine does for a while
    slows all sides of a round.
    """
    runs: dict[int, Callable[[], object]] = {}
    for side in _SIDES:
        runs[side] = runner(side)
        _seconds(runs[side], device)
        if len(runs) >= _LEAST_SIZES and _seconds(runs[side], device) > longest_seconds:
            break
    samples = []
    for index in range(rounds):
        samples.append([_seconds(run, device) for run in runs.values()])
        announce((index + 1) / rounds)
    measured = np.asarray(samples)
    whole = np.exp(np.log(measured).mean(axis=1))
    shares = np.median(measured / whole[:, None], axis=0)
    return {side: float(share * np.median(whole)) for side, share in zip(runs, shares, strict=True)}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def _tokens(side: int) -> int:
    return ((_FRAMES - 1) // 4 + 1) * (side // 16) ** 2


def _fitted(seconds: Mapping[int, float]) -> list[int]:
    """Every second side, of which the first is one."""
    return list(seconds)[::2]


def _features(work: ClipWork, tokens: int) -> tuple[float, float, float]:
    """What a step's time is taken to be a sum of: FLOPs of linears, FLOPs of attention, and layers run through."""
    linear, attention = forward_flops(work.model, tokens)
    forwards = work.rows if tokens > TOGETHER_TOKENS else 1
    return work.rows * linear, work.rows * attention, float(forwards * work.model.layers)


def _fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Costs of the features, none below zero, with the least sum of squared relative errors."""
    relative = np.asarray(features) / np.asarray(seconds)[:, None]
    count = relative.shape[1]
    best: tuple[float, tuple[float, ...]] | None = None
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            costs = _least_squares(relative[:, chosen])
            if (costs <= 0).any():
                continue
            error = float(((relative[:, chosen] @ costs - 1.0) ** 2).sum())
            if best is None or error < best[0]:
                every = np.zeros(count)
                every[list(chosen)] = costs
                best = error, tuple(map(float, every))
    assert best is not None, "one feature alone always fits"
    return best[1]


def _least_squares(relative: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.abs(relative).max(axis=0)  # FLOPs are large, layers are few
    costs, *_ = np.linalg.lstsq(relative / scale, np.ones(len(relative)), rcond=None)
    found: NDArray[np.float64] = costs / scale
    return found
