"""Weights that metrics need and that only a user can bring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cinecat.engines.errors import EngineError


class WeightsError(EngineError):
    """Weights of a metric that cannot be used; the message names the option and what is wrong."""


@dataclass(frozen=True)
class Weights:
    """Where they are; None for a metric that is to be reported as unavailable.

    Attributes:
        lpips: a file, as `load_lpips` reads it.
        fvd: a file, as `load_fvd` reads it.
        clip: a folder, as `load_clip_similarity` reads it.
    """

    lpips: Path | None = None
    fvd: Path | None = None
    clip: Path | None = None
