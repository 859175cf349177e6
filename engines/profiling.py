"""What the engine core does in one step, recorded by torch's profiler."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded(path: str) -> Iterator[None]:
    """Records the block and writes it to a gzipped Chrome trace, which Perfetto opens, once it has ended well; does
    nothing without a path. A file that cannot be written costs the block nothing: the log says why.
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
        log.error("profile_dir: %s cannot be written: %s", target, error)
