"""Pictures of a clip in the making: which ones a caller wants, and those that arrive."""

from dataclasses import dataclass, field

from cinecat.v1 import job_pb2


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Which pictures the events of a job carry.

    After every `every_steps` denoising steps, at most the clip's, an estimate of what the clip will be; 0 is never.
    With `frames`, every frame as soon as it is decoded.
    """

    every_steps: int = 0
    frames: bool = False


@dataclass(frozen=True)
class PreviewFrame:
    """A frame of the clip, counted from 0, as a WebP file."""

    index: int
    webp: bytes = field(repr=False)


@dataclass(frozen=True)
class Preview:
    """Small pictures of a clip. `step` is the denoising step whose estimate they are, 0 where they are decoded frames.

    An estimate has a pixel for each 8x8 of the clip's and a picture for every fourth frame: 0, 4, 8 and so on.
    """

    step: int
    frames: tuple[PreviewFrame, ...]

    @property
    def is_estimate(self) -> bool:
        return self.step > 0


def previews_from_proto(previews: job_pb2.Previews) -> Previews:
    return Previews(every_steps=previews.every_steps, frames=previews.frames)


def preview_from_proto(event: job_pb2.JobEvent) -> Preview | None:
    """The pictures that came with `event`, None where there are none."""
    if not event.HasField("preview"):
        return None
    frames = tuple(PreviewFrame(frame.index, frame.webp) for frame in event.preview.frames)
    return Preview(event.preview.step, frames)
