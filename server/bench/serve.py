"""`cinecat bench serve`: what serving over gRPC costs beside a bare diffusers pipeline in one process.

Both sides make the same clip from the same fresh image and prompt, with the same files, threads and dtype, and write
the same mp4 by the same writer; ours through a real server in other processes and a download. Right after it, the same
shot is asked for again: what the caches by content save.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cinecat import Client
from cinecat.server.artifacts import ArtifactFormat
from cinecat.server.bench.harness import Report, interleave, ratio_check
from cinecat.server.local_server import running_server
from cinecat.server.mux import ClipShape, clip_metadata, exact_rate, open_writer

_GOAL = 1.05
_PAIRS, _QUICK_PAIRS = 15, 3


@dataclass(frozen=True)
class _Work:
    """The fixed work of one pair."""

    width: int = 128
    height: int = 128
    frames: int = 17
    steps: int = 8
    guidance_scale: float = 3.0
    fps: float = 8.0


def bench_serve(quick: bool, out: Path | None) -> Report:
    """Runs the benchmark; with `out`, writes its samples there as CSV."""
    work = _Work()
    pairs = _QUICK_PAIRS if quick else _PAIRS
    with tempfile.TemporaryDirectory(prefix="cinecat-bench-") as scratch:
        folder = Path(scratch)
        with running_server(folder) as server, Client(server.address) as client:
            through_grpc = _through_grpc(client, work, folder)
            repeats: list[float] = []

            def first_then_again(number: int) -> float:
                first, again = through_grpc(number), through_grpc(number)
                if number >= 0:
                    repeats.append(again)
                return first

            sides = {"diffusers_s": _through_diffusers(work, folder), "grpc_s": first_then_again}
            samples = interleave(sides, pairs, warm_up=1 if quick else 2)
    report = Report(
        bench="serve",
        config={**vars(work), "pairs": pairs, "threads": _threads(), "dtype": "float32", "model": "wan-tiny"},
        samples={**samples, "grpc_repeat_s": repeats},
        results=[],
        checks={
            "grpc_overhead_ratio": ratio_check(samples["grpc_s"], samples["diffusers_s"], at_most=_GOAL),
            "repeat_request_ratio": ratio_check(repeats, samples["grpc_s"]),
        },
    )
    if out is not None:
        report.write_csv(out)
    return report


def _shot(number: int, work: _Work) -> tuple[NDArray[np.uint8], str]:
    """A fresh image, uint8 [height, width, 3], and a fresh prompt."""
    image = np.random.default_rng(number + 1000).integers(0, 256, (work.height, work.width, 3), dtype=np.uint8)
    return image, f"shot number {number} of a cat that looks up"


def _through_grpc(client: Client, work: _Work, folder: Path) -> Callable[[int], float]:
    def measure(number: int) -> float:
        image, prompt = _shot(number, work)
        source = folder / "source.png"
        started = time.perf_counter()
        Image.fromarray(image).save(source, compress_level=1)
        client.generate(
            image=source,
            prompt=prompt,
            width=work.width,
            height=work.height,
            frames=work.frames,
            steps=work.steps,
            guidance=work.guidance_scale,
            fps=work.fps,
            seed=number + 1000,
            output=folder / "ours.mp4",
        ).result()
        return time.perf_counter() - started

    return measure


def _through_diffusers(work: _Work, folder: Path) -> Callable[[int], float]:
    """The reference pipeline on the same checkpoint, loaded once."""
    pipeline = load_reference()

    def measure(number: int) -> float:
        image, prompt = _shot(number, work)
        started = time.perf_counter()
        frames = run_reference(
            pipeline, Image.fromarray(image), prompt, work.frames, work.steps, work.guidance_scale, number + 1000
        )
        shape = ClipShape(work.width, work.height, work.frames, exact_rate(work.fps))
        writer = open_writer(ArtifactFormat.MP4_H264, folder / "theirs.mp4", shape, clip_metadata(prompt, {}))
        writer.write(frames)
        writer.finish()
        return time.perf_counter() - started

    return measure


def load_reference(model: str = "wan-tiny") -> Any:
    """diffusers' own pipeline on a checkpoint, for a CPU and float32."""
    from diffusers import WanImageToVideoPipeline

    from cinecat.engines.checkpoint import find_checkpoint

    pipeline = WanImageToVideoPipeline.from_pretrained(find_checkpoint(model).folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_reference(
    pipeline: Any, image: Image.Image, prompt: str, frames: int, steps: int, guidance_scale: float, seed: int
) -> NDArray[np.float32]:
    """Frames of a clip of the image's size, float32 [frames, height, width, 3] in [0, 1]."""
    import torch

    output = pipeline(
        image=image,
        prompt=prompt,
        negative_prompt="",
        height=image.height,
        width=image.width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
    )
    clip: NDArray[np.float32] = output.frames[0]
    return clip


def _threads() -> int:
    import torch

    return torch.get_num_threads()
