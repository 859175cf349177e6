"""A clip on fewer tokens, asked for over gRPC."""

from __future__ import annotations

from pathlib import Path

from cinecat import Client
from cinecat.server.local_server import LocalServer
from cinecat.server.top import scrape

STEPS = 3


def cat_steps(server: LocalServer) -> float:
    seen = scrape(f"http://127.0.0.1:{server.metrics_port}/metrics")
    return seen.total("cinecat_step_seconds_count", tokenization="cat")


def test_a_styled_clip_of_cat_tells_what_its_steps_spent(client: Client, server: LocalServer, photograph: Path) -> None:
    steps_before = cat_steps(server)
    clip = client.generate(
        image=photograph,
        prompt="a cat looks up",
        style="noir:0.5",
        size="128x128",
        frames=17,
        steps=STEPS,
        seed=11,
        tokenization="cat",
        keep_ratio=0.6,
    ).result()
    first, *others = clip.step_tokens
    assert (first, clip.tokens_uniform, len(others)) == (320, 320, STEPS - 1)
    assert 48 <= min(others) < 320
    assert clip.keep_ratio == sum(clip.step_tokens) / STEPS / 320 <= 0.6
    assert clip.tokens_used == round(clip.keep_ratio * 320)
    assert 0.0 < clip.timings["plan"] < clip.timings["denoise"]
    assert any("lossy" in note for note in clip.notes)
    job = client.job(clip.job_id)
    assert job.clip is not None
    assert (job.clip.step_tokens, job.clip.asked_keep_ratio) == (clip.step_tokens, 0.6)
    assert cat_steps(server) == steps_before + STEPS


def test_a_clip_that_is_held_to_a_quality_keeps_what_that_takes(client: Client, photograph: Path) -> None:
    shot = {"image": photograph, "prompt": "a cat", "size": "64x64", "frames": 5, "steps": 3, "tokenization": "cat"}
    strict, loose = (client.generate(target_psnr_db=target, **shot).result() for target in (60, 15))
    assert loose.keep_ratio < strict.keep_ratio <= 1.0
    assert (loose.target_psnr_db, loose.asked_keep_ratio) == (15.0, None)
