"""What the engine core does in one step, recorded by torch's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cinecat.engines.errors import EngineError


@contextlib.contextmanager
def recorded(path: str) -> Iterator[None]:
    """Records the block and writes it to a gzipped Chrome trace, which Perfetto opens, once it has ended well; does
    nothing without a path.

    Raises:
        EngineError: the file cannot be written.
    """
    if not path:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        yield
    target = Path(path)
    staging = target.with_name(f".{target.name}")  # its ending makes it gzipped
    try:
        profiler.export_chrome_trace(str(staging))
        staging.rename(target)
    except (OSError, RuntimeError) as error:
        staging.unlink(missing_ok=True)
        raise EngineError(f"profile_dir: {target} cannot be written: {error}") from error
