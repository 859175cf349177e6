"""Style slots against peft, on what the whole transformer predicts: files in, velocities out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cinecat.engines.slots import StyleSlots
from cinecat.plugins.lora import load_lora
from tests.engines.samples import factors_for, slot_targets, small_transformer, velocity
from tests.plugins.samples import Factors, write_lora

MAX_RANK = 8
TARGETS = slot_targets(small_transformer())


@pytest.fixture(scope="module")
def reference() -> WanTransformer3DModel:
    return small_transformer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("styles")


def load_into_peft(transformer: WanTransformer3DModel, path: Path) -> None:
    """As an adapter named as its file is."""
    tensors = load_file(path)
    alphas = {key: tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    matrices = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    transformer.load_lora_adapter(matrices, adapter_name=path.stem, network_alphas=alphas or None)


def under_peft(transformer: WanTransformer3DModel, worn: dict[str, float]) -> Tensor:
    if not worn:
        transformer.disable_adapters()
        return velocity(transformer)
    transformer.enable_adapters()
    transformer.set_adapters(list(worn), list(worn.values()))
    return velocity(transformer)


loras = st.builds(
    factors_for,
    targets=st.lists(st.sampled_from(sorted(TARGETS)), min_size=1, unique=True).map(
        lambda names: {name: TARGETS[name] for name in names}
    ),
    seed=st.integers(0, 10**6),
    rank=st.integers(1, MAX_RANK // 2),
    alpha=st.none() | st.floats(0.5, 8, width=16),
)
strengths = st.floats(-1.5, 1.5, width=16).filter(bool)


@settings(max_examples=12, deadline=None)
@given(first=loras, second=loras, alone=strengths, together=st.tuples(strengths, strengths))
def test_plain_single_and_composed_rows_of_one_batch_equal_peft(
    reference: WanTransformer3DModel,
    folder: Path,
    first: dict[str, Factors],
    second: dict[str, Factors],
    alone: float,
    together: tuple[float, float],
) -> None:
    paths = {
        name: write_lora(folder / f"{name}.safetensors", lora) for name, lora in (("first", first), ("second", second))
    }
    wishes: list[dict[str, float]] = [
        {},
        {"first": alone},
        {"second": together[1]},
        {"first": together[0], "second": together[1]},
    ]

    slotted = small_transformer()
    slots = StyleSlots(slotted.blocks, 3, MAX_RANK, torch.float32)
    slots.dress([slots.wear(wish, lambda name: load_lora(paths[name])) for wish in wishes])
    ours = velocity(slotted, rows=len(wishes))

    for path in paths.values():
        load_into_peft(reference, path)
    try:
        theirs = [under_peft(reference, wish) for wish in wishes]
    finally:
        reference.delete_adapters(list(paths))
    for row, expected in zip(ours, theirs, strict=True):
        assert (row - expected[0]).norm() <= 1e-5 * expected.norm()
