"""`cinecat plan-capacity`: a table for people, one object for scripts, and options that cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from cinecat.server.plan_capacity import plan_capacity


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(plan_capacity)
    return CliRunner().invoke(app, arguments)


def projection(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("--json", *arguments).stdout)
    return found


SMALL = ("--model", "wan-tiny", "--cards", "4")


def test_scripts_get_every_layout_with_time_memory_and_traffic() -> None:
    found = projection(*SMALL)
    assert found["projection"] is True
    assert (found["model"], found["tokens"], found["dtype"]) == ("wan-tiny", 320, "bfloat16")
    plans = {plan["shard"]: plan for plan in found["plans"]}
    assert plans.keys() == {
        *("none", "ulysses=2", "ring=2", "cfg=2", "ulysses=4", "ring=4", "ulysses=2,ring=2", "ulysses=2,cfg=2"),
        "ring=2,cfg=2",
    }
    both = plans["ulysses=2,ring=2"]
    # 6 layers, 2 rows, 80 tokens of 256 channels on a rank, 2 bytes.
    states = 2 * 80 * 256 * 2
    assert both["step_bytes"]["all_to_all"] == 6 * 4 * states // 2
    assert both["step_bytes"]["ring"] == 6 * 2 * states
    assert both["replicas"] == 1
    assert both["clip_seconds"] > both["step_seconds"] > 0.0
    assert both["memory"]["leader"]["needed"] > both["memory"]["follower"]["needed"]
    assert plans["none"]["memory"]["follower"] is None
    assert all(plan["fits"] for plan in plans.values())
    assert found["auto"] == "cfg=2"
    assert {stop["family"] for stop in found["stops"]} >= {"ulysses", "ring", "cfg=2, ulysses"}
    assert found["calibration"] is None


def test_every_speed_says_where_it_is_from() -> None:
    speeds = projection(*SMALL, "--tflops", "500", "--bandwidth-gbs", "50", "--latency-us", "30")["speeds"]
    assert speeds["linear_flops"] == speeds["attention_flops"] == {"value": 500e12, "source": "given"}
    assert speeds["link_bytes"] == {"value": 50e9, "source": "given"}
    assert speeds["message_seconds"]["value"] == pytest.approx(30e-6)
    assert speeds["vae_flops"]["source"] == "assumed"
    apart = projection(*SMALL, "--tflops", "500", "--attention-tflops", "300")["speeds"]
    assert apart["attention_flops"]["value"] == 300e12


def test_people_read_what_is_projected_and_from_what() -> None:
    result = run(*SMALL)
    assert result.exit_code == 0
    for word in ("SPEEDS", "assumed", "projected", "SHARD", "ulysses=2,ring=2", "DOUBLING RANKS", "gains 0."):
        assert word in result.stdout


def test_one_layout_may_be_asked_for() -> None:
    found = projection(
        *SMALL, "--shard", "ulysses=2", "--no-guidance", "--keep-ratio", "0.5", "--shard-weights", "fsdp"
    )
    (plan,) = found["plans"]
    assert (plan["shard"], plan["replicas"], found["stops"]) == ("ulysses=2", 2, [])
    assert plan["step_bytes"]["weights"] > 0
    assert plan["step_bytes"]["all_to_all"] < 6 * 4 * 160 * 256 * 2 // 2  # all tokens would be so many


def test_cards_that_are_too_small_are_told_and_the_exit_code_is_1() -> None:
    result = run(*SMALL, "--card-memory-gib", "0.5")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--size", "big"], "--size: 'big' is not WIDTHxHEIGHT"),
        (["--size", "100x100"], "--size: 100x100; width and height are multiples of 16"),
        (["--frames", "16"], "--frames: 16; they are 4k + 1"),
        (["--keep-ratio", "1.5"], "--keep-ratio: 1.5 is not above 0"),
        (["--shard", "tensor=2"], "--shard: 'tensor=2' is not none, auto, or ulysses=N"),
        (["--shard", "ulysses=3"], "--shard: ulysses=3 does not divide the model's 4 heads; 1, 2, 4 do"),
        (["--shard", "ring=16"], "--shard: ring=16 takes 16 GPUs, and there are 4"),
        (["--shard", "cfg=2", "--no-guidance"], "--shard: cfg=2 needs two rows"),
        (["--shard", "cfg=2", "--shard-weights", "fsdp"], "--shard-weights: fsdp spreads weights"),
        (["--dtype", "int8"], "--dtype: 'int8' is not one of auto"),
        (["--device", "cpu"], "--device: cpu is where to measure; add --measure"),
        (["--model", "nowhere"], "--model: 'nowhere' is neither"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(arguments: list[str], problem: str) -> None:
    result = run(*SMALL, *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert result.stdout == ""
