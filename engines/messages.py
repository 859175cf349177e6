"""What the front and the engine core say to each other: plain data, no torch, pickled over a pipe.

The front sends one call and reads one answer. The calls on one request come in the order Condition, Step until done,
Decode until done, Release; Save may come between any two of them, Release at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

FrameDtype: TypeAlias = Literal["uint8", "float32"]
Offload: TypeAlias = Literal["none", "encoders", "blocks"]
StorageDtype: TypeAlias = Literal["none", "float8_e4m3fn"]
ShardWeights: TypeAlias = Literal["none", "fsdp"]

VAE_TEMPORAL_STRIDE = 4


@dataclass(frozen=True)
class CoreConfig:
    """Everything the core needs to start.

    Attributes:
        model: as in `checkpoint.find_checkpoint`.
        device: "auto", "auto:N" (the GPU of that number where there are GPUs), "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16": of the transformer and the text encoder.
        threads: CPU threads for torch; 0 leaves it to torch.
        style_slots: styles resident at once.
        max_rank: LoRA rank that a slot holds, summed over the styles that share it.
        cache_bytes: bound of the prompt, image and condition caches together.
        style_cache_bytes: bound of the styles that are kept in memory as read, besides those in slots.
        model_variant: path of a file whose changes are fused into the transformer; empty for none.
        engine: the backend: "auto", "torch" or a name of `backends.choice.BACKENDS`.
        missing_engine: what to do while the engine is not built: "refuse", "torch" (serve from torch and build it), or
            "auto", which is torch where memory for the weights twice is free.
        engine_sizes: (width, height, frames) of clips that engines of fixed shapes are built for.
        engine_options: of the backend, as its `Options` reads them.
        engine_cache_dir: where engines are kept; empty for the default.
        engine_cache_bytes: of all of them at most; 0 is no limit.
        offload: what is in the host's memory while it does not work: "none", "encoders" (of text and image) or "blocks"
            (of the transformer, and the encoders).
        storage_dtype: that the matrices of the blocks are kept in; "none" is `dtype`.
        shard: how ranks share the work, as `sharding.layout.parse_layout` reads it.
        shard_weights: "fsdp" spreads the blocks' weights over the ranks of a sequence.
        rank_timeout_seconds: without a sign of life, after which a rank is taken for dead.
        log_format, log_level: as `logs.configure_logging` takes them.
    """

    model: str
    device: str
    dtype: str
    threads: int
    style_slots: int
    max_rank: int
    cache_bytes: int
    style_cache_bytes: int = 0
    model_variant: str = ""
    engine: str = "torch"
    missing_engine: Literal["auto", "refuse", "torch"] = "auto"
    engine_sizes: tuple[tuple[int, int, int], ...] = ()
    engine_options: tuple[str, ...] = ()
    engine_cache_dir: str = ""
    engine_cache_bytes: int = 0
    offload: Offload = "none"
    storage_dtype: StorageDtype = "none"
    shard: str = "none"
    shard_weights: ShardWeights = "none"
    rank_timeout_seconds: float = 60.0
    log_format: Literal["console", "json"] = "console"
    log_level: str = "info"


@dataclass(frozen=True)
class ModelInfo:
    """What the front tells clients about the loaded model, and checks requests against.

    Attributes:
        fingerprint: changes with the weights, and with what is fused into them.
        size_multiple: width and height are multiples of this many pixels.
        style_targets: (in, out) features of every linear that a style may change, by module path.
        other_targets: the same of linears and convolutions outside the blocks, where no style reaches; a convolution
            counts channels times the sizes of its kernel as what goes in.
        max_frames: longest clip that the transformer's position table holds.
        max_size: largest width or height that the position table holds, in pixels.
        shift: of the noise schedule, where a request gives none.
        variant: file name of the model variant that is fused into the transformer; empty for none.
        buckets: most rows, and tokens of each, of the only shapes that run; empty where all do.
        state_bytes: that requests may hold together, beside what a forward or a decode works with; 0 is no bound.
        ranks: that share the work.
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
    shift: float = 1.0
    other_targets: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    variant: str = ""
    buckets: tuple[tuple[int, int], ...] = ()
    state_bytes: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class StyleUse:
    """A style worn by a request: a LoRA file, its content hash and its strength."""

    path: str
    fingerprint: str
    strength: float


@dataclass(frozen=True)
class Cat:
    """Content-adaptive tokens, and what limits them: one of the two is set.

    Attributes:
        keep_ratio: tokens over those of the uniform path, mean over all steps, above 0, at most 1.
        target_psnr_db: PSNR to the uniform result, in dB, from which the keep ratio follows.
    """

    keep_ratio: float | None = None
    target_psnr_db: float | None = None

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.target_psnr_db is None):
            raise ValueError(f"{self}: takes a keep ratio or a target")


