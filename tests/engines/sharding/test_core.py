"""A core whose work is shared by ranks computes what one does alone."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.errors import ModelError
from cinecat.engines.messages import Cat, CoreConfig, Failure, RequestStepped, Shot, StyleUse
from cinecat.engines.sharding.vae import sent_bytes as decoding_bytes
from cinecat.engines.sharding.volume import ForwardShape, sent_bytes
from cinecat.engines.tiny import build_tiny
from tests.engines.conftest import MICRO

SHOT = Shot(
    job_id="a",
    image=np.random.default_rng(0).integers(0, 256, (80, 48, 3), dtype=np.uint8),
    prompt="a cat",
    negative_prompt="blurry",
    frames=9,
    steps=4,
    guidance_scale=4.0,
    seed=5,
    styles=(),
)
"""45 tokens a row, which no number of ranks but 3 and 5 divides."""

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "four-heads"
    build_tiny(folder, replace(MICRO, heads=4, head_dim=12))
    return folder


@pytest.fixture(scope="module")
def sharded_config(config: CoreConfig, four_heads: Path) -> CoreConfig:
    return replace(config, model=str(four_heads), threads=1, rank_timeout_seconds=60.0)


@pytest.fixture(scope="module")
def alone(sharded_config: CoreConfig) -> EngineCore:
    return EngineCore(find_checkpoint(sharded_config.model), sharded_config)


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory, alone: EngineCore) -> tuple[StyleUse, ...]:
    """Strong enough that a rank without them would be seen."""
    found = []
    for seed in range(3):
        draw, tensors = torch.Generator().manual_seed(seed), {}
        for target, (n, m) in alone.model_info.style_targets.items():
            tensors[f"transformer.{target}.lora_A.weight"] = torch.randn(2, n, generator=draw) / n**0.5
            tensors[f"transformer.{target}.lora_B.weight"] = torch.randn(m, 2, generator=draw) / 4
        path = tmp_path_factory.mktemp("styles") / f"{seed}.safetensors"
        save_file(tensors, path)
        found.append(StyleUse(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 1.0))
    return tuple(found)


@contextmanager
def sharded(config: CoreConfig, shard: str, **changes: object) -> Iterator[EngineCore]:
    def lost(words: Failure | None) -> None:
        raise AssertionError(f"a rank is gone: {words}")

    changed = replace(config, shard=shard, **changes)  # type: ignore[arg-type]
    core = EngineCore(find_checkpoint(config.model), changed, lost=lost)
    try:
        yield core
    finally:
        core.close()


def latents(core: EngineCore, *shots: Shot) -> list[Tensor]:
    """Final latents of shots that take their steps together."""
    for shot in shots:
        core.condition(shot)
    for _ in range(shots[0].steps):
        core.step([shot.job_id for shot in shots])
    found = [core._requests[shot.job_id].latents for shot in shots]
    for shot in shots:
        core.release(shot.job_id)
    return found


def frames(core: EngineCore, shot: Shot) -> Tensor:
    core.condition(shot)
    for _ in range(shot.steps):
        core.step_alone(shot.job_id)
    found: list[Tensor] = []
    while sum(map(len, found)) < shot.frames:
        core.decode(shot.job_id, lambda chunk: found.append(chunk.clone()))
    core.release(shot.job_id)
    return torch.cat(found)


def assert_equal_to_one(core: EngineCore, alone: EngineCore, styles: tuple[StyleUse, ...]) -> None:
    """On both paths, with and without guidance, and with other styles in one forward, in more slots than there are."""
    first, second, third = styles
    shots = [
        SHOT,
        replace(SHOT, guidance_scale=1.0),
        replace(SHOT, styles=(first,)),
        replace(SHOT, run_steps=3),
        replace(SHOT, cat=Cat(keep_ratio=0.6), styles=(replace(second, strength=0.5),)),
        replace(SHOT, styles=(first, replace(third, strength=-0.7))),
    ]
    for shot in shots:
        (expected,), (found,) = latents(alone, shot), latents(core, shot)
        torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(frames(core, SHOT), frames(alone, SHOT), rtol=0.0, atol=1e-4)
    plain = latents(alone, SHOT)[0]
    assert not torch.allclose(plain, latents(core, shots[2])[0], atol=1e-2)
    mixed = (
        replace(SHOT, job_id="a", styles=(first,)),
        replace(SHOT, job_id="b", styles=(second,), seed=6, prompt="two dogs on a hill, in the rain"),
        replace(SHOT, job_id="c", guidance_scale=1.0, seed=7),
    )
    for expected, found in zip(latents(alone, *mixed), latents(core, *mixed), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def assert_a_rank_that_is_late_wears_what_the_others_do(
    core: EngineCore, alone: EngineCore, styles: tuple[StyleUse, ...]
) -> None:
    """Each of the two slots changes its style while the follower stands still, and it is worn at once."""
    assert core._ranks is not None
    (follower,) = core._ranks.pids
    for style in styles:
        shot = replace(SHOT, steps=2, styles=(style,))
        (expected,) = latents(alone, shot)
        os.kill(follower, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (follower, signal.SIGCONT)).start()
        (found,) = latents(core, shot)
        torch.testing.assert_close(found, expected, **CLOSE)


def assert_traffic_is_what_the_formula_says(core: EngineCore) -> None:
    """Bytes of all ranks, of a clip's steps on both paths and of its decoding."""
    assert core._ranks is not None
    layout, config = core._ranks.layout, core._model.transformer.config
    for shot in (SHOT, replace(SHOT, guidance_scale=1.0, cat=Cat(keep_ratio=0.5)), replace(SHOT, run_steps=3)):
        core.condition(shot)
        core._ranks.traffic()
        steps = [core.step([shot.job_id]) for _ in range(shot.steps)]
        request = core._requests[shot.job_id]
        rows = len(request.branches)
        text = max(branch.keys(None, None, request.outfit.whole).length for branch in request.branches)
        expected: list[Counter[str]] = [Counter() for _ in range(layout.ranks)]
        for number, stepped in enumerate(steps):
            (step,) = stepped.requests
            assert isinstance(step, RequestStepped)
            if not step.tokens:  # a cached step is the leader's alone
                assert stepped.communication_bytes == 0
                continue
            shape = ForwardShape(
                config.num_layers,
                config.num_attention_heads,
                config.num_attention_heads * config.attention_head_dim,
                rows=rows,
                tokens=step.tokens,
                text=text,
                image=request.branches[0].image.shape[1],
                value_bytes=4,
                biased=step.tokens < 45,
            )
            for rank, sent in enumerate(expected):
                sent.update(sent_bytes(shape, layout, rank, fresh=number == 0).kinds())
        assert [dict(told.sent) for told in core._ranks.traffic()[1:]] == [dict(sent) for sent in expected[1:]]
        # The leader's was told step by step.
        assert sum(stepped.communication_bytes for stepped in steps) == expected[0].total()
        chunks = [core.decode(shot.job_id, lambda chunk: None) for _ in range(3)]
        core.release(shot.job_id)
        of_clip = [
            decoding_bytes(core._model.vae, request.latents.shape, rank, layout.ranks) for rank in range(layout.ranks)
        ]
        assert [dict(told.sent) for told in core._ranks.traffic()[1:]] == of_clip[1:]
        assert sum(decoded.communication_bytes for decoded in chunks) == sum(of_clip[0].values())


