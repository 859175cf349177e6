"""Which rank a style needs: one look trained at several ranks, worn on shots like and unlike what it has seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cinecat.engines.checkpoint import Checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.messages import CoreConfig, StyleUse
from cinecat.engines.model import load_encoders, load_transformer, schedule_shift
from cinecat.engines.quality.comparison import Meter
from cinecat.engines.training.evaluation import Sampling, follows, generate
from cinecat.engines.training.film import HELD_OUT, Clip
from cinecat.engines.training.film_set import write_film
from cinecat.engines.training.progress import Journal, training_bar
from cinecat.engines.training.scenes import Kind, Scene
from cinecat.engines.training.styles.clips import ClipShape, find_clips
from cinecat.engines.training.styles.encoded import EncodedClip, encode_clips
from cinecat.engines.training.styles.looks import Look, draw_films
from cinecat.engines.training.styles.plugin import save_lora
from cinecat.engines.training.styles.recipe import StyleRecipe
from cinecat.engines.training.styles.trainer import train_style
from cinecat.plugins.fingerprint import fingerprint

UNSEEN_SHAPES = frozenset({"ring", "cross", "heart"})
UNSEEN_COLOURS = frozenset({"cyan", "pink"})
UNSEEN_WALLS = frozenset({"checkered", "cluttered"})
"""What no film that the style is trained on shows, and every cross-domain shot does; the base model knows them all."""

_TRAINED_KINDS: tuple[Kind, ...] = ("slide", "still", "turn", "grow")


@dataclass(frozen=True)
class RankWork:
    """The fixed work.

    Attributes:
        grade: the look; a key of looks.STATISTICS.
        targets: as in StyleRecipe.
        scale: alpha over rank, the same for every rank.
        films, held_out: trained on, and measured for the validation loss.
        shots: of each domain.
        steps, learning_rate: of the training.
        sampling_steps: of each generated shot.
        side, frames, fps: of all films.
    """

    grade: str = "noir"
    targets: str = "all"
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    scale: float = 2.0
    films: int = 36
    held_out: int = 2
    shots: int = 5
    steps: int = 110
    learning_rate: float = 2e-3
    sampling_steps: int = 8
    side: int = 128
    frames: int = 17
    fps: float = 8.0

    @property
    def look(self) -> Look:
        return Look(self.grade)

    def recipe(self, rank: int) -> StyleRecipe:
        return StyleRecipe(
            rank=rank,
            alpha=self.scale * rank,
            targets=self.targets,
            steps=self.steps,
            learning_rate=self.learning_rate,
            evaluate_every=max(1, self.steps // 2),
            checkpoint_activations=False,
        )


@dataclass(frozen=True)
class StyledShot:
    """One held-out shot in the style, against the film in the grade.

    Attributes:
        effect: how far the grade's statistic has gone from the plain film (0) to the graded one (1).
        follows: whether the subject moves as the caption says.
        scores: metrics of engines.quality by name, of the pair and of the generated clip.
        true_motion_score: MotionScore of the graded film.
    """

    effect: float
    follows: bool
    scores: dict[str, float]
    true_motion_score: float


@dataclass(frozen=True)
class RankResult:
    """One rank; rank 0 is the model without a style.

    Attributes:
        parameters: of the LoRA.
        validation_loss: of the weights that are kept.
        seconds_per_step: of the training; NaN without one.
        in_domain, cross_domain: the shots, the same for every rank.
    """

    rank: int
    parameters: int
    validation_loss: float
    seconds_per_step: float
    in_domain: tuple[StyledShot, ...]
    cross_domain: tuple[StyledShot, ...]

    @property
    def shots(self) -> tuple[StyledShot, ...]:
        return self.in_domain + self.cross_domain


def study_ranks(checkpoint: Checkpoint, work: RankWork, folder: Path) -> list[RankResult]:
    """Trains the style at every rank and measures what it does, the model without a style first.

    Args:
        folder: for films, encodings, checkpoints and styles; empty.
    """
    shape = ClipShape(work.side, work.side, work.frames, work.fps)
    encoded = _encoded_films(checkpoint, work, shape, folder)
    train, held_out = encoded[work.held_out :], encoded[: work.held_out]
    config = CoreConfig(
        checkpoint.name, "cpu", "float32", 0, style_slots=1, max_rank=max(work.ranks), cache_bytes=2**28
    )
    stage = _Stage(EngineCore(checkpoint, config), work)
    results = []
    plain_loss = math.nan
    for rank in work.ranks:
        transformer = load_transformer(checkpoint, "cpu", "float32")
        layers = len(transformer.blocks)
        recipe = work.recipe(rank)
        journal = Journal(folder, f"rank-{rank}")
        style = train_style(
            transformer, train, held_out, recipe, schedule_shift(checkpoint), journal, math.inf, cpu=True
        )
        plain_loss = style.first_loss
        path = folder / f"rank-{rank}.safetensors"
        save_lora(path, style.factors, recipe.lora_config(layers))
        worn = StyleUse(str(path), fingerprint(path), 1.0)
        in_domain, cross_domain = stage.play((worn,), f"rank {rank}")
        results.append(
            RankResult(
                rank=rank,
                parameters=sum(factor.numel() for factor in style.factors.values()),
                validation_loss=style.loss,
                seconds_per_step=style.seconds / max(1, style.steps),
                in_domain=in_domain,
                cross_domain=cross_domain,
            )
        )
    in_domain, cross_domain = stage.play((), "no style")
    return [RankResult(0, 0, plain_loss, math.nan, in_domain, cross_domain), *results]


@dataclass(frozen=True)
class _AskedShot:
    """A held-out film, and the same in the grade with its MotionScore."""

    film: Clip
    truth: Clip
    true_motion_score: float


class _Stage:
    """The held-out shots, and a core to play them with."""

    def __init__(self, core: EngineCore, work: RankWork) -> None:
        self._core = core
        self._work = work
        self._meter = Meter()
        self._domains = tuple(
            [self._asked(film) for film in work.look.judged_films(HELD_OUT, work.shots, work.frames, work.side, fits)]
            for fits in (_seen, _unseen)
        )

    def play(self, styles: tuple[StyleUse, ...], title: str) -> tuple[tuple[StyledShot, ...], tuple[StyledShot, ...]]:
        """The shots of both domains."""
        played: list[tuple[StyledShot, ...]] = []
        with training_bar(f"{title}: clips", 0, sum(map(len, self._domains))) as move:
            done = 0
            for asked_shots in self._domains:
                shots = []
                for asked in asked_shots:
                    shots.append(self._shot(asked, styles))
                    done += 1
                    move(done, "")
                played.append(tuple(shots))
        in_domain, cross_domain = played
        return in_domain, cross_domain

    def _asked(self, film: Clip) -> _AskedShot:
        truth = self._work.look.graded(film)
        motion = self._meter.of_clip(truth.frames, self._work.fps).get("motion_score", math.nan)
        return _AskedShot(film, truth, motion)

    def _shot(self, asked: _AskedShot, styles: tuple[StyleUse, ...]) -> StyledShot:
        work, film, truth = self._work, asked.film, asked.truth
        sampling = Sampling(work.sampling_steps, guidance_scale=1.0)
        clip = generate(self._core, film.first_frame, film.caption, work.frames, sampling, styles)
        return StyledShot(
            effect=work.look.effect(clip, film),
            follows=follows(truth, clip, film.scene.direction or ""),
            scores=self._meter.of_pair(clip, truth.frames) | self._meter.of_clip(clip, work.fps),
            true_motion_score=asked.true_motion_score,
        )


def _encoded_films(checkpoint: Checkpoint, work: RankWork, shape: ClipShape, folder: Path) -> list[EncodedClip]:
    films = folder / "films"
    films.mkdir()
    count = work.held_out + work.films
    for index, film in enumerate(draw_films(0, count, _TRAINED_KINDS, work.frames, work.side, _seen)):
        write_film(films / f"film-{index:04d}.mp4", film, work.grade, work.fps)
    clips, problems = find_clips(films, shape)
    if problems:
        raise RuntimeError(f"a film cannot be trained on: {problems[0]}")
    captions = [clip.caption for clip in clips]
    with training_bar("films", 0, count) as move:
        return encode_clips(
            lambda: load_encoders(checkpoint, "cpu", "float32"),
            clips,
            captions,
            shape,
            f"{checkpoint.fingerprint} float32",
            folder / "clips",
            lambda done: move(done, ""),
        )


def _seen(scene: Scene) -> bool:
    """Whether a scene shows nothing that is kept from the training."""
    return scene.wall.kind not in UNSEEN_WALLS and not any(
        thing.shape in UNSEEN_SHAPES or thing.colour in UNSEEN_COLOURS for thing in scene.things
    )


def _unseen(scene: Scene) -> bool:
    """Whether shapes, colours and wall are all such as the training does not show."""
    return scene.wall.kind in UNSEEN_WALLS and all(
        thing.shape in UNSEEN_SHAPES and thing.colour in UNSEEN_COLOURS for thing in scene.things
    )
