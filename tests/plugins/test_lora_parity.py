"""What load_lora gives against the change that diffusers and peft make to a Wan transformer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cinecat.plugins.lora import load_lora
from tests.plugins.samples import DIM, TARGETS, Factors, random_factors, write_lora

Deltas = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=DIM // 2,
        in_channels=36,
        out_channels=16,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        image_dim=8,
        added_kv_proj_dim=DIM,
        rope_max_seq_len=32,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora") / "sepia.safetensors"


def _loras(alpha: st.SearchStrategy[float | None]) -> st.SearchStrategy[dict[str, Factors]]:
    factors = st.builds(
        random_factors,
        rank=st.integers(1, 6),
        alpha=alpha,
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        seed=st.integers(0, 2**31),
    )
    return st.dictionaries(st.sampled_from(TARGETS), factors, min_size=1, max_size=8)


def _peft_deltas(transformer: WanTransformer3DModel, adapter: str) -> Deltas:
    modules = {name: transformer.get_submodule(name) for name in TARGETS}
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in modules.items()
        if adapter in getattr(module, "lora_A", ())
    }


def _our_deltas(path: Path) -> Deltas:
    return {name: b @ a for name, (a, b) in load_lora(path).items()}


@given(lora=_loras(alpha=st.none()))
@settings(max_examples=15, deadline=None)
def test_without_alpha_the_change_is_that_of_diffusers(
    transformer: WanTransformer3DModel, path: Path, lora: dict[str, Factors]
) -> None:
    write_lora(path, lora)
    styled = copy.deepcopy(transformer)

    styled.load_lora_adapter(load_file(path), adapter_name="sepia")

    torch.testing.assert_close(_our_deltas(path), _peft_deltas(styled, "sepia"))


@given(lora=_loras(alpha=st.floats(0.5, 32, width=16)))
@settings(max_examples=15, deadline=None)
def test_with_alpha_the_change_is_that_of_diffusers_given_the_alphas(
    transformer: WanTransformer3DModel, path: Path, lora: dict[str, Factors]
) -> None:
    tensors = load_file(write_lora(path, lora))
    alphas = {key: tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    matrices = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    styled = copy.deepcopy(transformer)

    styled.load_lora_adapter(matrices, adapter_name="sepia", network_alphas=alphas)

    torch.testing.assert_close(_our_deltas(path), _peft_deltas(styled, "sepia"))


_CONFIGS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"attn2.to_k": 2, "^blocks.1.attn1.to_q": 3},
        "alpha_pattern": {"to_v": 3, "blocks.0.attn2.to_out.0": 5},
    },
]


def _config(keys: dict[str, object]) -> LoraConfig:
    return LoraConfig(target_modules=list(TARGETS), init_lora_weights=False, **keys)


@pytest.mark.parametrize("keys", _CONFIGS)
def test_a_file_saved_by_a_transformer_is_read_at_its_scale(
    transformer: WanTransformer3DModel, tmp_path: Path, keys: dict[str, object]
) -> None:
    styled = copy.deepcopy(transformer)
    styled.add_adapter(_config(keys), adapter_name="sepia")

    styled.save_lora_adapter(tmp_path, adapter_name="sepia")

    torch.testing.assert_close(
        _our_deltas(tmp_path / "pytorch_lora_weights.safetensors"), _peft_deltas(styled, "sepia")
    )


@pytest.mark.parametrize("keys", _CONFIGS)
def test_a_file_saved_by_a_pipeline_is_read_at_its_scale(
    transformer: WanTransformer3DModel, tmp_path: Path, keys: dict[str, object]
) -> None:
    styled = copy.deepcopy(transformer)
    styled.add_adapter(_config(keys), adapter_name="sepia")

    WanImageToVideoPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(styled, adapter_name="sepia"),
        transformer_lora_adapter_metadata=styled.peft_config["sepia"].to_dict(),
    )

    torch.testing.assert_close(
        _our_deltas(tmp_path / "pytorch_lora_weights.safetensors"), _peft_deltas(styled, "sepia")
    )


def test_a_lora_of_the_patch_embedding_changes_what_it_changes_in_peft(
    transformer: WanTransformer3DModel, path: Path
) -> None:
    tensors = {
        "patch_embedding.lora_A.weight": torch.randn(3, 36, 1, 2, 2),
        "patch_embedding.lora_B.weight": torch.randn(DIM, 3, 1, 1, 1),
    }
    save_file(tensors, path)
    styled = copy.deepcopy(transformer)

    styled.load_lora_adapter(tensors, adapter_name="sepia", prefix=None)

    delta = styled.patch_embedding.get_delta_weight("sepia").detach()
    torch.testing.assert_close(_our_deltas(path)["patch_embedding"].reshape(delta.shape), delta)
