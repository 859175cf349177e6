"""What of a style's file the model can wear: what is ignored, what is refused, and which ranks go together."""

from __future__ import annotations

import dataclasses

import pytest

from cinecat.plugins.formats.layout import IgnoredKey
from cinecat.plugins.lora import LoraHeader, LoraShape
from cinecat.plugins.manifest import make_manifest
from cinecat.plugins.registry import BUNDLED, Style, StyleRegistry
from cinecat.server.styles import StyleCatalogue
from tests.server.samples import model_info

TARGET = "blocks.0.attn2.to_q"
FITTING = LoraShape(4, 256, 256)
OUTSIDE = {"patch_embedding": (144, 256), "proj_out": (256, 64)}
MANIFEST = make_manifest(
    {"name": "dusk", "version": "1.0.0", "title": "Dusk", "base_model": "wan2.1-i2v-tiny", "weights": "d.safetensors"}
)


@pytest.fixture(scope="module")
def catalogue() -> StyleCatalogue:
    return StyleCatalogue(StyleRegistry([BUNDLED]), dataclasses.replace(model_info(), other_targets=OUTSIDE))


@pytest.fixture(scope="module")
def noir(catalogue: StyleCatalogue) -> Style:
    return catalogue.find("noir")


def header(targets: dict[str, LoraShape]) -> LoraHeader:
    keys = {name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight") for name in targets}
    return LoraHeader(targets, "diffusers", (IgnoredKey("lora_te_x", "changes the text encoder"),), keys)


def test_layers_outside_the_blocks_are_worn_without_and_listed_with_the_reason(catalogue: StyleCatalogue) -> None:
    made = header({TARGET: FITTING, "proj_out": LoraShape(200, 256, 64)})
    assert catalogue.misfit(MANIFEST, made) == ""
    ignored = {each.key: each.reason for each in catalogue.ignored(made)}
    assert list(ignored) == ["lora_te_x", "proj_out.lora_A.weight", "proj_out.lora_B.weight"]
    assert "outside the transformer's blocks" in ignored["proj_out.lora_A.weight"]


def test_the_patch_embedding_of_a_text_to_video_style_is_ignored_though_it_reads_fewer_channels(
    catalogue: StyleCatalogue,
) -> None:
    assert catalogue.misfit(MANIFEST, header({TARGET: FITTING, "patch_embedding": LoraShape(4, 64, 256)})) == ""


@pytest.mark.parametrize(
    ("target", "shape", "says"),
    [
        ("proj_out", LoraShape(4, 5120, 64), "was made for a 5120 -> 64 proj_out, wan-tiny"),
        ("patch_embedding", LoraShape(4, 144, 5120), "was made for a 144 -> 5120 patch_embedding, wan-tiny"),
        ("condition_embedder.time_proj", LoraShape(4, 256, 1536), "changes condition_embedder.time_proj, which wan-"),
    ],
)
def test_layers_outside_the_blocks_of_another_model_are_refused(
    catalogue: StyleCatalogue, target: str, shape: LoraShape, says: str
) -> None:
    assert catalogue.misfit(MANIFEST, header({TARGET: FITTING, target: shape})).startswith(says)


def test_a_file_that_changes_only_layers_outside_the_blocks_is_refused_with_the_setting_to_use(
    catalogue: StyleCatalogue,
) -> None:
    problem = catalogue.misfit(MANIFEST, header({"proj_out": LoraShape(4, 256, 64)}))
    assert problem.startswith("changes only layers outside the transformer's blocks (proj_out)")
    assert "--model-variant FILE" in problem


def test_one_file_under_two_names_counts_its_rank_once(catalogue: StyleCatalogue, noir: Style) -> None:
    tall = dataclasses.replace(noir, header=header({TARGET: LoraShape(20, 256, 256)}))
    other = dataclasses.replace(tall, fingerprint="f" * 64, manifest=MANIFEST)
    assert catalogue.incompatibility_together([tall, tall]) == ""
    assert catalogue.incompatibility_together([tall, other]).startswith(
        "'noir' (rank 20) and 'dusk' (rank 20) add up to rank 40, a slot holds 32;"
    )


def test_ranks_of_different_layers_do_not_add_up(catalogue: StyleCatalogue, noir: Style) -> None:
    here = dataclasses.replace(noir, header=header({TARGET: LoraShape(20, 256, 256)}))
    there = dataclasses.replace(
        here, fingerprint="f" * 64, header=header({"blocks.1.attn2.to_q": LoraShape(20, 256, 256)})
    )
    assert catalogue.incompatibility_together([here, there]) == ""
