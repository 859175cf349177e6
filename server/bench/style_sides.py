"""The sides of `cinecat bench styles`: a transformer with style slots, and diffusers' three ways to change a LoRA.

All of them start from the same checkpoint and hold the same files in memory, as each reads them, so that a change of
style can be measured without the disk. torch is imported where it is used: the server's rooms load without it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cinecat.plugins.lora import load_lora

if TYPE_CHECKING:
    from torch import Tensor

    from cinecat.engines.slots import Worn

_ADAPTER = "worn"


@dataclass(frozen=True)
class ClipShape:
    """Sizes of a clip in pixels; frames = 4k + 1."""

    width: int
    height: int
    frames: int


def write_styles(folder: Path, targets: Mapping[str, tuple[int, int]], ranks: Sequence[int]) -> list[Path]:
    """Writes one random LoRA of all targets for each rank, in the layout of diffusers.

    Args:
        targets: (in, out) features by module path.
    """
    import torch
    from safetensors.torch import save_file

    paths = []
    for number, rank in enumerate(ranks):
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for target, (n, m) in targets.items():
            tensors[f"transformer.{target}.lora_A.weight"] = torch.randn(rank, n, generator=draw) / n**0.5
            tensors[f"transformer.{target}.lora_B.weight"] = 0.1 * torch.randn(m, rank, generator=draw)
        paths.append(folder / f"style-{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def shot_inputs(pipeline: Any, shape: ClipShape, rows: int) -> dict[str, Tensor]:
    """What one forward of the pipeline's transformer reads, for `rows` different shots, float32."""
    import torch

    config, vision = pipeline.transformer.config, pipeline.image_encoder.config
    stride = pipeline.vae.config.scale_factor_spatial
    latents = ((shape.frames - 1) // 4 + 1, shape.height // stride, shape.width // stride)
    image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(rows, config.in_channels, *latents, generator=draw),
        "encoder_hidden_states": torch.randn(rows, 512, config.text_dim, generator=draw),
        "encoder_hidden_states_image": torch.randn(rows, image_tokens, config.image_dim, generator=draw),
        "timestep": torch.full((rows,), 500.0),
    }


def predict(transformer: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """One forward: velocities [rows, 16, latent frames, height / 8, width / 8]."""
    import torch

    with torch.inference_mode():
        velocities: Tensor = transformer(**inputs, return_dict=False)[0]
    return velocities


class Slotted:
    """Ours: a transformer whose blocks read styles from slots."""

    def __init__(self, transformer: Any, slots: int, max_rank: int) -> None:
        """Takes a copy of the transformer."""
        import torch

        from cinecat.engines.slots import StyleSlots

        self.transformer = copy.deepcopy(transformer)
        self.slots = StyleSlots(self.transformer.blocks, slots, max_rank, torch.float32)
        self._paths: dict[str, Path] = {}
        self._hashes: dict[str, str] = {}
        self._read: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def learn(self, paths: Sequence[Path]) -> None:
        """Reads styles into memory, under the names of their files."""
        self._paths = {path.stem: path for path in paths}
        self._hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self._paths.items()}
        self._read = {name: load_lora(path) for name, path in self._paths.items()}

    def choose(self, name: str) -> Worn:
        """Makes a style that is in memory ready for the next forward of one row; nothing is copied when resident."""
        return self._choose(name, self._read.__getitem__)

    def choose_from_file(self, name: str) -> Worn:
        """The same as the engine core does it for a style that it does not hold: hash the file, read it, copy."""
        return self._choose(name, lambda wanted: load_lora(self._paths[wanted], self._hashes[wanted]))

    def dress(self, rows: Sequence[Worn]) -> None:
        """Says what the rows of the coming forwards wear."""
        self.slots.dress(list(rows))

    def _choose(self, name: str, load: Callable[[str], dict[str, tuple[Tensor, Tensor]]]) -> Worn:
        import torch

        with torch.inference_mode():
            worn = self.slots.wear({name: 1.0}, load)
            self.slots.take_off(worn)
            self.slots.dress([worn])
        return worn


class _Diffusers:
    """A pipeline with a transformer of its own, and the styles' files and tensors."""

    def __init__(self, pipeline: Any, paths: Sequence[Path]) -> None:
        from safetensors.torch import load_file

        parts = {**pipeline.components, "transformer": copy.deepcopy(pipeline.transformer)}
        self.pipeline = type(pipeline)(**parts)
        self._paths = {path.stem: path for path in paths}
        self._tensors = {name: load_file(path) for name, path in self._paths.items()}

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer


class Hotswapped(_Diffusers):
    """`load_lora_weights(hotswap=True)` into one adapter, padded to the highest rank."""

    def __init__(self, pipeline: Any, paths: Sequence[Path], max_rank: int) -> None:
        super().__init__(pipeline, paths)
        self.pipeline.enable_lora_hotswap(target_rank=max_rank, check_compiled="ignore")
        self.pipeline.load_lora_weights(dict(self._tensors[paths[0].stem]), adapter_name=_ADAPTER)

    def choose(self, name: str) -> None:
        self.pipeline.load_lora_weights(dict(self._tensors[name]), adapter_name=_ADAPTER, hotswap=True)

    def choose_from_file(self, name: str) -> None:
        self.pipeline.load_lora_weights(str(self._paths[name]), adapter_name=_ADAPTER, hotswap=True)


class AdaptersSet(_Diffusers):
    """All styles loaded as adapters, one of them active by `set_adapters`."""

    def __init__(self, pipeline: Any, paths: Sequence[Path]) -> None:
        super().__init__(pipeline, paths)
        for name, tensors in self._tensors.items():
            self.pipeline.load_lora_weights(dict(tensors), adapter_name=name)

    def choose(self, name: str) -> None:
        self.pipeline.set_adapters(name)


class Reloaded(_Diffusers):
    """The adapter deleted, and the next one loaded in its place."""

    def __init__(self, pipeline: Any, paths: Sequence[Path]) -> None:
        super().__init__(pipeline, paths)
        self.pipeline.load_lora_weights(dict(self._tensors[paths[0].stem]), adapter_name=_ADAPTER)

    def choose(self, name: str) -> None:
        self.pipeline.delete_adapters(_ADAPTER)
        self.pipeline.load_lora_weights(dict(self._tensors[name]), adapter_name=_ADAPTER)


class Denoising:
    """One request between two steps, the same on every side."""

    def __init__(self, pipeline: Any, inputs: Mapping[str, Tensor], steps: int, style: str) -> None:
        """`inputs` of one row; its first 16 channels are the noise to begin with."""
        self._inputs = dict(inputs)
        self._channels = pipeline.transformer.config.out_channels
        self._latents = inputs["hidden_states"][:, : self._channels]
        self._scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        self._scheduler.set_timesteps(steps)
        self._step = 0
        self.style = style

    def advance(self, transformer: Any) -> None:
        import torch

        timestep = self._scheduler.timesteps[self._step]
        with torch.inference_mode():
            known = self._inputs["hidden_states"][:, self._channels :]
            self._inputs["hidden_states"] = torch.cat([self._latents, known], dim=1)
            self._inputs["timestep"] = timestep.expand(1).float()
            velocity = predict(transformer, self._inputs)
            self._latents = self._scheduler.step(velocity, timestep, self._latents, return_dict=False)[0]
        self._step += 1
