"""What ListModels tells, as a client reads it."""

from __future__ import annotations

from dataclasses import replace

from cinecat.catalog import model_from_proto
from cinecat.engines.tokens.grid import Grid
from cinecat.server.models import describe_model, token_grid, tokens_of_steps
from cinecat.server.settings import Settings
from cinecat.v1 import clip_pb2
from tests.server.samples import model, model_info


def test_a_model_tells_its_fingerprint_and_what_is_fused_into_it() -> None:
    info = replace(model_info(), name="wan-tiny+four-steps", variant="four-steps", fingerprint="f" * 16)
    model = model_from_proto(describe_model(info, Settings()))
    assert (model.name, model.variant, model.fingerprint) == ("wan-tiny+four-steps", "four-steps", "f" * 16)


def test_a_model_offers_both_ways_to_tokenize() -> None:
    assert model_from_proto(model()).tokenizations == ("uniform", "cat")


def test_the_steps_of_a_clip_spend_what_its_tokenization_says() -> None:
    clip = clip_pb2.ClipSpec(width=128, height=96, frames=17, steps=4)
    grid = token_grid(model(), clip)
    assert grid == Grid(5, 6, 8)
    assert tokens_of_steps(grid, clip) == (240,) * 4
    clip.tokenization.keep_ratio = 0.5
    first, *others = tokens_of_steps(grid, clip)
    assert first == 240
    assert max(others) <= 120
    clip.tokenization.target_psnr_db = 40.0
    assert tokens_of_steps(grid, clip) == (240,) * 4
