"""A token plan: a partition of the transformer's base patches into tokens. Plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors.torch import load, save
from torch import Tensor

from cinecat.engines.tokens.grid import Grid


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Which token each patch belongs to.

    Attributes:
        grid: the patches.
        leaders: int64 [grid.count], the first patch of each patch's token, so equal partitions have equal tensors.
            Patches count in raster order: time, then height, then width.
    """

    grid: Grid
    leaders: Tensor

    @classmethod
    def uniform(cls, grid: Grid, device: torch.device | str = "cpu") -> TokenPlan:
        """Every patch is a token."""
        return cls(grid, torch.arange(grid.count, device=device))

    @classmethod
    def from_labels(cls, grid: Grid, labels: Tensor) -> TokenPlan:
        """Patches with equal labels share a token.

        Args:
            labels: integers [grid.count].

        Raises:
            ValueError: there are more or fewer labels than patches.
        """
        if labels.shape != (grid.count,):
            raise ValueError(f"labels: {tuple(labels.shape)} for a grid of {grid.count} patches")
        _, token = torch.unique(labels, return_inverse=True)
        patches = torch.arange(grid.count, device=labels.device)
        first = torch.full((grid.count,), grid.count, device=labels.device).scatter_reduce_(0, token, patches, "amin")
        return cls(grid, first[token])

    @cached_property
    def _patches(self) -> Tensor:
        return torch.arange(self.grid.count, device=self.leaders.device)

    @cached_property
    def tokens(self) -> int:
        """Tokens of the plan."""
        return int((self.leaders == self._patches).sum())

    @property
    def keep_ratio(self) -> float:
        """Tokens over those of the uniform path."""
        return self.tokens / self.grid.count

    @property
    def is_uniform(self) -> bool:
        return self.tokens == self.grid.count

    @cached_property
    def token_of(self) -> Tensor:
        """int64 [grid.count]: the token of each patch; tokens count in the order of their first patches."""
        return ((self.leaders == self._patches).cumsum(0) - 1)[self.leaders]

    @cached_property
    def sizes(self) -> Tensor:
        """int64 [tokens]: patches in each token."""
        return torch.bincount(self.token_of, minlength=self.tokens)

    @cached_property
    def members(self) -> Tensor:
        """int64 [tokens, largest size]: the patches of each token, in order; where there are no more, `grid.count`.

        A gather over it sums in a fixed order, which atomics on a GPU do not.
        """
        order = torch.argsort(self.token_of, stable=True)
        first = self.sizes.cumsum(0) - self.sizes
        place = self._patches - first[self.token_of[order]]
        members = self.leaders.new_full((self.tokens, int(self.sizes.max())), self.grid.count)
        members[self.token_of[order], place] = order
        return members

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each token's patches: [rows, grid.count, channels] to [rows, tokens, channels]."""
        padded = torch.cat([values, values.new_zeros(values.shape[0], 1, values.shape[2])], dim=1)
        total = padded[:, self.members[:, 0]]
        for place in range(1, self.members.shape[1]):
            total = total + padded[:, self.members[:, place]]
        return total / self.sizes.to(values.dtype).view(1, -1, 1)

    def spread(self, values: Tensor) -> Tensor:
        """Each token's value for all its patches: [rows, tokens, channels] to [rows, grid.count, channels]."""
        return values[:, self.token_of]

    @cached_property
    def positions(self) -> Tensor:
        """Mean frame, row and column of each token's patches, float32 [tokens, 3]."""
        return self.mean(self.grid.positions(self.leaders.device)[None])[0]

    @property
    def histogram(self) -> Mapping[int, int]:
        """How many tokens have how many patches."""
        counts = torch.bincount(self.sizes)
        return {size: int(count) for size, count in enumerate(counts) if count}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the grid and the partition, in hexadecimal."""
        shape = f"{self.grid.frames}x{self.grid.height}x{self.grid.width}:".encode()
        return hashlib.sha256(shape + self.leaders.cpu().numpy().astype("<i8").tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_bytes(self) -> bytes:
        """The plan as a safetensors file."""
        grid = torch.tensor([self.grid.frames, self.grid.height, self.grid.width])
        data: bytes = save({"grid": grid, "leaders": self.leaders.cpu().to(torch.int32)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenPlan:
        """The plan that `to_bytes` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            tensors = load(data)
            frames, height, width = tensors["grid"].tolist()
            leaders = tensors["leaders"].long()
        except Exception as error:
            raise ValueError(f"token plan: cannot be read: {error}") from error
        grid = Grid(frames, height, width)
        valid = leaders.shape == (grid.count,) and bool((leaders >= 0).all())
        if not valid or bool((leaders > torch.arange(grid.count)).any()) or bool((leaders[leaders] != leaders).any()):
            raise ValueError("token plan: is no partition of its grid")
        return cls(grid, leaders)
