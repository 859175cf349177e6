"""Clips decoded in bands by four processes, and what each of them saw of it, left in a folder."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, distributed

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import load_vae
from cinecat.engines.sharding.vae import BandDecoder
from tests.engines.samples import small_vae

PROCESSES = 4


@dataclass(frozen=True)
class Case:
    """Clips that are decoded in turn.

    Attributes:
        shape: of each one's latents.
        members: the processes that are the ranks.
    """

    shape: tuple[int, int, int, int, int]
    members: tuple[int, ...] = (0, 1, 2, 3)
    wan_tiny: bool = False
    dtype: torch.dtype = torch.float32
    clips: int = 1

    def vae(self) -> AutoencoderKLWan:
        vae = load_vae(find_checkpoint("wan-tiny"), "cpu") if self.wan_tiny else small_vae()
        return vae if self.dtype == torch.float32 else vae.to(self.dtype)

    def latents(self) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        return [torch.randn(self.shape, generator=draw) for _ in range(self.clips)]


CASES = {
    "uneven bands of four ranks": Case((1, 16, 4, 9, 6)),
    "uneven bands of two ranks": Case((1, 16, 4, 9, 6), members=(1, 3)),
    "wan-tiny": Case((1, 16, 3, 9, 8), wan_tiny=True),
    "fewer rows than ranks": Case((1, 16, 3, 3, 5)),
    "bfloat16": Case((1, 16, 2, 5, 4), members=(0, 2), dtype=torch.bfloat16),
    "two clips in turn": Case((1, 16, 3, 4, 4), members=(0, 1), clips=2),
}


class Sent(Counter[str]):
    def add(self, kind: str, nbytes: int) -> None:
        self[kind] += nbytes


def decode_everywhere(folder: Path, cases: dict[str, Case], seconds: float) -> None:
    """Of each case and rank a file `{case} {rank}.pt`: each clip's chunks, bytes sent by
    kind, bytes held for each clip, and those of the process that decoding took besides, at most.

    Raises:
        RuntimeError: a process failed, or was not done in that time and was ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once what takes seconds
    processes = [
        context.Process(target=_process, args=(index, folder, cases, seconds), daemon=True)
        for index in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    until, codes = time.monotonic() + seconds, [process.exitcode for process in processes]
    while None in codes and not any(codes) and time.monotonic() < until:
        time.sleep(0.05)
        codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if any(code != 0 for code in codes):
        raise RuntimeError(f"exit codes of the ranks: {codes}; None is one that had not ended")


def _process(index: int, folder: Path, cases: dict[str, Case], seconds: float) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=index, world_size=PROCESSES, timeout=timeout
    )
    for name, case in cases.items():
        group = distributed.new_group(list(case.members), timeout=timeout)
        if index in case.members:
            rank = case.members.index(index)
            torch.save(_decode(case, group, rank), folder / f"{name} {rank}.pt")
    distributed.destroy_process_group()


@torch.inference_mode()
def _decode(case: Case, group: distributed.ProcessGroup, rank: int) -> dict[str, Any]:
    vae, sent, before = case.vae(), Sent(), _most_bytes()
    decoders = [
        BandDecoder.start(vae, None if rank else latents, group, rank, len(case.members), sent)
        for latents in case.latents()
    ]
    chunks: list[list[Tensor | None]] = [[] for _ in decoders]
    while decoders[0].frame < decoders[0].total_frames:
        for decoder, parts in zip(decoders, chunks, strict=True):
            parts.append(decoder.next_frames())
    held = [_held(decoder) for decoder in decoders]
    return {"chunks": chunks, "sent": dict(sent), "held": held, "most": _most_bytes() - before}


def _most_bytes() -> int:
    """Of this process alone, so far; 0 where Linux's /proc is not to be read."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _held(decoder: BandDecoder) -> int:
    pasts = [memory.past for memory in decoder._stream.memories if memory.past is not None]
    return sum(tensor.nbytes for tensor in [decoder._band, *pasts])
