"""Model variants: fused once, at load, into every parameter that the file names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.errors import ModelError
from cinecat.engines.messages import CoreConfig, Notice, SlotMemory, VariantFused
from cinecat.engines.variants import Variant, find_variant, fuse_variant
from tests.engines.samples import DIM, FFN, IMAGE, TEXT, factors_for, slot_targets, small_transformer, velocity
from tests.plugins.formats.layouts import Sizes, original_parameters, random_tensors, step_distill_keys, write_tensors
from tests.plugins.samples import random_factors, write_lora

SIZES = Sizes(dim=DIM, ffn=FFN, text=TEXT, time=8, image=IMAGE, layers=2)


@pytest.fixture
def transformer() -> WanTransformer3DModel:
    return small_transformer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "four-steps.safetensors"


def found(path: Path) -> Variant:
    variant = find_variant(str(path))
    assert variant is not None
    return variant


def test_a_fused_lora_equals_the_one_that_diffusers_fuses(transformer: WanTransformer3DModel, path: Path) -> None:
    targets = slot_targets(small_transformer()) | {
        "proj_out": (DIM, 64),
        "condition_embedder.time_proj": (DIM, 6 * DIM),
    }
    write_lora(path, factors_for(targets, seed=5, rank=3, alpha=None))
    reference = small_transformer()
    reference.load_lora_adapter(load_file(path), adapter_name="distill")
    reference.fuse_lora()
    before = velocity(transformer)

    fuse_variant(transformer, found(path))

    after = velocity(transformer)
    assert (after - velocity(reference)).norm() <= 1e-5 * after.norm()
    assert (after - before).norm() > 0.1 * before.norm()


def test_factors_and_differences_of_norms_biases_and_modulations_all_land(
    transformer: WanTransformer3DModel, path: Path
) -> None:
    tensors = random_tensors(step_distill_keys(original_parameters(SIZES)))
    write_tensors(path, tensors)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}

    fused = fuse_variant(transformer, found(path))

    changes = {name: parameter - before[name] for name, parameter in transformer.named_parameters()}
    assert fused == VariantFused("four-steps", len(before), 0)
    expected = {
        "blocks.1.norm2.weight": "blocks.1.norm3.diff",
        "blocks.1.norm2.bias": "blocks.1.norm3.diff_b",
        "blocks.0.attn1.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.0.attn2.norm_added_k.weight": "blocks.0.cross_attn.norm_k_img.diff",
        "blocks.0.ffn.net.0.proj.bias": "blocks.0.ffn.0.diff_b",
        "blocks.1.scale_shift_table": "blocks.1.diff_m",
        "scale_shift_table": "head.diff_m",
        "condition_embedder.image_embedder.norm1.weight": "img_emb.proj.0.diff",
        "patch_embedding.weight": "patch_embedding.diff",
    }
    for name, key in expected.items():
        torch.testing.assert_close(changes[name], tensors[f"diffusion_model.{key}"], rtol=1e-5, atol=1e-6)
    assert all(change.abs().max() > 0 for change in changes.values())


def test_each_parameter_keeps_its_dtype_and_is_rounded_once(transformer: WanTransformer3DModel, path: Path) -> None:
    lora = random_factors(2)
    write_lora(path, {"blocks.0.attn1.to_q": lora})
    transformer.bfloat16()
    weight = transformer.blocks[0].attn1.to_q.weight.clone()

    fuse_variant(transformer, found(path))

    fused = transformer.blocks[0].attn1.to_q.weight
    assert fused.dtype is torch.bfloat16
    torch.testing.assert_close(fused, (weight.float() + lora.b @ lora.a).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (
            {"blocks.39.attn2.to_q": random_factors(2)},
            r"four-steps.safetensors changes blocks\.39\.attn2\.to_q\.weight, ",
        ),
        ({"blocks.0.attn2.to_q": random_factors(2, in_features=32)}, r"blocks\.0\.attn2\.to_q\.weight has shape"),
    ],
)
def test_a_variant_of_another_model_is_refused_by_the_parameter(
    transformer: WanTransformer3DModel, path: Path, lora: dict[str, object], says: str
) -> None:
    write_lora(path, lora)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"^model_variant: .*{says}"):
        fuse_variant(transformer, found(path))


def test_a_variant_with_nan_is_refused(transformer: WanTransformer3DModel, path: Path) -> None:
    write_tensors(path, {"diffusion_model.blocks.0.norm3.diff": torch.full((DIM,), torch.nan)})
    with pytest.raises(ModelError, match=r"^model_variant: four-steps.*NaN"):
        fuse_variant(transformer, found(path))


def test_a_variant_whose_sum_overflows_is_refused(transformer: WanTransformer3DModel, path: Path) -> None:
    write_tensors(path, {"diffusion_model.blocks.0.norm3.diff": torch.full((DIM,), 1e30)})
    with pytest.raises(ModelError, match=r"^model_variant: four-steps.*norm2\.weight becomes NaN or infinity with it"):
        fuse_variant(transformer.half(), found(path))


def test_a_variant_that_was_replaced_meanwhile_is_refused(transformer: WanTransformer3DModel, path: Path) -> None:
    write_tensors(path, {"diffusion_model.blocks.0.norm3.diff": torch.full((DIM,), 1.0)})
    variant = found(path)
    write_tensors(path, {"diffusion_model.blocks.0.norm3.diff": torch.full((DIM,), 2.0)})
    with pytest.raises(ModelError, match=r"^model_variant: four-steps.*was replaced meanwhile"):
        fuse_variant(transformer, variant)


def test_a_file_that_is_none_is_refused_before_the_model_is_loaded(path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model_variant: four-steps\.safetensors: cannot be read"):
        find_variant(str(path))
    path.write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=r"^model_variant: four-steps\.safetensors: "):
        find_variant(str(path))


def test_no_setting_is_no_variant() -> None:
    assert find_variant("") is None


def test_a_core_tells_its_variant_its_memory_and_a_fingerprint_of_both(config: CoreConfig, path: Path) -> None:
    write_lora(path, {"blocks.0.attn1.to_q": random_factors(2, in_features=48, out_features=48)})
    variant, checkpoint = found(path), find_checkpoint(config.model)
    notices: list[Notice] = []

    info = EngineCore(checkpoint, config, variant, notices.append).model_info

    assert (info.name, info.variant) == ("micro+four-steps", "four-steps")
    assert info.fingerprint not in ("", checkpoint.fingerprint)
    assert info.fingerprint != replace(variant, sha256="0" * 64).fingerprint(checkpoint.fingerprint)
    fused, memory = notices
    assert fused == VariantFused("four-steps", 1, 0)
    assert isinstance(memory, SlotMemory)
    # Ten linears of 48 -> 48 and two of 48 and 64, in two layers; three slots of rank 8 in float32.
    assert memory.size_bytes == (10 * 96 + 2 * 112) * 2 * 3 * 8 * 4
