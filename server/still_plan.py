"""What `cinecat plan` does: an image's token plan, as a picture and in figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cinecat.engines.checkpoint import find_checkpoint
from cinecat.server.images import ImageError, decode_image, fit_image
from cinecat.server.settings import Settings


class PlanError(Exception):
    """The image, the size or the ratio is not one that can be planned."""


@dataclass(frozen=True)
class PlanSummary:
    """What was drawn. Sizes in pixels; `histogram` counts tokens by how many patches they have."""

    output: str
    width: int
    height: int
    frames: int
    tokens: int
    tokens_uniform: int
    keep_ratio: float
    histogram: dict[int, int]
    latent_frames: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        sizes = ", ".join(f"{count} of {size}" for size, count in self.histogram.items())
        return (
            f"{self.output}: {self.tokens}/{self.tokens_uniform} tokens, keep ratio {self.keep_ratio:.3f}; "
            f"tokens by their patches: {sizes}; latent frames {' and '.join(map(str, self.latent_frames))}"
        )


def plan_image(
    image: Path, output: Path, *, model: str, device: str, size: tuple[int, int], frames: int, keep_ratio: float
) -> PlanSummary:
    """Plans a still clip of an image, and draws its first latent frame and one in the middle side by side.

    Args:
        model: as in `find_checkpoint`.
        size: width and height of the clip; multiples of 16.

    Raises:
        PlanError, ModelError: naming what is wrong.
        OSError: the image cannot be read, or the picture not be written.
    """
    width, height = size
    if min(size) < 32 or width % 16 or height % 16:
        raise PlanError(f"size: {width}x{height} is not of multiples of 16, 32 or more")
    if frames < 1 or frames % 4 != 1:
        raise PlanError(f"frames: {frames} is not 4k + 1")
    limits = Settings()
    try:
        decoded = decode_image(
            image.read_bytes(),
            max_bytes=limits.max_image_mib * 2**20,
            max_pixels=limits.max_image_megapixels * 10**6,
        )
    except ImageError as error:
        raise PlanError(f"IMAGE: {error}") from error
    frame = fit_image(decoded, width, height).pixels

    from cinecat.engines.model import load_vae
    from cinecat.engines.tokens.drawing import draw_plan
    from cinecat.engines.tokens.still import plan_still

    try:
        plan = plan_still(load_vae(find_checkpoint(model), device), frame, frames, keep_ratio)
    except ValueError as error:
        raise PlanError(f"{error}") from error
    shown = (0,) if plan.grid.frames == 1 else (0, (plan.grid.frames + 1) // 2)
    Image.fromarray(draw_plan(plan, frame, shown)).save(output)
    return PlanSummary(
        output=str(output),
        width=width,
        height=height,
        frames=frames,
        tokens=plan.tokens,
        tokens_uniform=plan.grid.count,
        keep_ratio=plan.keep_ratio,
        histogram=dict(plan.histogram),
        latent_frames=shown,
    )