@pytest.mark.parametrize("shard", ["ulysses=2"])
def test_two_ranks(sharded_config: CoreConfig, alone: EngineCore, styles: tuple[StyleUse, ...], shard: str) -> None:
    with sharded(sharded_config, shard) as core:
        assert_equal_to_one(core, alone, styles)
        assert_a_rank_that_is_late_wears_what_the_others_do(core, alone, styles)
        assert_traffic_is_what_the_formula_says(core)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shard", ["ring=2", "cfg=2", "ulysses=4", "ring=4", "ulysses=2,ring=2", "ulysses=2,cfg=2", "ring=2,cfg=2", "ring=3"]
)
def test_more_layouts(sharded_config: CoreConfig, alone: EngineCore, styles: tuple[StyleUse, ...], shard: str) -> None:
    with sharded(sharded_config, shard) as core:
        assert_equal_to_one(core, alone, styles)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"shard_weights": "fsdp"}, {"offload": "blocks"}, {"storage_dtype": "float8_e4m3fn"}]
)
def test_weights_kept_otherwise(
    sharded_config: CoreConfig, styles: tuple[StyleUse, ...], changes: dict[str, str]
) -> None:
    kept = {} if "shard_weights" in changes else changes
    alone = EngineCore(find_checkpoint(sharded_config.model), replace(sharded_config, **kept))  # type: ignore[arg-type]
    with sharded(sharded_config, "ulysses=2", **changes) as core:
        assert_equal_to_one(core, alone, styles)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shard": "ulysses=3"}, "shard: ulysses=3 does not divide the model's 4 heads; 1, 2, 4 do"),
        ({"shard": "ulysses=2", "engine": "onnxruntime"}, "shard, engine: .* set engine to torch, or shard to none"),
        ({"shard_weights": "fsdp"}, "shard_weights: fsdp spreads weights over ulysses x ring ranks, and shard is none"),
        ({"shard": "ring=2", "shard_weights": "fsdp", "offload": "blocks"}, "shard_weights, offload, storage_dtype"),
    ],
)
def test_settings_that_do_not_go_together(sharded_config: CoreConfig, changes: dict[str, str], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        EngineCore(find_checkpoint(sharded_config.model), replace(sharded_config, **changes))  # type: ignore[arg-type]
