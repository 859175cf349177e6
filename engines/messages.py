"""What the front and the engine core say to each other: plain data, no torch, pickled over a pipe.

The front sends one call and reads one answer. The calls on one request come in the order Condition, Step until done,
Decode until done, Release; Release may come at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

FrameDtype: TypeAlias = Literal["uint8", "float32"]

VAE_TEMPORAL_STRIDE = 4


@dataclass(frozen=True)
class CoreConfig:
    """Everything the core needs to start.

    Attributes:
        model: as in `checkpoint.find_checkpoint`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16": of the transformer and the text encoder.
        threads: CPU threads for torch; 0 leaves it to torch.
        style_slots: styles resident at once.
        max_rank: LoRA rank that a slot holds, summed over the styles that share it.
        cache_bytes: bound of the prompt, image and condition caches together.
    """

    model: str
    device: str
    dtype: str
    threads: int
    style_slots: int
    max_rank: int
    cache_bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """What the front tells clients about the loaded model, and checks requests against.

    Attributes:
        size_multiple: width and height are multiples of this many pixels.
        style_targets: (in, out) features of every linear that a style may change, by module path.
        max_frames: longest clip that the transformer's position table holds.
        max_size: largest width or height that the position table holds, in pixels.
    """

    name: str
    family: str
    fingerprint: str
    device: str
    dtype: str
    engine: str
    parameters: int
    weights_bytes: int
    size_multiple: int
    max_frames: int
    max_size: int
    max_rank: int
    style_targets: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class StyleUse:
    """A style worn by a request: a LoRA file in the diffusers layout, its content hash and its strength."""

    path: str
    fingerprint: str
    strength: float


@dataclass(frozen=True)
class Shot:
    """A validated request.

    Attributes:
        image: first frame, uint8 [height, width, 3], sRGB; its shape is the clip's size.
        frames: 4k + 1.
        seed: 0 to 2^63 - 1.
    """

    job_id: str
    image: NDArray[np.uint8]
    prompt: str
    negative_prompt: str
    frames: int
    steps: int
    guidance_scale: float
    seed: int
    styles: tuple[StyleUse, ...]


@dataclass(frozen=True)
class Condition:
    """Encode prompt and image and draw the starting noise."""

    shot: Shot


@dataclass(frozen=True)
class Step:
    """Run one denoising step: one forward, or two with guidance."""

    job_id: str


@dataclass(frozen=True)
class Decode:
    """Decode the next latent frame into the shared memory block `buffer`, as [count, height, width, 3]."""

    job_id: str
    buffer: str
    dtype: FrameDtype


@dataclass(frozen=True)
class Release:
    """Forget a request; unknown ones are ignored."""

    job_id: str


Call: TypeAlias = Condition | Step | Decode | Release


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage; `cached` when its result was already known."""

    stage: str
    seconds: float
    cached: bool = False


@dataclass(frozen=True)
class Ready:
    """First message of a core: the model is loaded."""

    model: ModelInfo


@dataclass(frozen=True)
class Conditioned:
    """Answer to Condition. `tokens_used` and `tokens_uniform` are per forward and row."""

    timings: tuple[StageTime, ...]
    tokens_used: int
    tokens_uniform: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Stepped:
    """Answer to Step."""

    step: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Decoded:
    """Answer to Decode: frames `first` to `first + count` of `total` are in the buffer."""

    first: int
    count: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Released:
    """Answer to Release."""


@dataclass(frozen=True)
class Failure:
    """Answer to a call that failed. After a fatal one the core ends itself: its device is not to be trusted."""

    kind: Literal["model", "memory", "request", "internal"]
    message: str
    fatal: bool = False


Answer: TypeAlias = Ready | Conditioned | Stepped | Decoded | Released | Failure
