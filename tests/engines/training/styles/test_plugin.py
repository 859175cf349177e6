"""The plugin folder: read back, and worn as peft wears what was trained."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from numpy.typing import NDArray
from PIL import Image

from cinecat.engines.checkpoint import Checkpoint, find_checkpoint
from cinecat.engines.slots import StyleSlots
from cinecat.engines.training.progress import Journal
from cinecat.engines.training.styles.clips import ClipShape
from cinecat.engines.training.styles.plugin import TrainingRecord, encode_preview, style_manifest, write_plugin
from cinecat.engines.training.styles.trainer import TrainedStyle, train_style
from cinecat.plugins.errors import StyleError
from cinecat.plugins.lora import load_lora
from cinecat.plugins.manifest import read_manifest
from cinecat.plugins.registry import StyleRegistry
from tests.engines.samples import small_transformer, velocity
from tests.engines.training.styles.samples import RECIPE, encoded_clips

NOISE = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
RECIPE_ALL = replace(RECIPE, targets="all", steps=2, alpha=3.0)
RECORD = TrainingRecord(
    model="micro",
    fingerprint="0123",
    shape=ClipShape(32, 32, 5, 8.0),
    recipe=RECIPE_ALL,
    used=["a.mp4", "b.mp4"],
    held_out=["c.mp4"],
    left_out=["d.mp4: has no caption"],
    device="CPU",
    dtype="float32",
    processes=1,
    seconds=2.0,
    memory="memory: 1 GiB",
)


@pytest.fixture(scope="module")
def checkpoint(micro: Path) -> Checkpoint:
    return find_checkpoint(str(micro))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[WanTransformer3DModel, TrainedStyle, Journal]:
    """A transformer that still has peft's layers, with the best weights in them."""
    transformer, clips = small_transformer(), encoded_clips(2)
    journal = Journal(tmp_path_factory.mktemp("run"), "run")
    style = train_style(transformer, clips[:1], clips[:1], RECIPE_ALL, 3.0, journal, cpu=True)
    assert style.best_step == style.steps, "the last weights are not the best"
    return transformer, style, journal


