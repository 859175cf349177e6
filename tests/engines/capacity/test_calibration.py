"""Speeds fitted to measured seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cinecat.engines.capacity.calibration import _fit, measure
from cinecat.engines.capacity.speeds import ASSUMED
from cinecat.engines.capacity.work import clip_work
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.memory_plan import Clip, ModelSizes

FEATURES = [(1e9, 1e7, 6.0), (4e9, 2e8, 6.0), (2e10, 4e9, 12.0), (6e10, 3e10, 12.0)]


@given(st.tuples(*(st.floats(0.0, 10.0) for _ in range(3))).filter(any))
def test_costs_that_made_the_seconds_are_found_again(scales: tuple[float, ...]) -> None:
    costs = np.array(scales) * (1e-11, 1e-11, 1e-3)
    seconds = np.array(FEATURES) @ costs
    if (seconds < 1e-6).any():
        return
    assert np.array(FEATURES) @ np.array(_fit(FEATURES, list(seconds))) == pytest.approx(seconds, rel=1e-6)


def test_no_cost_is_negative() -> None:
    seconds = [feature[0] * 1e-11 - feature[2] * 1e-4 for feature in FEATURES]
    assert all(cost >= 0.0 for cost in _fit(FEATURES, seconds))


def test_measuring_tells_every_second_size_from_those_it_was_fitted_to(micro: Path) -> None:
    sizes = ModelSizes.of(find_checkpoint(str(micro)))
    work = clip_work(sizes, Clip(64, 64, 5), 2, 1.0, torch.float32)
    heard: list[float] = []
    found = measure(
        sizes,
        work,
        ASSUMED,
        torch.device("cpu"),
        torch.float32,
        lambda doing, share: heard.append(share),
        longest_seconds=0.0,
        rounds=1,
    )
    steps = [sample for sample in found.samples if sample.what == "step"]
    assert [sample.fitted for sample in steps] == [True, False, True, False, True, False, True]
    assert [sample.tokens for sample in steps] == [80, 125, 180, 320, 500, 720, 1280]
    assert all(sample.measured > 0.0 and sample.reckoned > 0.0 for sample in found.samples)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    speeds = found.speeds
    assert {name for name, source in speeds.sources.items() if source == "measured"} >= {"vae_flops", "layer_seconds"}
    assert speeds.sources["link_bytes"] == "assumed"
    assert speeds.link_bytes == ASSUMED.link_bytes
    assert found.layers == work.model.layers
