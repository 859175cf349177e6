"""Styles of a server with several models: what one of them can wear is offered, and says by which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.server.style_models import StyleModels
from cinecat.server.styles import StyleCatalogue
from tests.server.samples import TARGETS, model_info

WIDE = {name: (2 * inside, 2 * outside) for name, (inside, outside) in TARGETS.items()}


def served(*models: tuple[str, dict[str, tuple[int, int]], int]) -> StyleModels:
    registry = StyleRegistry([BUNDLED])
    catalogues = [
        StyleCatalogue(registry, replace(model_info(rank, targets), name=name)) for name, targets, rank in models
    ]
    return StyleModels(lambda: catalogues)


def test_a_style_that_one_model_can_wear_is_offered_for_that_one() -> None:
    styles = served(("wide", WIDE, 32), ("tiny", TARGETS, 32))
    noir = styles.find("noir")
    assert styles.incompatibility(noir) == ""
    assert styles.wearers(noir.manifest, noir.header) == ["tiny"]
    assert styles.ignored(noir.manifest, noir.header) == ()


@pytest.mark.parametrize("twice", [False, True])
def test_a_style_that_no_model_can_wear_says_why_of_each(twice: bool) -> None:
    styles = served(("wide", WIDE, 32), ("narrow", TARGETS, 1), *([("wide", WIDE, 32)] * twice))
    noir = styles.find("noir")
    assert styles.wearers(noir.manifest, noir.header) == []
    first, second = styles.incompatibility(noir).split("; ", 1)
    assert "wide (wan2.1-i2v-tiny) has 512" in first
    assert "is more than a slot holds (1; the setting max_rank raises it)" in second