@dataclass(frozen=True)
class Shot:
    """A validated request.

    Attributes:
        image: first frame, uint8 [height, width, 3], sRGB; its shape is the clip's size.
        frames: 4k + 1.
        seed: 0 to 2^63 - 1.
        shift: of the noise schedule; None is the model's own.
        cat: None is the uniform path.
        run_steps: how many steps run the model, 2 to `steps`, while the others carry its predictions on; None for all.
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
    shift: float | None = None
    cat: Cat | None = None
    run_steps: int | None = None

    def __post_init__(self) -> None:
        if self.run_steps is None:
            return
        if not 2 <= self.run_steps <= self.steps:
            raise ValueError(f"run_steps: {self.run_steps} is not between 2 and {self.steps}")
        if self.cat is not None:
            raise ValueError("run_steps: cannot go with cat")


@dataclass(frozen=True)
class Condition:
    """Encode prompt and image, and draw the starting noise or go on from a checkpoint.

    Attributes:
        checkpoint: path of what Save wrote for the request; a file that is not there, or is not of this shot, model and
            solver, is no checkpoint, and the request starts with noise.
    """

    shot: Shot
    checkpoint: str = ""


@dataclass(frozen=True)
class StepShape:
    """What a step runs on. Steps of one shape may share a forward.

    Attributes:
        engine: the backend.
        tokens: of each row; 0 for a cached step, which runs no forward.
        merged: whether tokens stand for several patches.
        most_rows: that the engine takes in one forward; 0 for any number.
    """

    engine: str
    tokens: int
    merged: bool = False
    most_rows: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Step:
    """Run one denoising step of every request named, in one forward (or, with guidance, two).

    Attributes:
        job_ids: one, or several whose coming steps have one StepShape.
        previews: those of them whose clean prediction is wanted as pictures.
        profile: of the file that gets a recording of the step, as `profiling.recorded` makes it; empty for none. A
            recording that cannot be written is a note in the log.
    """

    job_ids: tuple[str, ...]
    previews: frozenset[str] = frozenset()
    profile: str = ""


@dataclass(frozen=True)
class Save:
    """Write a request's checkpoint, at once or not at all: what its steps have made so far.

    Attributes:
        path: of the file; one that is there is replaced.
    """

    job_id: str
    path: str


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


@dataclass(frozen=True)
class Warm:
    """Make a style resident; its strength does not matter."""

    style: StyleUse


Call: TypeAlias = Condition | Step | Save | Decode | Release | Warm


@dataclass(frozen=True)
class ResidentStyle:
    """What a slot holds: one style, or several stacked.

    Attributes:
        fingerprints: of the styles.
        size_bytes: of the slot, whatever it holds.
    """

    slot: int
    fingerprints: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class SlotMemory:
    """Comes before Ready: the memory that the style slots are about to take.

    Attributes:
        style_slots, max_rank: the settings that it comes from.
        size_bytes: of all banks, the slot for "no style" included.
        available_bytes: what the device has left; None where that cannot be told.
    """

    device: str
    style_slots: int
    max_rank: int
    size_bytes: int
    available_bytes: int | None


@dataclass(frozen=True)
class VariantFused:
    """Comes before Ready: a model variant is in the transformer.

    Attributes:
        name: of its file.
        parameters: how many it changed.
        ignored: how many tensors of the file change nothing.
    """

    name: str
    parameters: int
    ignored: int


@dataclass(frozen=True)
class EngineCacheEvent:
    """Something happened in the cache of engines: one of `store_events.Outcome`; `seconds` is what a build took."""

    outcome: str
    seconds: float = 0.0


@dataclass(frozen=True)
class EngineNews:
    """What became of the engine, in a sentence for the log, and whether one is being built.

    Comes before Ready, and later with Conditioned.
    """

    sentence: str
    building: bool


@dataclass(frozen=True)
class WaitsForRoom:
    """Comes before Ready, from an executor that places cores on machines: none has room for one.

    Attributes:
        needs: what it takes, in words.
    """

    needs: str


@dataclass(frozen=True)
class CorePlaced:
    """Comes before Ready, from such an executor: where the core is.

    Attributes:
        node: the machine's address.
        pid: of the core there.
    """

    node: str
    pid: int


Notice: TypeAlias = SlotMemory | VariantFused | EngineNews | EngineCacheEvent | WaitsForRoom | CorePlaced


@dataclass(frozen=True)
class CoreMemory:
    """Bytes, of the core's process and its device; 0 where that cannot be told.

    Attributes:
        resident_bytes: of the process, on the host.
        allocated_bytes: of the device, by torch; on a CPU that is `resident_bytes`.
        peak_bytes: the most that was allocated.
        available_bytes: of the device, that can still be taken.
    """

    resident_bytes: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0
    available_bytes: int = 0


@dataclass(frozen=True)
class SlotUse:
    """What one call did with the style slots.

    Attributes:
        hits: styles or stacks that were found resident.
        evictions: that gave way.
        swap_seconds: of each that was made resident.
    """

    hits: int = 0
    evictions: int = 0
    swap_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage; `cached` when its result was already known."""

    stage: str
    seconds: float
    cached: bool = False


