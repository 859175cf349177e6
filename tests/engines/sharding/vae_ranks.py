"""Clips decoded in bands by several processes, and what each of them saw of it, left in a folder."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.model import load_vae
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.ranks import Ranks, open_store
from cinecat.engines.sharding.vae import BandDecoder
from tests.engines.samples import small_vae


@dataclass(frozen=True)
class Case:
    """Clips that are decoded in turn, with latents of one shape."""

    shape: tuple[int, int, int, int, int]
    ranks: int = 4
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
    "uneven bands of two ranks": Case((1, 16, 4, 9, 6), ranks=2),
    "wan-tiny": Case((1, 16, 3, 9, 8), wan_tiny=True),
    "fewer rows than ranks": Case((1, 16, 3, 3, 5)),
    "bfloat16": Case((1, 16, 2, 5, 4), ranks=2, dtype=torch.bfloat16),
    "two clips in turn": Case((1, 16, 3, 4, 4), ranks=2, clips=2),
}


def decode_everywhere(folder: Path, cases: dict[str, Case], seconds: float) -> None:
    """Of each case and rank a file `{case} {rank}.pt`: each clip's chunks, bytes sent by kind, bytes held for each
    clip, and by how many the process grew.

    Raises:
        RuntimeError: a process failed, or was not done in that time and was ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once what takes seconds
    groups = {case.ranks: open_store(Layout(ulysses=case.ranks)) for case in cases.values()}
    processes = []
    for count, store in groups.items():
        theirs = {name: case for name, case in cases.items() if case.ranks == count}
        for rank in range(count):
            args = (rank, count, store.port, folder, theirs, seconds)
            processes.append(context.Process(target=_process, args=args, daemon=True))
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


def _process(rank: int, count: int, port: int, folder: Path, cases: dict[str, Case], seconds: float) -> None:
    torch.set_num_threads(1)
    layout = Layout(ulysses=count)
    ranks = Ranks(layout, rank, torch.device("cpu"), open_store(layout, port), seconds)
    for name, case in cases.items():
        torch.save(_decode(case, ranks), folder / f"{name} {rank}.pt")
    ranks.close()


@torch.inference_mode()
def _decode(case: Case, ranks: Ranks) -> dict[str, Any]:
    vae, before = case.vae(), _most_bytes()
    decoders = [BandDecoder.start(vae, latents if ranks.leads else None, ranks) for latents in case.latents()]
    chunks: list[list[Tensor | None]] = [[] for _ in decoders]
    while decoders[0].frame < decoders[0].total_frames:
        for decoder, parts in zip(decoders, chunks, strict=True):
            parts.append(decoder.next_frames())
    sent, held = dict(ranks.take_traffic().sent), [_held(decoder) for decoder in decoders]
    return {"chunks": chunks, "sent": sent, "held": held, "most": _most_bytes() - before}


def _most_bytes() -> int:
    """Of this process alone, so far; 0 where Linux's /proc is not to be read."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _held(decoder: BandDecoder) -> int:
    pasts = [memory.past for memory in decoder._stream.memories if memory.past is not None]
    return sum(tensor.nbytes for tensor in [decoder._band, *pasts])
