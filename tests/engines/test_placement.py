"""Weights that wait elsewhere, or in fewer bits: what comes out, and where they are meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cinecat.engines.backends.stack import WanStack, WanStackBlock
from cinecat.engines.checkpoint import BUNDLED_MODEL, find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.errors import ModelError
from cinecat.engines.messages import CoreConfig, Offload, StorageDtype
from cinecat.engines.model import load_transformer
from cinecat.engines.placement import HOST, check_engine, matrices, on_device, place
from tests.engines.test_core import SHOT, render

FLOAT8 = torch.float8_e4m3fn

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="weights leave a GPU only where there is one")


def loaded(config: CoreConfig) -> EngineCore:
    return EngineCore(find_checkpoint(config.model), config)


def stack_of(core: EngineCore) -> WanStack:
    assert core._engines._torch is not None
    return core._engines._torch._stack


def stored(core: EngineCore) -> list[nn.Parameter]:
    return [weight for block in stack_of(core).blocks for weight in matrices(block)]


@pytest.fixture(scope="module")
def exact(config: CoreConfig) -> Tensor:
    return render(loaded(config), SHOT)


class Recorder(nn.Module):
    """Says where its tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(3))

    def forward(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.parameters(), *self.buffers())]


@torch.inference_mode()
def test_a_module_is_on_the_device_while_it_works_and_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    # A copy to another device, as far as a machine with one device goes: the same numbers elsewhere in its memory.
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: tensor.clone())
    module = Recorder()
    homes = module()
    with on_device(module, torch.device("cpu")):
        assert not set(module()) & set(homes)
    assert module() == homes


def test_a_module_is_back_after_work_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: tensor.clone())
    module = Recorder()
    homes = module()
    with pytest.raises(RuntimeError), on_device(module, torch.device("cpu")):
        raise RuntimeError
    assert module() == homes


@pytest.mark.parametrize("offload", ["encoders", "blocks"])
def test_offloading_changes_no_frame(config: CoreConfig, exact: Tensor, offload: Offload) -> None:
    torch.testing.assert_close(render(loaded(replace(config, offload=offload)), SHOT), exact, rtol=0, atol=0)


@GPU
@pytest.mark.parametrize("storage_dtype", ["none", "float8_e4m3fn"])
def test_blocks_wait_on_the_host_of_a_gpu_and_change_no_frame(config: CoreConfig, storage_dtype: StorageDtype) -> None:
    here = replace(config, device="cuda", engine="torch", storage_dtype=storage_dtype)
    core = loaded(replace(here, offload="blocks"))
    for shot in (SHOT, replace(SHOT, job_id="b", seed=6)):
        torch.testing.assert_close(render(core, shot), render(loaded(here), shot), rtol=0, atol=1e-4)
    assert {weight.device.type for weight in stored(core)} == {"cpu"}
    assert core._model.text_encoder.device.type == core._model.image_encoder.device.type == "cpu"
    assert core._model.transformer.device.type == core._model.vae.device.type == "cuda"


