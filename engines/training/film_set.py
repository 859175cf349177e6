"""The film set as a folder of captioned videos, such as `cinecat train-style` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.engines.core import EngineCore
from cinecat.engines.messages import CoreConfig
from cinecat.engines.training.evaluation import Sampling, generate
from cinecat.engines.training.film import Clip, make_clip
from cinecat.engines.training.grades import GRADES, plain
from cinecat.engines.training.scenes import Kind
from cinecat.engines.training.styles.clips import SEED_SUFFIX, ClipShape
from cinecat.engines.training.styles.sizes import check_shape, defaults

_MODEL_STEPS = 12

Played = Callable[[Clip, int], NDArray[np.uint8]]
"""Makes a model's own clip of a film, [frames, height, width, 3], from the noise of a seed."""


def played_by(model: str, shape: ClipShape) -> Played:
    """What a model makes of the first frame and the caption of a film, without any style.

    Args:
        model: as in `find_checkpoint`.

    Raises:
        EngineError: it cannot be loaded, or cannot make clips of that shape.
    """
    checkpoint = find_checkpoint(model)
    check_shape(shape, checkpoint)
    config = CoreConfig(model, "auto", "auto", threads=0, style_slots=1, max_rank=1, cache_bytes=0)
    core = EngineCore(checkpoint, config)
    guidance = defaults(checkpoint).guidance_scale

    def play(film: Clip, seed: int) -> NDArray[np.uint8]:
        sampling = Sampling(_MODEL_STEPS, guidance, seed)
        return generate(core, film.first_frame, film.caption, len(film.frames), sampling)

    return play


def write_film_set(
    folder: Path,
    clips: int,
    grade: str,
    shape: ClipShape,
    first_seed: int = 0,
    kinds: Sequence[Kind] = (),
    made: Callable[[], None] = lambda: None,
    play: Played | None = None,
) -> None:
    """Writes films film-0000.mp4, film-0001.mp4, ... with a caption beside each as .txt.

    Where they are graded, the first frame as it was before comes with them as .png: a style is worn on pictures that do
    not have its look yet.

    Args:
        folder: made where it is missing.
        grade: a key of GRADES.
        first_seed: of the first film; the others follow.
        kinds: of the films, in turn; empty draws them as the set does.
        made: called after every film.
        play: makes the clips that are graded, in place of the films, whose seeds become those of the noise: that is
            written beside each as .seed, and the film's first frame as .png.

    Raises:
        FileExistsError: a film of such a name is there already.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.glob("film-*.mp4"), None) is not None:
        raise FileExistsError(f"{folder} holds films already; name another folder")
    for index in range(clips):
        kind = kinds[index % len(kinds)] if kinds else None
        film = make_clip(first_seed + index, shape.frames, shape.height, shape.width, kind=kind)
        path = folder / f"film-{index:04d}.mp4"
        if play is None:
            write_film(path, film, grade, shape.fps)
        else:
            write_film(path, replace(film, frames=play(film, first_seed + index)), grade, shape.fps)
            Image.fromarray(film.first_frame).save(path.with_suffix(".png"))
            path.with_suffix(SEED_SUFFIX).write_text(f"{first_seed + index}\n", encoding="utf-8")
        made()


def write_film(path: Path, film: Clip, grade: str, fps: float) -> None:
    """Writes a film in a look, with its caption and, where it is graded, its first frame as it was.

    Raises:
        OSError: a file cannot be written.
    """
    write_video(path, GRADES[grade](film.frames), fps)
    if GRADES[grade] is not plain:
        Image.fromarray(film.first_frame).save(path.with_suffix(".png"))
    path.with_suffix(".txt").write_text(f"{film.caption}\n", encoding="utf-8")


def write_video(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Writes frames [frames, height, width, 3] as nearly lossless H.264 in full colour resolution (4:4:4).

    Raises:
        OSError: the file cannot be written.
    """
    rate = Fraction(fps).limit_denominator(1001)
    reformatter = VideoReformatter()
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "6"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for index, frame in enumerate(frames):
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
                format="yuv444p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
