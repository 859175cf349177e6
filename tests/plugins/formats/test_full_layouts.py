"""Every key of whole 40-layer files lands on the module of WanTransformer3DModel that it was trained for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from cinecat.plugins.formats.names import diffusers_module, flat_module, original_module
from cinecat.plugins.lora import LoraShape, inspect_lora
from cinecat.plugins.variant import read_variant
from tests.plugins.formats.layouts import (
    I2V_14B,
    RANK,
    Shapes,
    comfy_keys,
    diffsynth_keys,
    kohya_keys,
    lora_keys,
    original_parameters,
    projections,
    step_distill_keys,
    write_hollow,
)

PARAMETERS = original_parameters(I2V_14B)


@pytest.fixture(scope="module")
def model() -> Shapes:
    """The parameters of the 14B I2V transformer, by diffusers' names."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=40,
            attention_head_dim=128,
            in_channels=36,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=13824,
            num_layers=40,
            image_dim=1280,
            added_kv_proj_dim=5120,
        )
    return {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}


@pytest.fixture(scope="module")
def renamed() -> dict[str, str]:
    """diffusers' name of every original parameter, by diffusers' own converter of whole checkpoints."""
    converted = convert_wan_transformer_to_diffusers({name: name for name in PARAMETERS})
    return {original: diffusers for diffusers, original in converted.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "film.safetensors"


def _expected(model: Shapes) -> dict[str, LoraShape]:
    return {module: LoraShape(RANK, math.prod(shape[1:]), shape[0]) for module, shape in projections(model).items()}


def test_the_patterns_are_those_of_the_model(model: Shapes, renamed: dict[str, str]) -> None:
    assert {renamed[name]: shape for name, shape in PARAMETERS.items()} == model


def test_every_original_module_has_its_diffusers_name(renamed: dict[str, str]) -> None:
    modules = {name.rpartition(".")[0]: diffusers.rpartition(".")[0] for name, diffusers in renamed.items()}

    ours = {name: found.path for name in modules if (found := original_module(name)) is not None}
    flat = {name: found.path for name in modules if (found := flat_module(name.replace(".", "_"))) is not None}

    assert ours == modules
    assert flat == modules


def test_every_diffusers_module_keeps_its_name(model: Shapes) -> None:
    modules = {name.rpartition(".")[0] for name in model if name != "scale_shift_table"}

    ours = {name: found.path for name in modules if (found := diffusers_module(name)) is not None}
    flat = {name: found.path for name in modules if (found := flat_module(name.replace(".", "_"))) is not None}

    assert ours == {name: name for name in modules}
    assert flat == {name: name for name in modules}


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (comfy_keys(PARAMETERS), "wan"),
        (comfy_keys(PARAMETERS, alpha=True), "wan"),
        (lora_keys(projections(PARAMETERS), "diffusion_model."), "wan"),
        (lora_keys(projections(PARAMETERS), "pipe.dit."), "wan"),
        (diffsynth_keys(PARAMETERS), "wan"),
        (kohya_keys(PARAMETERS), "kohya"),
        (kohya_keys(PARAMETERS, "lora_unet__"), "kohya"),
    ],
    ids=["comfy", "comfy-alpha", "comfy-peft", "pipe-dit", "diffsynth", "musubi", "videox-fun"],
)
def test_every_key_with_original_names_lands_on_its_module(path: Path, model: Shapes, keys: Shapes, name: str) -> None:
    header = inspect_lora(write_hollow(path, keys))

    assert header.targets == _expected(model)
    assert (header.format, header.ignored) == (name, ())


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "diffusion_model."])
def test_every_key_with_diffusers_names_lands_on_its_module(path: Path, model: Shapes, prefix: str) -> None:
    header = inspect_lora(write_hollow(path, lora_keys(projections(model), prefix)))

    assert header.targets == _expected(model)
    assert (header.format, header.ignored) == ("diffusers", ())


def test_every_key_with_flat_diffusers_names_lands_on_its_module(path: Path, model: Shapes) -> None:
    header = inspect_lora(write_hollow(path, kohya_keys(model, "lycoris_")))

    assert header.targets == _expected(model)
    assert (header.format, header.ignored) == ("kohya", ())


def test_every_key_of_a_step_distill_file_lands_on_its_parameter(path: Path, model: Shapes) -> None:
    header = read_variant(write_hollow(path, step_distill_keys(PARAMETERS)))

    factors = {name: shape for name, shape in _expected(model).items() if name != "patch_embedding"}
    assert header.targets == factors
    assert header.differences == {name: model[name] for name in model.keys() - {f"{name}.weight" for name in factors}}
    assert header.parameters == set(model)
    assert (header.format, header.ignored) == ("step-distill", ())
