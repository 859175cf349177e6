"""What ListModels tells, as a client reads it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinecat.catalog import model_from_proto
from cinecat.engines.errors import ModelError
from cinecat.engines.tokens.grid import Grid
from cinecat.server.models import describe_model, fitting_model, token_grid, tokens_of_steps
from cinecat.server.settings import Settings
from cinecat.v1 import clip_pb2, models_pb2
from tests.server.samples import model, model_info


def test_a_model_tells_its_fingerprint_and_what_is_fused_into_it() -> None:
    info = replace(model_info(), name="wan-tiny+four-steps", variant="four-steps", fingerprint="f" * 16)
    model = model_from_proto(describe_model(info, Settings()))
    assert (model.name, model.variant, model.fingerprint) == ("wan-tiny+four-steps", "four-steps", "f" * 16)


def sized(name: str, size: str) -> models_pb2.Model:
    return describe_model(replace(model_info(), name=name), Settings(default_size=size))


@pytest.mark.parametrize(
    ("size", "chosen"),
    [
        (None, "first"),
        ((64, 64), "small"),
        ((64, 65), "first"),
        ((128, 128), "first"),
        ((129, 128), "large"),
        ((256, 512), "large"),
    ],
)
def test_the_size_of_a_clip_chooses_the_smallest_model_that_covers_it(
    size: tuple[int, int] | None, chosen: str
) -> None:
    served = [sized("first", "128x128x17"), sized("large", "256x256x5"), sized("small", "64x64x5")]
    clip = clip_pb2.ClipSpec() if size is None else clip_pb2.ClipSpec(width=size[0], height=size[1])
    assert served[fitting_model(served, clip)].name == chosen


def test_of_models_of_one_size_the_first_is_chosen() -> None:
    served = [sized("a", "128x128x17"), sized("b", "128x128x17")]
    for side in (64, 512):
        assert fitting_model(served, clip_pb2.ClipSpec(width=side, height=side)) == 0


@pytest.mark.parametrize(
    ("name", "size"), [("Wan2.1-I2V-14B-720P-Diffusers", (1280, 720)), ("Wan2.1-I2V-14B-480P-Diffusers", (832, 480))]
)
def test_a_checkpoint_of_wan_has_the_size_that_it_was_trained_on(name: str, size: tuple[int, int]) -> None:
    info = replace(model_info(), name=name, family="wan2.1-i2v-14b", device="cuda")
    defaults = describe_model(info, Settings()).defaults
    assert (defaults.width, defaults.height, defaults.frames) == (*size, 81)


@pytest.mark.parametrize("size", ["100x128x17", "128x100x17", "128x128x16"])
def test_a_default_size_that_is_none_of_the_models_is_refused(size: str) -> None:
    with pytest.raises(ModelError, match=f"default_size: {size} is no size of wan-tiny"):
        sized("wan-tiny", size)


def test_a_model_offers_both_ways_to_tokenize() -> None:
    assert model_from_proto(model()).tokenizations == ("uniform", "cat")


def test_the_steps_of_a_clip_spend_what_its_tokenization_says() -> None:
    clip = clip_pb2.ClipSpec(width=128, height=96, frames=17, steps=4)
    grid = token_grid(model(), clip)
    assert grid == Grid(5, 6, 8)
    assert tokens_of_steps(grid, clip) == (240,) * 4
    clip.run_steps = 2
    assert tokens_of_steps(grid, clip) == (240, 0, 0, 240)
    clip.ClearField("run_steps")
    clip.tokenization.keep_ratio = 0.5
    first, *others = tokens_of_steps(grid, clip)
    assert first == 240
    assert max(others) <= 120
    clip.tokenization.target_psnr_db = 40.0
    assert tokens_of_steps(grid, clip) == (240,) * 4
