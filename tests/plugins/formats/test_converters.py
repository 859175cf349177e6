"""Small files in each format against what diffusers makes of them, where diffusers is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)

from cinecat.plugins.lora import inspect_lora, load_lora
from cinecat.plugins.variant import load_variant, read_variant
from tests.plugins.formats.layouts import (
    SMALL,
    Shapes,
    comfy_keys,
    difference_keys,
    diffsynth_keys,
    kohya_keys,
    lora_keys,
    original_parameters,
    projections,
    random_tensors,
    step_distill_keys,
    write_tensors,
)

PARAMETERS = original_parameters(SMALL)
BLOCKS = {name: shape for name, shape in PARAMETERS.items() if name.startswith("blocks.")}
# diffusers raises on LoRA factors of the patch embedding.
WITHOUT_PATCHES = {name: shape for name, shape in PARAMETERS.items() if not name.startswith("patch_embedding")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "film.safetensors"


def _deltas(path: Path) -> dict[str, torch.Tensor]:
    return {module: b @ a for module, (a, b) in load_lora(path).items()}


def _converted_deltas(converted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    modules = {key.removesuffix(".lora_A.weight") for key in converted if key.endswith(".lora_A.weight")}
    return {
        module.removeprefix("transformer."): converted[f"{module}.lora_B.weight"] @ converted[f"{module}.lora_A.weight"]
        for module in modules
    }


@pytest.mark.parametrize(
    "keys",
    [
        comfy_keys(WITHOUT_PATCHES),
        comfy_keys(BLOCKS, alpha=True),
        lora_keys(projections(WITHOUT_PATCHES), "diffusion_model."),
    ],
    ids=["lora_down", "alpha", "lora_A"],
)
def test_original_names_change_what_they_change_in_diffusers(path: Path, keys: Shapes) -> None:
    tensors = random_tensors(keys)

    write_tensors(path, tensors)

    expected = _converted_deltas(_convert_non_diffusers_wan_lora_to_diffusers(dict(tensors)))
    torch.testing.assert_close(_deltas(path), expected)


def test_diffsynth_names_change_what_prefixed_ones_do(path: Path) -> None:
    tensors = random_tensors(diffsynth_keys(WITHOUT_PATCHES))
    prefixed = {f"diffusion_model.{key.replace('.default', '')}": tensor for key, tensor in tensors.items()}

    write_tensors(path, tensors)

    torch.testing.assert_close(_deltas(path), _converted_deltas(_convert_non_diffusers_wan_lora_to_diffusers(prefixed)))


def test_musubi_names_change_what_they_change_in_diffusers(path: Path) -> None:
    tensors = random_tensors(kohya_keys(BLOCKS))

    write_tensors(path, tensors)

    torch.testing.assert_close(_deltas(path), _converted_deltas(_convert_musubi_wan_lora_to_diffusers(dict(tensors))))


def test_step_distill_factors_and_biases_change_what_they_change_in_diffusers(path: Path) -> None:
    tensors = random_tensors(step_distill_keys(PARAMETERS))

    write_tensors(path, tensors)

    converted = _convert_non_diffusers_wan_lora_to_diffusers(dict(tensors))
    changes = {change.parameter: change.values for change in load_variant(path)}
    deltas = {
        name.removesuffix(".weight"): values[1] @ values[0]
        for name, values in changes.items()
        if isinstance(values, tuple)
    }
    biases = {
        key.removeprefix("transformer.").replace("lora_B.bias", "bias"): tensor
        for key, tensor in converted.items()
        if key.endswith(".lora_B.bias")
    }
    torch.testing.assert_close(deltas, _converted_deltas(converted))
    torch.testing.assert_close({name: changes[name] for name in biases}, biases)


def test_an_attention_only_file_loads_where_diffusers_raises_a_key_error(path: Path) -> None:
    attention = {name: shape for name, shape in BLOCKS.items() if "_attn." in name}
    tensors = random_tensors(kohya_keys(attention))

    write_tensors(path, tensors)

    with pytest.raises(KeyError):
        _convert_musubi_wan_lora_to_diffusers(dict(tensors))
    assert inspect_lora(path).targets.keys() == {
        f"blocks.{block}.{linear}"
        for block in (0, 1)
        for linear in (
            *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
            "attn2.add_k_proj",
            "attn2.add_v_proj",
        )
    }


def test_block_indices_are_read_where_diffusers_counts_blocks(path: Path) -> None:
    sparse = original_parameters(SMALL, blocks=(7, 31))
    tensors = random_tensors(kohya_keys({name: shape for name, shape in sparse.items() if name.startswith("blocks.")}))

    write_tensors(path, tensors)

    with pytest.raises(KeyError):
        _convert_musubi_wan_lora_to_diffusers(dict(tensors))
    assert {name.split(".")[1] for name in inspect_lora(path).targets} == {"7", "31"}


def test_an_alpha_per_layer_is_not_taken_for_the_rank(path: Path) -> None:
    down, up = torch.ones(4, 6), torch.ones(6, 4)
    name = "lora_unet_blocks_0_self_attn_"
    tensors = {f"{name}{linear}.lora_down.weight": down for linear in "qk"}
    tensors |= {f"{name}{linear}.lora_up.weight": up for linear in "qk"}
    tensors |= {f"{name}q.alpha": torch.tensor(1.0), f"{name}k.alpha": torch.tensor([2.0])}

    write_tensors(path, tensors)

    deltas = _deltas(path)
    assert deltas["blocks.0.attn1.to_q"].unique().tolist() == [1.0]
    assert deltas["blocks.0.attn1.to_k"].unique().tolist() == [2.0]


def test_differences_of_norms_and_modulations_are_kept_where_diffusers_drops_them(path: Path) -> None:
    keys = step_distill_keys(PARAMETERS)

    write_tensors(path, random_tensors(keys))

    converted = _convert_non_diffusers_wan_lora_to_diffusers(random_tensors(keys))
    assert not [key for key in converted if "norm" in key or "scale_shift" in key]
    differences = read_variant(path).differences
    assert len(differences) == len(difference_keys(PARAMETERS))
    assert {"blocks.1.norm2.bias", "blocks.1.attn2.norm_added_k.weight", "blocks.1.scale_shift_table"} <= set(
        differences
    )