def test_encoders_come_to_the_device_for_what_is_not_known_yet(
    config: CoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = loaded(replace(config, offload="encoders"))
    visits: list[nn.Module] = []

    def recording(module: nn.Module, device: torch.device) -> object:
        visits.append(module)
        return on_device(module, device)

    monkeypatch.setattr("cinecat.engines.core.on_device", recording)
    core.condition(SHOT)
    model = core._model
    assert visits == [model.text_encoder, model.text_encoder, model.image_encoder]
    core.condition(replace(SHOT, job_id="b", seed=6))
    assert len(visits) == 3


def test_float8_is_what_waits_and_float32_what_runs(config: CoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    core = loaded(replace(config, storage_dtype="float8_e4m3fn"))
    running: set[torch.dtype] = set()
    heads = WanStackBlock._heads

    def noting(self: WanStackBlock, states: Tensor) -> Tensor:
        running.update(weight.dtype for weight in matrices(self))
        return heads(self, states)

    monkeypatch.setattr(WanStackBlock, "_heads", noting)
    assert {weight.dtype for weight in stored(core)} == {FLOAT8}
    notes = core.condition(SHOT).notes
    assert any(note.startswith("storage_dtype: ") for note in notes)
    core.step_alone(SHOT.job_id)
    assert running == {torch.float32}
    assert {weight.dtype for weight in stored(core)} == {FLOAT8}
    others = [parameter for block in stack_of(core).blocks for parameter in block.parameters() if parameter.dim() != 2]
    assert {parameter.dtype for parameter in others} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float8_matrices_differ_by_three_percent_however_small_they_are(
    config: CoreConfig, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    transformer = load_transformer(find_checkpoint(config.model), "cpu", dtype)
    stack = WanStack(transformer)
    weight = matrices(stack.blocks[0])[0]
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).mul(0.002).to(weight.dtype)
    exact = weight.detach().clone()
    seen: list[Tensor] = []

    def noting(self: WanStackBlock, *given: Tensor) -> Tensor:
        seen.append(weight.detach().clone())
        raise ZeroDivisionError

    monkeypatch.setattr(WanStackBlock, "_modulated", noting)
    place(transformer, stack, HOST, "none", "float8_e4m3fn")
    with pytest.raises(ZeroDivisionError):
        stack.blocks[0](*[torch.zeros(1, 6, 48)] * 12, {})
    (ran,) = seen
    assert ran.dtype == exact.dtype
    assert float((ran.float() - exact.float()).norm() / exact.float().norm()) < 0.03


@torch.inference_mode()
def test_float8_velocity_of_wan_tiny_is_within_six_percent(config: CoreConfig) -> None:
    tiny = replace(config, model=BUNDLED_MODEL)
    velocities = []
    for storage_dtype in ("none", "float8_e4m3fn"):
        core = loaded(replace(tiny, storage_dtype=storage_dtype))
        core.condition(SHOT)
        request = core._requests[SHOT.job_id]
        moment, _ = request.moment()
        (branches,) = request.denoiser.velocities_of([moment])
        velocities.append(branches[0])
    exact, narrow = velocities
    assert 0.005 < float((narrow - exact).norm() / exact.norm()) < 0.06


def test_float8_with_blocks_offloaded_is_float8(config: CoreConfig) -> None:
    narrow = replace(config, storage_dtype="float8_e4m3fn")
    frames = render(loaded(narrow), SHOT)
    torch.testing.assert_close(render(loaded(replace(narrow, offload="blocks")), SHOT), frames, rtol=0, atol=0)


def test_a_forward_that_failed_leaves_the_next_one_as_it_was(
    config: CoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = loaded(replace(config, storage_dtype="float8_e4m3fn", offload="blocks"))
    frames = render(core, SHOT)
    core.condition(SHOT)
    with monkeypatch.context() as patch:
        patch.setattr(WanStackBlock, "_heads", lambda self, states: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            core.step_alone(SHOT.job_id)
    torch.testing.assert_close(render(core, SHOT), frames, rtol=0, atol=0)
    assert {weight.dtype for weight in stored(core)} == {FLOAT8}


def test_nothing_else_keeps_the_weights_of_blocks_alive(config: CoreConfig) -> None:
    core = loaded(replace(config, offload="blocks"))
    own = core._model.transformer.blocks[0].attn1
    assert own.to_q.weight.numel() == own.to_k.weight.numel() == own.to_v.bias.numel() == 0


@pytest.mark.parametrize(
    ("offload", "storage_dtype", "words"),
    [
        ("blocks", "none", "offload, engine: offload = blocks is .* engine is inductor"),
        ("none", "float8_e4m3fn", "storage_dtype, engine: storage_dtype = float8_e4m3fn is .* engine is inductor"),
    ],
)
def test_another_engine_is_refused_with_both_settings(
    config: CoreConfig, offload: Offload, storage_dtype: StorageDtype, words: str
) -> None:
    wrong = replace(config, engine="inductor", offload=offload, storage_dtype=storage_dtype)
    with pytest.raises(ModelError, match=words):
        loaded(wrong)


def test_auto_is_torch_where_no_other_engine_could_run() -> None:
    assert check_engine("auto", "blocks", "none") == "torch"
    assert check_engine("auto", "none", "float8_e4m3fn") == "torch"
    assert check_engine("auto", "encoders", "none") == "auto"
