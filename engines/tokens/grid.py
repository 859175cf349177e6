"""The patches of a latent video, counted. Free of torch, since the front plans with it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Grid:
    """The base (1, 2, 2) patches of a latent video, counted along time, height and width."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"grid: {self.frames}x{self.height}x{self.width} holds no patch")

    @property
    def count(self) -> int:
        """Patches, which is what the uniform path spends in tokens."""
        return self.frames * self.height * self.width

    @property
    def frame_count(self) -> int:
        """Patches of one latent frame."""
        return self.height * self.width

    @property
    def least(self) -> int:
        """Tokens with every region of 2x2x2 patches merged into one; the first latent frame is a layer of its own."""
        return (1 + self.frames // 2) * ((self.height + 1) // 2) * ((self.width + 1) // 2)

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Frame, row and column of every patch, float32 [count, 3]."""
        import torch

        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in (self.frames, self.height, self.width)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
