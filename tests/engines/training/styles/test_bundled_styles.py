"""The bundled styles do what they are for: each is plainly visible, grows with its strength and keeps the motion."""

from __future__ import annotations

import statistics

import pytest

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.messages import CoreConfig, StyleUse
from cinecat.engines.training.evaluation import Sampling, generate
from cinecat.engines.training.film import HELD_OUT
from cinecat.engines.training.styles.looks import STATISTICS, Frames, Look, moves
from cinecat.plugins.registry import BUNDLED, StyleRegistry

FRAMES, SIDE, SHOTS = 17, 128, 16
SAMPLING = Sampling(steps=8, guidance_scale=1.0)


@pytest.fixture(scope="module")
def core() -> EngineCore:
    config = CoreConfig("wan-tiny", "cpu", "float32", 0, style_slots=3, max_rank=8, cache_bytes=2**28)
    return EngineCore(find_checkpoint("wan-tiny"), config)


@pytest.mark.slow
@pytest.mark.parametrize("name", STATISTICS)
def test_a_bundled_style_is_plainly_visible_grows_with_its_strength_and_keeps_the_motion(
    core: EngineCore, name: str
) -> None:
    look = Look(name)
    style = next(style for style in StyleRegistry([BUNDLED]).styles() if style.manifest.name == name)
    films = look.judged_films(HELD_OUT, SHOTS, FRAMES, SIDE, lambda scene: True)

    def clips(strength: float) -> list[Frames]:
        use = StyleUse(str(style.weights_path), style.fingerprint, strength)
        return [generate(core, film.first_frame, film.caption, FRAMES, SAMPLING, (use,)) for film in films]

    clips_at = {strength: clips(strength) for strength in (0.0, 0.5, 1.0)}
    effects = {
        strength: [look.effect(clip, film) for clip, film in zip(made, films, strict=True)]
        for strength, made in clips_at.items()
    }
    means = [statistics.mean(each) for each in effects.values()]
    moved, plain = (
        [moves(clip, film.scene.direction or "") for clip, film in zip(clips_at[strength], films, strict=True)]
        for strength in (1.0, 0.0)
    )
    print(f"{name}: effect {means}, least {min(effects[1.0]):.2f}; moves {sum(moved)}, plain {sum(plain)} of {SHOTS}")
    # A few of so few shots fall either way by the noise alone; docs/styles.md has the counts.
    assert sum(moved) >= 0.75 * sum(plain)
    assert means[2] >= 0.5
    assert means[0] < means[1] < means[2]
    assert sum(low < high for low, high in zip(effects[0.5], effects[1.0], strict=True)) >= SHOTS - 1
