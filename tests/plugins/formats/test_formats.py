"""What becomes of each key: used, listed as ignored, or a reason to refuse the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinecat.plugins.errors import LoraError
from cinecat.plugins.formats import AdapterLayout, FactorKeys, IgnoredKey
from cinecat.plugins.formats.registry import AdapterFormats
from cinecat.plugins.lora import inspect_lora
from tests.plugins.formats.layouts import (
    I2V_14B,
    Shapes,
    comfy_keys,
    diffsynth_keys,
    header_of,
    kohya_keys,
    lora_keys,
    original_parameters,
    projections,
    random_tensors,
    step_distill_keys,
    write_tensors,
)

PARAMETERS = original_parameters(I2V_14B, blocks=(0, 39))
T2V = {name: shape for name, shape in PARAMETERS.items() if "_img" not in name and not name.startswith("img_emb")}
KOHYA = kohya_keys(PARAMETERS)
ONE = lora_keys({"blocks.0.attn1.to_q": (8, 6)})
READ = AdapterFormats()

STRANGE: Shapes = {
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 8),
    "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": (4, 8),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8),
    "diffusion_model.blocks.0.self_attn.q.dora_scale": (8, 1),
    "lora_unet_blocks_0_self_attn_q.lokr_w1": (8, 1),
    "blocks.0.self_attn.norm_q.lora_A.weight": (4, 8),
    "blocks.0.self_attn.norm_q.diff_b": (8,),
    "blocks.007.self_attn.q.lora_A.weight": (4, 8),
    "blocks.0.self_attn.q_loras.down.weight": (4, 8),
    "alpha": (),
}


def _used(layout: AdapterLayout) -> list[str]:
    factors = [key for keys in layout.factors.values() for key in (keys.down, keys.up, keys.alpha, keys.bias) if key]
    return [*factors, *layout.differences.values(), *(each.key for each in layout.ignored)]


@pytest.mark.parametrize(
    "keys",
    [
        comfy_keys(PARAMETERS, alpha=True),
        diffsynth_keys(PARAMETERS),
        KOHYA,
        step_distill_keys(PARAMETERS),
        lora_keys({"blocks.0.attn1.to_q": (8, 6), "blocks.39.ffn.net.2": (8, 6), "proj_out": (8, 6)}, "transformer."),
    ],
    ids=["comfy", "diffsynth", "kohya", "step-distill", "diffusers"],
)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_subset_of_a_files_keys_loses_one_silently(keys: Shapes, data: st.DataObject) -> None:
    modules = sorted({key.partition(".lora_")[0].partition(".diff")[0].removesuffix(".alpha") for key in keys})
    whole = data.draw(st.sets(st.sampled_from(modules), max_size=8))
    stray = data.draw(st.sets(st.sampled_from(sorted(keys | STRANGE)), max_size=2))
    chosen = {key: shape for key, shape in (keys | STRANGE).items() if key.startswith(tuple(whole)) or key in stray}

    try:
        _, layout = READ.read(header_of(chosen))
    except LoraError as error:
        assert "says nothing of" not in f"{error}"  # noqa: PT017
    else:
        assert sorted(_used(layout)) == sorted(chosen)


@given(whole=st.sets(st.sampled_from(sorted(projections(PARAMETERS))), min_size=1))
@settings(max_examples=60, deadline=None)
def test_a_file_with_any_of_the_layers_is_read(whole: set[str]) -> None:
    _, layout = READ.read(header_of(kohya_keys({f"{name}.weight": PARAMETERS[f"{name}.weight"] for name in whole})))

    assert len(layout.factors) == len(whole)


def test_a_t2v_file_is_read_without_image_layers() -> None:
    _, layout = READ.read(header_of(comfy_keys(T2V)))

    assert len(layout.factors) == len(projections(T2V))
    assert not [module for module in layout.factors if "add_" in module or "image_embedder" in module]


def test_each_part_of_a_layer_is_found() -> None:
    name = "diffusion_model.blocks.3.cross_attn.k_img"
    keys = {
        f"{name}.lora_down.weight": (4, 8),
        f"{name}.lora_up.weight": (8, 4),
        f"{name}.lora_up.bias": (8,),
        f"{name}.alpha": (),
        f"{name}.diff": (8, 8),
        f"{name}.diff_b": (8,),
        "diffusion_model.blocks.3.diff_m": (1, 6, 8),
        "diffusion_model.head.diff_m": (1, 2, 8),
    }

    layout_name, layout = READ.read(header_of(keys))

    path = "blocks.3.attn2.add_k_proj"
    down, up, bias, alpha, weight_difference, bias_difference, of_block, of_head = keys
    assert layout_name == "step-distill"
    assert layout.factors == {path: FactorKeys(down, up, alpha, 1.0, bias)}
    assert layout.differences == {
        f"{path}.weight": weight_difference,
        f"{path}.bias": bias_difference,
        "blocks.3.scale_shift_table": of_block,
        "scale_shift_table": of_head,
    }


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
@pytest.mark.parametrize(
    "name", ["transformer.blocks.0.attn1.to_q", "blocks.0.self_attn.q", "lora_unet_blocks_0_ffn_0"]
)
def test_factors_are_found_however_they_are_called(name: str, down: str, up: str) -> None:
    _, layout = READ.read(header_of({f"{name}.{up}": (8, 4), f"{name}.{down}": (4, 6)}))

    assert list(layout.factors.values()) == [FactorKeys(f"{name}.{down}", f"{name}.{up}")]


def test_keys_of_the_text_encoder_are_listed_as_ignored(tmp_path: Path) -> None:
    keys = ["lora_te_text_model_q.lora_down.weight", "lora_te2_text_model_q.alpha", "text_encoder.q.lora_A.weight"]
    path = write_tensors(tmp_path / "film.safetensors", random_tensors(ONE | dict.fromkeys(keys, (4, 8))))

    header = inspect_lora(path)

    reason = "changes the text encoder; styles change the transformer only"
    assert sorted(header.ignored, key=lambda each: each.key) == [IgnoredKey(key, reason) for key in sorted(keys)]
    assert list(header.targets) == ["blocks.0.attn1.to_q"]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("blocks.0.attn1.to_q.dora_scale", "is part of a DoRA"),
        ("blocks.0.attn1.to_q.lora_magnitude_vector", "is part of a DoRA"),
        ("blocks.0.attn1.to_q.lora_magnitude_vector.default.weight", "is part of a DoRA"),
        ("blocks.0.attn1.to_q.hada_w1_a", "is part of a LoHa"),
        ("blocks.0.attn1.to_q.lokr_w2", "is part of a LoKr"),
        ("blocks.0.attn1.to_q.lora_mid.weight", "is part of a LoRA of convolutions"),
        ("blocks.0.attn1.to_q.oft_blocks", "is part of an OFT"),
        ("blocks.0.attn1.to_q.weight", "is a weight of a whole model"),
        ("blocks.0.scale_shift_table", "is a weight of a whole model"),
        ("blocks.0.attn1.norm_q.lora_A.weight", "changes what no RMS norm has"),
        ("blocks.0.attn1.norm_q.diff_b", "changes what no RMS norm has"),
        ("blocks.0.attn1.to_q.diff_m", "changes what no projection has"),
    ],
)
@pytest.mark.parametrize("others", [{}, ONE], ids=["alone", "among others"])
def test_what_is_no_plain_lora_is_refused_with_its_key(others: Shapes, key: str, reason: str) -> None:
    with pytest.raises(LoraError, match=f"'{key}' {reason}"):
        READ.read(header_of(others | {key: (8, 8)}))


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_q.lora_down.weight", "Stable Diffusion"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.alpha", "Stable Diffusion"),
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", "Stable Diffusion"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux or HunyuanVideo"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux or HunyuanVideo"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "Flux, Qwen-Image or LTX-Video"),
        ("diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight", "Wan VACE"),
        ("diffusion_model.layers.22.attention.to_q.lora_A.weight", "Lumina or Z-Image"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "a language model"),
    ],
)
@pytest.mark.parametrize("others", [{}, ONE], ids=["alone", "among others"])
def test_keys_of_another_model_are_refused_with_its_name(others: Shapes, key: str, model: str) -> None:
    with pytest.raises(LoraError) as caught:
        READ.read(header_of(others | {key: (4, 8)}))

    shown = f"1 of its keys name nothing in Wan's transformer ('{key}'); it looks like a LoRA for {model}; choose"
    assert shown in f"{caught.value}"


def test_keys_that_nobody_knows_are_refused_with_a_few_of_them_and_the_formats() -> None:
    with pytest.raises(LoraError) as caught:
        READ.read(header_of({f"layer{n}.lora_A.weight": (4, 8) for n in range(9)}))

    message = f"{caught.value}"
    assert "9 of its keys name nothing in Wan's transformer ('layer0.lora_A.weight', 'layer1" in message
    assert message.endswith(
        "and others); choose one made for Wan2.1 I2V; the formats are diffusers, wan, kohya, step-distill"
    )
    assert message.count("lora_A") == 3


@pytest.mark.parametrize(
    ("keys", "formats"),
    [
        (ONE | lora_keys({"blocks.1.self_attn.q": (8, 6)}), "diffusers and wan"),
        (ONE | lora_keys({"lora_unet_blocks_1_self_attn_q": (8, 6)}), "diffusers and kohya"),
        (ONE | {"blocks.0.norm3.diff": (8,)}, "diffusers and step-distill"),
        (KOHYA | {"blocks.0.norm3.diff": (8,)}, "kohya and step-distill"),
    ],
)
def test_a_file_that_mixes_formats_is_refused(keys: Shapes, formats: str) -> None:
    with pytest.raises(LoraError, match=f"it mixes keys of the formats {formats}; save it in one"):
        READ.read(header_of(keys))


@pytest.mark.parametrize(("others", "name"), [({}, "wan"), (ONE, "diffusers")])
def test_a_layer_that_all_call_alike_goes_with_the_rest(others: Shapes, name: str) -> None:
    read, layout = READ.read(header_of(others | lora_keys({"patch_embedding": (8, 36, 1, 2, 2)})))

    assert (read, "patch_embedding" in layout.factors) == (name, True)


def test_a_layer_that_is_there_under_two_names_is_refused() -> None:
    names = {"lora_unet_blocks_0_self_attn_q": (8, 6), "lora_unet_blocks_0_attn1_to_q": (8, 6)}

    with pytest.raises(LoraError, match="are the same part of one layer; drop one"):
        READ.read(header_of(lora_keys(names)))


def test_a_file_for_the_text_encoder_alone_is_refused() -> None:
    with pytest.raises(LoraError, match="name nothing in Wan's transformer"):
        READ.read(header_of({"lora_te_text_model_q.lora_down.weight": (4, 8)}))


@pytest.mark.parametrize("key", ["lokr_x." * 20_000, "blocks.0." * 20_000, f"blocks.{'9' * 5000}.attn1.to_q.alpha"])
@pytest.mark.timeout(5)
def test_an_absurd_key_is_refused_at_once(key: str) -> None:
    with pytest.raises(LoraError, match="name nothing in Wan's transformer"):
        READ.read(header_of({key: (4, 8)}))