@pytest.fixture(scope="module")
def folder(
    checkpoint: Checkpoint,
    trained: tuple[WanTransformer3DModel, TrainedStyle, Journal],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("styles") / "dusk-2"
    manifest = style_manifest(checkpoint, "dusk-2", {"version": "1.2.0", "prompt_template": "dusk, {prompt}"})
    notes = write_plugin(folder, manifest, trained[1], RECORD, 2, trained[2].curve, lambda weights: NOISE)
    assert notes == []
    return folder


def test_the_registry_offers_the_folder(folder: Path) -> None:
    registry = StyleRegistry([folder.parent])
    assert registry.problems() == ()
    (style,) = registry.styles()
    manifest = style.manifest
    assert (manifest.name, manifest.version, manifest.title) == ("dusk-2", "1.2.0", "Dusk 2")
    assert (manifest.base_model, manifest.prompt_template) == ("wan2.1-i2v-tiny", "dusk, {prompt}")
    assert (manifest.base_dims.dim, manifest.base_dims.ffn_dim, manifest.base_dims.layers) == (48, 64, 2)


def test_the_file_changes_the_weights_as_peft_does(
    folder: Path, trained: tuple[WanTransformer3DModel, TrainedStyle, Journal]
) -> None:
    transformer = trained[0]
    factors = load_lora(folder / "dusk-2.safetensors", read_manifest(folder).sha256)
    assert len(factors) == 24
    for path, (a, b) in factors.items():
        layer = transformer.get_submodule(path)
        assert layer.scaling["default"] == 1.5
        delta = layer.get_delta_weight("default").detach()
        assert delta.abs().max() > 0
        assert b @ a == pytest.approx(delta, abs=1e-6)


def test_a_scaled_style_changes_the_weights_by_that_much(
    checkpoint: Checkpoint, trained: tuple[WanTransformer3DModel, TrainedStyle, Journal], tmp_path: Path
) -> None:
    manifest = style_manifest(checkpoint, "dusk", {"version": "1.0.0"})
    write_plugin(tmp_path / "dusk", manifest, trained[1], replace(RECORD, scale=0.25), 2, trained[2].curve)
    for path, (a, b) in load_lora(tmp_path / "dusk" / "dusk.safetensors").items():
        delta = trained[0].get_submodule(path).get_delta_weight("default").detach()
        assert b @ a == pytest.approx(0.25 * delta, abs=1e-6)
    assert "| scale | 0.25 |" in (tmp_path / "dusk" / "README.md").read_text()


def test_a_slot_that_wears_it_predicts_what_peft_does(
    folder: Path, trained: tuple[WanTransformer3DModel, TrainedStyle, Journal]
) -> None:
    expected, plain = velocity(trained[0]), velocity(small_transformer())
    slotted = small_transformer()
    slots = StyleSlots(slotted.blocks, 1, 2, torch.float32)
    slots.dress([slots.wear({"style": 1.0}, lambda name: load_lora(folder / "dusk-2.safetensors"))])
    assert (velocity(slotted) - expected).norm() <= 1e-5 * expected.norm()
    assert (plain - expected).norm() > 1e-3 * expected.norm()


def test_diffusers_loads_it_with_the_same_effect(
    folder: Path, trained: tuple[WanTransformer3DModel, TrainedStyle, Journal]
) -> None:
    from diffusers import WanImageToVideoPipeline

    state, metadata = WanImageToVideoPipeline.lora_state_dict(
        folder, weight_name="dusk-2.safetensors", return_lora_metadata=True
    )
    transformer = small_transformer()
    WanImageToVideoPipeline.load_lora_into_transformer(state, transformer, metadata=metadata)
    expected = velocity(trained[0])
    assert (velocity(transformer) - expected).norm() <= 1e-5 * expected.norm()


def test_everybody_may_read_it(folder: Path) -> None:
    assert (folder / "dusk-2.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_preview_moves(folder: Path) -> None:
    with Image.open(folder / "preview.webp") as preview:
        assert (preview.n_frames, preview.size) == (5, (32, 32))  # type: ignore[attr-defined]


def test_the_card_tells_settings_clips_and_figures(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for line in (
        "| rank | 2 |",
        "| alpha | 3.0 |",
        "| betas | 0.9, 0.999 |",
        "| frames | 5 |",
        "- d.mp4: has no caption",
    ):
        assert line in card
    assert "Trained on 2: a.mp4, b.mp4.\n\nHeld out 1: c.mp4." in card
    assert (folder / "training.png").stat().st_size > 1000
    assert (folder / "training.csv").read_text().startswith("step,seconds,schedule,loss,validation_loss\n")


def test_a_folder_that_exists_is_not_written_over(
    folder: Path, checkpoint: Checkpoint, trained: tuple[WanTransformer3DModel, TrainedStyle, Journal]
) -> None:
    manifest = style_manifest(checkpoint, "dusk-2", {"version": "1.0.0"})
    with pytest.raises(FileExistsError, match="give another --name or --out"):
        write_plugin(folder, manifest, trained[1], RECORD, 2, trained[2].curve)


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, checkpoint: Checkpoint, trained: tuple[WanTransformer3DModel, TrainedStyle, Journal]
) -> None:
    def fails(weights: Path) -> NDArray[np.uint8]:
        raise RuntimeError

    manifest = style_manifest(checkpoint, "dusk", {"version": "1.0.0"})
    with pytest.raises(RuntimeError):
        write_plugin(tmp_path / "dusk", manifest, trained[1], RECORD, 2, trained[2].curve, fails)
    assert list(tmp_path.iterdir()) == []


def test_without_memory_for_a_preview_the_style_is_written_and_says_so(
    tmp_path: Path, checkpoint: Checkpoint, trained: tuple[WanTransformer3DModel, TrainedStyle, Journal]
) -> None:
    def too_large(weights: Path) -> NDArray[np.uint8]:
        raise MemoryError

    manifest = style_manifest(checkpoint, "dusk", {"version": "1.0.0"})
    notes = write_plugin(tmp_path / "dusk", manifest, trained[1], RECORD, 2, trained[2].curve, too_large)
    assert notes == ["preview: left out, the whole model does not fit into memory"]
    assert read_manifest(tmp_path / "dusk").preview == ""


@pytest.mark.parametrize(("name", "key"), [("Noir", "name"), ("no ir", "name"), ("-noir", "name")])
def test_a_name_that_no_style_may_have_is_refused(name: str, key: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(StyleError, match=rf"^style\.toml: {key} is "):
        style_manifest(checkpoint, name, {"version": "1.0.0"})


def test_a_preview_that_is_too_large_becomes_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 200, 300, 3), dtype=np.uint8)
    whole, less = encode_preview(noise, 8.0), encode_preview(noise, 8.0, limit=40_000)
    assert len(less) <= 40_000 < len(whole)
    with Image.open(io.BytesIO(less)) as preview:
        assert preview.width < 300
    with pytest.raises(ValueError, match="more than 10 bytes"):
        encode_preview(noise, 8.0, limit=10)
