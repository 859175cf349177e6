"""Engines of every backend against diffusers, and whether the comparison would see what goes wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cinecat.engines.backends.choice import BACKENDS, find_backend
from cinecat.engines.backends.contract import Engine, StackInputs
from cinecat.engines.backends.parity import TOLERANCES, Case, standard_cases
from cinecat.engines.backends.torch_eager import TorchEngine
from cinecat.engines.denoise import Denoiser, EngineBlocks, Merged
from cinecat.engines.slots import NO_STYLE
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan
from tests.engines.backends.sample_stack import GRIDS, Bench

PROMPTS = tuple(Case(GRIDS[0], keep, (words,), (0,)) for keep in (1.0, 0.5) for words in (0, 9, 511, 512))
CASES = standard_cases(GRIDS) + PROMPTS
COMPILED = [backend.name for backend in BACKENDS if not backend.name.endswith("tensorrt")]
TENSORRT = [backend.name for backend in BACKENDS if backend.name.endswith("tensorrt")]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def gpu_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    return Bench(tmp_path_factory.mktemp("engines"), "float16", "cuda")


def engine_of(bench: Bench, name: str) -> Engine:
    backend = find_backend(name)
    if problem := backend.missing(bench.stack.device):
        pytest.skip(problem)
    return bench.engine(backend)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_predicts_what_diffusers_predicts(bench: Bench, case: Case) -> None:
    outcome = bench.suite.check(TorchEngine(bench.stack), case)
    assert outcome.passed, outcome
    # Far below what is allowed: eager torch differs by rounding alone.
    assert outcome.error < 5e-6


@pytest.mark.parametrize("case", standard_cases(GRIDS[:1]), ids=str)
def test_torch_does_so_in_bfloat16(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    bench = Bench(tmp_path_factory.mktemp("bfloat16"), "bfloat16")
    outcome = bench.suite.check(TorchEngine(bench.stack), case)
    assert outcome.passed, outcome


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_engine_predicts_what_diffusers_predicts(bench: Bench, name: str, case: Case) -> None:
    outcome = bench.suite.check(engine_of(bench, name), case)
    assert outcome.passed, outcome


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", TENSORRT)
@pytest.mark.parametrize("case", standard_cases(GRIDS, most_rows=2), ids=str)
def test_a_tensorrt_engine_predicts_what_diffusers_predicts(
    request: pytest.FixtureRequest, name: str, case: Case
) -> None:
    if problem := find_backend(name).missing(torch.device("cuda")):
        pytest.skip(problem)
    gpu_bench: Bench = request.getfixturevalue("gpu_bench")
    outcome = gpu_bench.suite.check(engine_of(gpu_bench, name), case)
    assert outcome.passed, outcome


def test_a_keep_ratio_of_one_is_the_uniform_path_to_the_bit(bench: Bench) -> None:
    draw = torch.Generator().manual_seed(0)
    latents, prediction = (torch.randn(1, 16, 2, 8, 8, generator=draw) for _ in range(2))
    condition = torch.randn(1, 20, 2, 8, 8, generator=draw)
    denoiser = Denoiser(bench.transformer, EngineBlocks(bench.transformer, TorchEngine(bench.stack), bench.suite.slots))
    text, image = torch.zeros(1, 512, 16), torch.randn(1, 3, 12, generator=draw)
    branch = denoiser.project_context(text, image)
    for worn in (NO_STYLE, bench.suite.worn[1]):
        uniform, merged = (
            denoiser.velocities(latents, condition, torch.tensor(500.0), (branch,), worn, given)[0]
            for given in (None, Merged(TokenPlan.uniform(Grid(2, 4, 4)), prediction))
        )
        assert torch.equal(uniform, merged)


class Wrong:
    """An engine that is given something else than it should be."""

    name = "wrong"

    def __init__(self, engine: Engine, change: str) -> None:
        self._engine, self._change = engine, change

    def covers(self, inputs: StackInputs) -> bool:
        return True

    def __call__(self, inputs: StackInputs) -> Tensor:
        styles = inputs.styles
        if self._change in ("text_bias", "image_values"):
            inputs = replace(inputs, **{self._change: torch.zeros_like(getattr(inputs, self._change))})
        elif self._change == "strengths" and styles is not None:
            inputs = replace(inputs, styles=replace(styles, strengths=styles.strengths * 1.05))
        elif self._change == "slots" and styles is not None:
            inputs = replace(inputs, styles=replace(styles, slots=styles.slots.roll(1)))
        elif self._change == "positions":
            inputs = replace(inputs, rope_cos=inputs.rope_cos.roll(1, 1), rope_sin=inputs.rope_sin.roll(1, 1))
        else:
            inputs = replace(inputs, **{self._change: None})
        return self._engine(inputs)


@pytest.mark.parametrize(
    "change", ["text_bias", "image_values", "key_bias", "styles", "strengths", "slots", "positions"]
)
def test_it_sees_when_an_input_is_ignored_or_wrong(bench: Bench, change: str) -> None:
    mixed_cat = next(case for case in CASES if (case.path, case.wear) == ("cat", "mixed"))
    outcome = bench.suite.check(Wrong(TorchEngine(bench.stack), change), mixed_cat)
    assert outcome.error > 3 * TOLERANCES["float32"]


def test_the_styled_reference_is_that_of_merged_weights(bench: Bench) -> None:
    plain, styled = (Case(GRIDS[0], 1.0, (9,), (style,)) for style in (0, 1))
    expected = bench.suite.expected(styled)[0]
    factors = bench.suite.styles[0]
    weights = {name: bench.suite.reference.get_submodule(name).weight for name in factors}
    kept = {name: weight.clone() for name, weight in weights.items()}
    row = bench.suite.reference_forward(plain)
    try:
        for name, (a, b) in factors.items():
            weights[name] += 0.8 * b @ a
        merged = row()
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])
    assert isinstance(merged, Tensor)
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (bench.suite.expected(plain)[0] - expected).abs().max() > 0.05 * expected.abs().max()


def test_it_sees_a_nan(bench: Bench) -> None:
    class Broken(TorchEngine):
        def __call__(self, inputs: StackInputs) -> Tensor:
            output = super().__call__(inputs)
            output[-1, 0, 0] = torch.nan
            return output

    assert not bench.suite.check(Broken(bench.stack), CASES[2]).passed
