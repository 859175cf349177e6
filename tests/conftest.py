"""What tests of several rooms share: small images."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

# Before anything imports torch: tests share few CPUs with each other and with the servers that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests start without engines, whatever was built on this machine.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cinecat-tests-")

# On a busy machine an example takes as long as it takes.
settings.register_profile("cinecat", deadline=None)
settings.load_profile("cinecat")


@pytest.fixture(scope="session")
def photograph() -> Path:
    """The example image, 451x300."""
    return Path(__file__).parents[1] / "server" / "examples" / "chelsea.png"


@pytest.fixture(scope="session")
def frame() -> NDArray[np.uint8]:
    """A first frame that needs no fitting at 64x64: uint8 [64, 64, 3]."""
    return np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def frame_png(frame: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()
