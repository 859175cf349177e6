"""CLIP-SIM: how near two clips are in what CLIP sees, from a checkpoint that the user brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel

from cinecat.engines.quality.weights import WeightsError

Frames = NDArray[np.uint8]

_CHUNK = 16
"""Frames at once."""


class ClipSimilarity:
    """The mean over frames of the cosine between CLIP's embeddings of a frame and its twin: 1 for equal clips."""

    def __init__(self, model: CLIPModel, processor: CLIPImageProcessorPil) -> None:
        self._model = model
        self._processor = processor

    @torch.inference_mode()
    def __call__(self, a: Frames, b: Frames) -> float:
        """Of two clips uint8 [frames, height, width, 3] with equally many frames."""
        cosines = [
            functional.cosine_similarity(
                self._embedded(a[start : start + _CHUNK]), self._embedded(b[start : start + _CHUNK])
            )
            for start in range(0, len(a), _CHUNK)
        ]
        return float(torch.cat(cosines).mean())

    def _embedded(self, frames: Frames) -> Any:
        pictures = self._processor(images=list(frames), return_tensors="pt")["pixel_values"]
        return self._model.get_image_features(pixel_values=pictures).pooler_output


def load_clip_similarity(folder: Path) -> ClipSimilarity:
    """Reads a CLIP checkpoint in transformers' layout. Raises WeightsError for a folder that holds none."""
    if not folder.is_dir():
        raise WeightsError(f"clip-weights: {folder} is not a folder; name one with config.json and model.safetensors")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"clip-weights: {folder} cannot be loaded as a CLIP checkpoint ({error})") from error
    return ClipSimilarity(model.eval().requires_grad_(False), processor)
