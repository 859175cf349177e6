"""Files whose changes are fused into the model's weights: what a style may not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from cinecat.plugins.adapter_file import LoraShape
from cinecat.plugins.errors import LoraError
from cinecat.plugins.lora import inspect_lora, load_lora
from cinecat.plugins.variant import ParameterChange, load_variant, read_variant
from tests.plugins.formats.layouts import (
    SMALL,
    difference_keys,
    lora_keys,
    original_parameters,
    random_tensors,
    step_distill_keys,
    write_tensors,
)
from tests.plugins.samples import random_factors, write_lora

PARAMETERS = original_parameters(SMALL)
MODULE = "blocks.0.attn1.to_q"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fast.safetensors"


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=6,
        in_channels=36,
        out_channels=16,
        text_dim=5,
        freq_dim=4,
        ffn_dim=8,
        num_layers=2,
        image_dim=3,
        added_kv_proj_dim=6,
        rope_max_seq_len=16,
    )


def _values(path: Path) -> dict[str, torch.Tensor]:
    return {change.parameter: change.values for change in load_variant(path) if isinstance(change.values, torch.Tensor)}


@pytest.mark.parametrize("read", [inspect_lora, load_lora])
@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ({"blocks.0.norm3.diff": (6,)}, r"\('blocks.0.norm3.diff'\)"),
        ({"blocks.0.self_attn.q.diff_b": (6,), "blocks.0.diff_m": (1, 6, 6)}, r"\('blocks.0.\w+.*' and 1 more\)"),
        (lora_keys({"blocks.0.attn1.to_q": (6, 6)}) | {f"{MODULE}.lora_B.bias": (6,)}, rf"\('{MODULE}.lora_B.bias'\)"),
    ],
)
def test_a_variant_offered_as_a_style_is_refused_with_the_setting_to_use(
    path: Path, read: object, keys: dict[str, tuple[int, ...]], shown: str
) -> None:
    assert callable(read)
    write_tensors(path, random_tensors(keys))

    with pytest.raises(
        LoraError, match=f"{shown}, which makes it a variant of the model.*--model-variant FILE instead"
    ):
        read(path)


def test_a_variant_changes_every_parameter_by_what_its_file_says(
    path: Path, transformer: WanTransformer3DModel
) -> None:
    tensors = random_tensors(step_distill_keys(PARAMETERS))
    write_tensors(path, tensors)

    deltas = {
        change.parameter: change.delta(tuple(transformer.get_parameter(change.parameter).shape))
        for change in load_variant(path)
    }

    name = "diffusion_model.blocks.1.cross_attn.v_img"
    factors = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    assert deltas.keys() == dict(transformer.named_parameters()).keys()
    torch.testing.assert_close(deltas["blocks.1.attn2.add_v_proj.weight"], factors)
    torch.testing.assert_close(deltas["blocks.1.attn2.add_v_proj.bias"], tensors[f"{name}.diff_b"])
    torch.testing.assert_close(deltas["patch_embedding.weight"], tensors["diffusion_model.patch_embedding.diff"])
    torch.testing.assert_close(deltas["scale_shift_table"], tensors["diffusion_model.head.diff_m"])


def test_a_plain_lora_is_a_variant_too(path: Path) -> None:
    lora = random_factors(4, alpha=2.0)
    write_lora(path, {MODULE: lora})

    header = read_variant(path)
    (change,) = load_variant(path)

    assert header.targets == {MODULE: LoraShape(4, 24, 24)}
    assert (header.differences, header.parameters) == ({}, {f"{MODULE}.weight"})
    assert change.parameter == f"{MODULE}.weight"
    torch.testing.assert_close(change.delta((24, 24)), lora.delta.float(), rtol=1e-5, atol=1e-5)


def test_a_file_of_differences_alone_is_a_variant(path: Path) -> None:
    write_tensors(path, random_tensors(difference_keys(PARAMETERS)))

    header = read_variant(path)

    assert header.targets == {}
    assert header.differences["condition_embedder.image_embedder.norm1.bias"] == (3,)
    assert header.differences["blocks.0.scale_shift_table"] == (1, 6, 6)


def test_a_bias_that_comes_with_factors_is_scaled_as_they_are(path: Path) -> None:
    tensors = random_tensors(lora_keys({MODULE: (6, 6)}) | {f"{MODULE}.lora_B.bias": (6,)})
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True}

    write_tensors(path, tensors, {"lora_adapter_metadata": json.dumps(config)})

    assert read_variant(path).differences == {f"{MODULE}.bias": (6,)}
    torch.testing.assert_close(_values(path), {f"{MODULE}.bias": 4 * tensors[f"{MODULE}.lora_B.bias"]})


def test_a_bias_changed_in_two_ways_is_given_twice(path: Path) -> None:
    keys = lora_keys({"blocks.0.self_attn.q": (6, 6)}) | {
        "blocks.0.self_attn.q.lora_B.bias": (6,),
        "blocks.0.self_attn.q.diff_b": (6,),
    }
    write_tensors(path, random_tensors(keys))

    assert [change.parameter for change in load_variant(path)] == [
        f"{MODULE}.weight",
        f"{MODULE}.bias",
        f"{MODULE}.bias",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differences_are_float32_whatever_the_file_holds(path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.5, -2.0, 3.0]).to(dtype)

    write_tensors(path, {"blocks.0.norm3.diff": tensor})

    torch.testing.assert_close(_values(path), {"blocks.0.norm2.weight": tensor.float()})


def test_a_difference_that_is_not_finite_is_refused_when_it_is_reached(path: Path) -> None:
    write_tensors(path, {"blocks.0.norm3.diff": torch.tensor([0.0, float("nan")])})

    assert read_variant(path).differences
    with pytest.raises(LoraError, match=r"fast\.safetensors: 'blocks\.0\.norm3\.diff' holds NaN or infinity"):
        list(load_variant(path))


_WIDE = ParameterChange("blocks.0.ffn.net.2.weight", (torch.ones(2, 8), torch.ones(6, 2)))
_PATCH = ParameterChange("patch_embedding.weight", torch.ones(6, 16, 1, 2, 2))


@pytest.mark.parametrize(
    ("change", "shape", "made_for"),
    [
        (_WIDE, (8, 6), r"\[6, 8\]"),
        (_WIDE, (6, 9), r"\[6, 8\]"),
        (_PATCH, (6, 36, 1, 2, 2), r"\[6, 16, 1, 2, 2\]"),
    ],
)
def test_a_change_for_another_shape_is_refused(change: ParameterChange, shape: tuple[int, ...], made_for: str) -> None:
    with pytest.raises(LoraError, match=f"{change.parameter} has shape .*, the file was made for {made_for}"):
        change.delta(shape)


@pytest.mark.parametrize("shape", [(1, 6, 6), (6, 6)])
def test_sizes_of_one_do_not_count(shape: tuple[int, ...]) -> None:
    assert ParameterChange("blocks.0.scale_shift_table", torch.ones(1, 6, 6)).delta(shape).shape == shape


def test_no_more_than_one_change_is_read_ahead(path: Path) -> None:
    keys = {"blocks.0.norm3.diff": (6,), "blocks.1.norm3.diff": (6,)}
    tensors = random_tensors(keys)
    tensors["blocks.1.norm3.diff"][0] = float("nan")
    write_tensors(path, tensors)

    assert next(load_variant(path)).parameter == "blocks.0.norm2.weight"