@dataclass(frozen=True)
class Ready:
    """The model is loaded; only notices come before."""

    model: ModelInfo


@dataclass(frozen=True)
class Conditioned:
    """Answer to Condition.

    Attributes:
        tokens_uniform: what the uniform path spends per forward and row.
        resident: what is in the slots now.
        engine: the backend that all steps of the request will run on.
        slots: what was done with the style slots.
        news: what became of the engine since the last answer.
        rows: of the request in a forward.
        state_bytes: that the request holds on the device until Release, beside what a forward or a decode works with.
        decode_bytes: that it holds besides from its first Decode on.
        next: shape of the coming step; None where all are done.
        step_tokens: of the steps that were done before the checkpoint, in order; empty without one.
        keep_ratio: that the clip is held to, as in RequestStepped.
    """

    timings: tuple[StageTime, ...]
    tokens_uniform: int
    notes: tuple[str, ...]
    resident: tuple[ResidentStyle, ...] = ()
    engine: str = "torch"
    slots: SlotUse = SlotUse()
    news: tuple[EngineNews | EngineCacheEvent, ...] = ()
    rows: int = 1
    state_bytes: int = 0
    decode_bytes: int = 0
    next: StepShape | None = None
    step_tokens: tuple[int, ...] = ()
    keep_ratio: float = 1.0
    memory: CoreMemory = CoreMemory()


@dataclass(frozen=True)
class RequestStepped:
    """What a Step did for one request.

    Attributes:
        step: how many it has done, of `total`.
        tokens: that it spent, per forward and row; 0 for a cached step.
        plan_seconds: spent on planning.
        keep_ratio: that the clip is held to; with a target, 1 until it is chosen after the first step.
        next: shape of the coming step; None after the last.
        preview: the clean prediction in colours, uint8 [latent frames, h, w, 3], where it was asked for.
    """

    job_id: str
    step: int
    total: int
    tokens: int
    plan_seconds: float = 0.0
    keep_ratio: float = 1.0
    next: StepShape | None = None
    preview: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Stepped:
    """Answer to Step.

    Attributes:
        seconds: of all of it, planning included.
        requests: one of each request, in the order of the call. A Failure is that request's own, such as NaN in its
            latents, and the others went on; what fails the forward as a whole answers Failure instead of Stepped, and
            then no request has changed.
        communication_seconds: that the first rank spent in exchanges with others since it last said so.
        communication_bytes: that it sent them.
    """

    seconds: float
    requests: tuple[RequestStepped | Failure, ...]
    communication_seconds: float = 0.0
    communication_bytes: int = 0


@dataclass(frozen=True)
class Saved:
    """Answer to Save."""

    seconds: float
    size_bytes: int


@dataclass(frozen=True)
class Decoded:
    """Answer to Decode: frames `first` to `first + count` of `total` are in the buffer.

    Attributes:
        communication_seconds, communication_bytes: as in Stepped.
    """

    first: int
    count: int
    total: int
    seconds: float
    memory: CoreMemory = CoreMemory()
    communication_seconds: float = 0.0
    communication_bytes: int = 0


@dataclass(frozen=True)
class Released:
    """Answer to Release."""


@dataclass(frozen=True)
class Warmed:
    """Answer to Warm: what is in the slots now, and what was done with them."""

    resident: tuple[ResidentStyle, ...]
    slots: SlotUse = SlotUse()


@dataclass(frozen=True)
class Failure:
    """Answer to a call that failed. After a fatal one the core ends itself: its device is not to be trusted.

    Attributes:
        kind: "died" is said on behalf of a core that can say nothing any more; it is fatal.
    """

    kind: Literal["model", "memory", "slots", "request", "internal", "died"]
    message: str
    fatal: bool = False


Answer: TypeAlias = Ready | Conditioned | Stepped | Saved | Decoded | Released | Warmed | Failure
