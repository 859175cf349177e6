"""The optimiser: every direction of an update counts alike, and the best average is what training ends with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cinecat.engines.training.average import BestAverage
from cinecat.engines.training.muon import Muon, Optimisers, orthogonal


@given(rows=st.integers(2, 24), columns=st.integers(2, 24), scale=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_singular_values_come_near_one_at_any_scale(rows: int, columns: int, scale: float, seed: int) -> None:
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed + size)))[0]
        for size in (rows, columns)
    )
    rank = min(rows, columns)
    matrix = scale * left[:, :rank] @ torch.diag(torch.linspace(0.3, 1.0, rank)) @ right[:rank]
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_step_has_the_learning_rate_s_size_whatever_the_gradient_s() -> None:
    kernel = nn.Parameter(torch.zeros(8, 4, 2))
    kernel.grad = 1e-6 * torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(1))
    Muon([kernel], lr=0.1).step()
    assert torch.linalg.matrix_norm(kernel.detach().flatten(1), ord=2) == pytest.approx(0.1, rel=0.3)


def test_a_parameter_without_a_gradient_stays() -> None:
    kernel = nn.Parameter(torch.ones(4, 4))
    Muon([kernel], lr=0.1).step()
    assert torch.equal(kernel.detach(), torch.ones(4, 4))


def test_every_parameter_is_trained_once() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    optimisers = Optimisers(model, 0.1, 0.01, (0.9, 0.99), adam_names=("2.",))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(7, 6, generator=torch.Generator().manual_seed(2))).square().sum().backward()
    optimisers.step(1.0)
    moved = [float((p.detach() - old).abs().max()) for p, old in zip(model.parameters(), before, strict=True)]
    assert min(moved) > 0.0
    assert max(moved[1:]) <= 0.0101  # AdamW: the rate; the first matrix is Muon's
    assert moved[0] > 0.0101
    assert all(p.grad is None for p in model.parameters())


def test_the_best_average_is_given_back() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = BestAverage(model, decay=0.0)
    for value, loss in ((1.0, 3.0), (2.0, 1.0), (5.0, 2.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.follow(model, step=1)
        average.offer(loss)
    average.give(model)
    assert model.weight.item() == pytest.approx(2.0)
