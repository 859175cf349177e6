"""`cinecat train-cat` on a micro checkpoint, from a seed to an adapter that style slots serve as it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from cinecat.engines import commands
from cinecat.engines.backends.stack import WanStack
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.denoise import Denoiser, EngineBlocks, Merged
from cinecat.engines.model import load_transformer
from cinecat.engines.slots import StyleSlots
from cinecat.engines.training.cat import session
from cinecat.engines.training.cat.adapter import WEIGHTS_NAME
from cinecat.engines.training.cat.recipe import CatRecipe
from cinecat.engines.training.cat.two_paths import Given, TwoPaths, plan_for
from cinecat.plugins.lora import load_lora


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(commands.train_cat)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def options(micro: Path, folder: Path) -> list[object]:
    amounts = ["--films", 2, "--held-out", 1, "--steps", 6, "--accumulation", 2, "--evaluate-every", 3, "--rank", 2]
    size = ["--sizes", "64x64", "--frames", 9, "--learning-rate", 0.003, "--device", "cpu"]
    return ["--model", micro, "--out", folder / "adapter", "--work", folder / "work", *amounts, *size]


def test_an_adapter_comes_out_that_slots_serve_as_it_was_trained(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[TwoPaths] = []

    def kept(*arguments: object) -> TwoPaths:
        trained.append(TwoPaths(*arguments))  # type: ignore[arg-type]
        return trained[0]

    monkeypatch.setattr(session, "TwoPaths", kept)
    result = run(*options(micro, tmp_path))
    assert result.exit_code == 0, result.output
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} == {WEIGHTS_NAME, "training.csv", "training.png", "README.md"}
    assert "| rung 0.5 | " in (folder / "README.md").read_text()

    draw = torch.Generator().manual_seed(0)
    noisy, prediction = torch.randn(2, 16, 3, 8, 8, generator=draw)
    given = Given(
        torch.randn(20, 3, 8, 8, generator=draw), torch.randn(4, 32, generator=draw), torch.randn(5, 32, generator=draw)
    )
    transformer = load_transformer(find_checkpoint(str(micro)), "cpu", "float32")
    slots = StyleSlots(transformer.blocks, 1, 2, torch.float32)
    denoiser = Denoiser(transformer, EngineBlocks(transformer, TorchEngine(WanStack(transformer)), slots))
    worn = slots.wear({"cat": 1.0}, lambda name: load_lora(folder / WEIGHTS_NAME))
    padded = torch.cat([given.text, torch.zeros(508, 32)])
    with torch.no_grad():
        velocity = denoiser.velocities(
            noisy[None],
            given.condition[None],
            torch.tensor(700.0),
            (denoiser.project_context(padded[None], given.image[None]),),
            worn,
            Merged(plan_for(prediction, 0.5), prediction[None]),
        )[0][0]
        seen = trained[0].clean(noisy, 700.0, given, "", prediction, 0.5, adapted=True)
        plain = trained[0].clean(noisy, 700.0, given, "", prediction, 0.5)
    assert noisy - 0.7 * velocity == pytest.approx(seen, abs=1e-4)
    assert not torch.allclose(plain, seen, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--sizes", "64"], "sizes: '64' is not WIDTHxHEIGHT"),
        (["--sizes", "64x60"], "sizes: 64x60 is not made of multiples of 16"),
        (["--frames", "8"], "frames: 8 is not 4k + 1"),
        (["--styles", "noir"], "styles: 'noir' does not fit micro"),
        (["--styles", "sepia"], "no style 'sepia'"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_computed(
    micro: Path, tmp_path: Path, wrong: list[str], sentence: str
) -> None:
    result = run(*options(micro, tmp_path), *wrong)
    assert result.exit_code == 2
    assert f"train-cat: {sentence}" in result.stderr
    assert not (tmp_path / "work").exists()


def test_an_adapter_is_not_written_over(micro: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    result = run(*options(micro, tmp_path))
    assert result.exit_code == 2
    assert "out: " in result.stderr
    assert "exists; name another folder" in result.stderr


def test_the_recipe_s_rungs_are_those_that_steps_may_have() -> None:
    from cinecat.engines.tokens.schedule import RUNGS

    assert set(CatRecipe().rungs) <= set(RUNGS)
