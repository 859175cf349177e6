"""What clips a family of models is trained on and makes, and what sizes its checkpoints take."""

from __future__ import annotations

from dataclasses import dataclass

from cinecat.engines.checkpoint import Checkpoint, read_json
from cinecat.engines.errors import SettingError
from cinecat.engines.messages import VAE_TEMPORAL_STRIDE
from cinecat.engines.training.styles.clips import ClipShape

_TINY_FAMILY = "wan2.1-i2v-tiny"


@dataclass(frozen=True)
class Defaults:
    """What holds for a family where nothing else is asked for."""

    shape: ClipShape
    learning_rate: float
    guidance_scale: float


_TINY = Defaults(ClipShape(128, 128, 17, 8.0), learning_rate=2e-3, guidance_scale=1.0)
_LARGE = Defaults(ClipShape(832, 480, 81, 16.0), learning_rate=1e-4, guidance_scale=5.0)


def defaults(checkpoint: Checkpoint) -> Defaults:
    """Of the checkpoint's family."""
    return _TINY if checkpoint.family == _TINY_FAMILY else _LARGE


def check_shape(shape: ClipShape, checkpoint: Checkpoint) -> None:
    """Raises SettingError for a shape that the model cannot take."""
    transformer = read_json(checkpoint.folder / "transformer" / "config.json")
    vae = read_json(checkpoint.folder / "vae" / "config.json")
    multiple = int(vae.get("scale_factor_spatial") or 8) * int(transformer["patch_size"][1])
    positions = int(transformer.get("rope_max_seq_len") or 1024)
    for name, pixels in (("width", shape.width), ("height", shape.height)):
        if pixels < multiple or pixels % multiple or pixels > multiple * positions:
            raise SettingError(
                f"{name}: {pixels} is not a multiple of {multiple} from {multiple} to {multiple * positions}"
            )
    most = (positions - 1) * VAE_TEMPORAL_STRIDE + 1
    if shape.frames < 1 or (shape.frames - 1) % VAE_TEMPORAL_STRIDE or shape.frames > most:
        raise SettingError(f"frames: {shape.frames} is not 4k + 1, such as 17 or 81, up to {most}")
    if not 0 < shape.fps <= 240:
        raise SettingError(f"fps: {shape.fps:g} is not above 0 and at most 240")
