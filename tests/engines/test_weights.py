"""Weights are read straight to where they stay: equal to the libraries' own loading, and never held twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5EncoderModel

from cinecat.engines.checkpoint import Checkpoint, find_checkpoint
from cinecat.engines.errors import ModelError
from cinecat.engines.model import load_encoders, load_transformer

FLOAT32_ISLANDS = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


@pytest.fixture
def copy(micro: Path, tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "copy"
    shutil.copytree(micro, folder)
    return find_checkpoint(str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_loaded_equals_what_diffusers_and_transformers_load(micro: Path, dtype: str) -> None:
    checkpoint = find_checkpoint(str(micro))
    kind = getattr(torch, dtype)
    pairs: list[tuple[nn.Module, Any]] = [
        (
            load_transformer(checkpoint, "cpu", dtype),
            WanTransformer3DModel.from_pretrained(micro / "transformer", torch_dtype=kind),
        ),
        (
            load_encoders(checkpoint, "cpu", dtype).text_encoder,
            UMT5EncoderModel.from_pretrained(micro / "text_encoder", torch_dtype=kind),
        ),
    ]
    for ours, theirs in pairs:
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())
        expected = parameters(theirs)
        assert parameters(ours).keys() == expected.keys()
        for name, parameter in parameters(ours).items():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0, msg=name)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], rtol=0, atol=0, msg=name)


def test_wans_float32_islands_stay_float32_in_bfloat16(micro: Path) -> None:
    transformer = load_transformer(find_checkpoint(str(micro)), "cpu", "bfloat16")
    found = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    islands = {name for name in found if FLOAT32_ISLANDS & set(name.split("."))}
    assert {part for name in islands for part in name.split(".")} >= FLOAT32_ISLANDS - {"norm1", "norm3"}
    assert {found[name] for name in islands} == {torch.float32}
    assert {kind for name, kind in found.items() if name not in islands} == {torch.bfloat16}
    assert transformer.rope.freqs_cos.dtype == torch.float32
    assert transformer.dtype == torch.bfloat16


def test_tied_weights_are_one_tensor(micro: Path) -> None:
    encoder = load_encoders(find_checkpoint(str(micro)), "cpu", "bfloat16").text_encoder
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_a_missing_tensor_is_named(copy: Checkpoint) -> None:
    path = copy.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["blocks.1.attn2.to_k.weight"]
    save_file(tensors, path)
    with pytest.raises(
        ModelError, match=r"transformer cannot be loaded: it lacks blocks\.1\.attn2\.to_k\.weight; down"
    ):
        load_transformer(copy, "cpu", "auto")


def test_a_tensor_of_another_size_is_named_with_both(copy: Checkpoint) -> None:
    path = copy.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"proj_out\.bias is \[3\], its config\.json says \[64\]"):
        load_transformer(copy, "cpu", "auto")


def test_a_tensor_of_integers_is_refused(copy: Checkpoint) -> None:
    path = copy.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] = torch.zeros(64, dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"proj_out\.bias is I32, not one of F64, F32, F16, BF16"):
        load_transformer(copy, "cpu", "auto")


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Path]:
    """A transformer of 600 MB in float32, in shards of 150 MB."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=16,
            attention_head_dim=128,
            in_channels=36,
            text_dim=256,
            ffn_dim=8192,
            num_layers=2,
            image_dim=256,
            added_kv_proj_dim=2048,
        )
    transformer.to_empty(device="cpu").save_pretrained(tmp_path / "transformer", max_shard_size="150MB")
    del transformer
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures the peak by Linux's /proc")
def test_loading_and_converting_never_holds_a_second_copy(wide: Path) -> None:
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    transformer = load_transformer(Checkpoint("wide", wide, "", ""), "cpu", "bfloat16")
    peak = status_bytes("VmHWM") - before
    assert peak <= 1.15 * sum(parameter.nbytes for parameter in transformer.parameters())
