"""Spends a budget of tokens where a clip's content needs them.

The grid is cut into regions of 2x2x2 patches; the first latent frame, which is known, is a layer of regions of its
own, and later frames pair from index 1. A region may be spent at 8, 4, 2 or 1 tokens: it is halved along one axis after
the other, in the order that suits its content best. What is lost at a level is the squared deviation of its patches
from the means of their tokens. All halvings of all regions, the one that saves most per token first, are bought until
the budget is spent: the solution of min(distortion + lambda x tokens) at every lambda, found by sorting rather than by
bisecting lambda, since within a region the halvings are nested and their savings pooled to be convex (isotonic
regression).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

_AXES = (4, 2, 1)
"""Bits of a patch's place in its region: later frame, lower row, right column."""

_ORDERS = tuple(itertools.permutations(range(3)))
_PLACES = 8
_CPU_CHUNK = 2048
"""Regions at once."""


@dataclass(frozen=True)
class Regions:
    """The regions of a grid.

    Attributes:
        patches: int64 [regions, 8]: the patches of each; at the border, where there is none, `grid.count`. A place is
            4 x later frame + 2 x lower row + right column.
        extent: int64 [regions, 3]: patches along time, height and width, 1 or 2.
        first: bool [regions]: whether it lies in the first latent frame.
    """

    grid: Grid
    patches: Tensor
    extent: Tensor
    first: Tensor

    @staticmethod
    @lru_cache(maxsize=16)
    def of(grid: Grid, device: str = "cpu") -> Regions:
        starts = (
            torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, grid.frames, 2)]),
            torch.arange(0, grid.height, 2),
            torch.arange(0, grid.width, 2),
        )
        ends = (torch.cat([starts[0][1:], torch.tensor([grid.frames])]), starts[1] + 2, starts[2] + 2)
        limits = (grid.frames, grid.height, grid.width)
        extents = [(end.clamp(max=limit) - start) for start, end, limit in zip(starts, ends, limits, strict=True)]
        corner = torch.stack(torch.meshgrid(*starts, indexing="ij"), dim=-1).view(-1, 3)
        extent = torch.stack(torch.meshgrid(*extents, indexing="ij"), dim=-1).view(-1, 3)
        offsets = torch.tensor([[place >> 2 & 1, place >> 1 & 1, place & 1] for place in range(_PLACES)])
        places = corner[:, None] + offsets[None]
        inside = (offsets[None] < extent[:, None]).all(dim=-1)
        index = (places[..., 0] * grid.height + places[..., 1]) * grid.width + places[..., 2]
        patches = torch.where(inside, index, grid.count)
        return Regions(grid, patches.to(device), extent.to(device), (corner[:, 0] == 0).to(device))

    @cached_property
    def counts(self) -> Tensor:
        """int64 [regions, 8]: tokens of a region that is halved along the axes in each set of bits."""
        columns = [
            torch.stack([self.extent[:, axis] if bits & bit else torch.ones_like(self.extent[:, axis])
                         for axis, bit in enumerate(_AXES)]).prod(dim=0)
            for bits in range(_PLACES)
        ]  # fmt: skip
        return torch.stack(columns, dim=1)

    def distortions(self, values: Tensor) -> Tensor:
        """Squared deviation of patches from their tokens' means, float32 [regions, 8], as in `counts`.

        All eight follow from the products of the patches of a region with each other.

        Args:
            values: float32 [grid.count, channels].
        """
        # A CPU is four times as fast on parts that stay in its cache; a GPU wants few launches.
        size = _CPU_CHUNK if values.device.type == "cpu" else len(self.patches)
        parts = zip(torch.split(self.patches, size), torch.split(self.counts, size), strict=True)
        return torch.cat([self._distortions(values, patches, counts) for patches, counts in parts])

    def _distortions(self, values: Tensor, patches: Tensor, counts: Tensor) -> Tensor:
        """`distortions` of some regions, whose rows of `patches` and `counts` are given."""
        inside = patches < self.grid.count
        content = values[patches.clamp(max=self.grid.count - 1)] * inside[..., None]
        # About the region's mean the products are small where the content is flat, and keep their digits.
        content -= content.sum(dim=1, keepdim=True) / inside.sum(dim=1).view(-1, 1, 1)
        content *= inside[..., None]
        products = torch.bmm(content, content.mT).flatten(1)
        energy = products[:, :: _PLACES + 1].sum(dim=1, keepdim=True)
        explained = products @ _same_token(values.device.type) * counts / counts[:, -1:]
        return (energy - explained).clamp(min=0.0)


@lru_cache(maxsize=4)
def _same_token(device: str) -> Tensor:
    """float32 [64, 8]: whether two places of a region share a token, for each set of halved axes."""
    pairs = [
        [float(one & bits == other & bits) for bits in range(_PLACES)]
        for one in range(_PLACES)
        for other in range(_PLACES)
    ]
    return torch.tensor(pairs, device=device)


@dataclass(frozen=True)
class Prices:
    """What tokens buy, for one content: the halvings of every region.

    Attributes:
        regions: of the grid.
        levels: int64 [regions, 4]: the halved axes, as sets of bits, after 0, 1, 2 and 3 halvings.
        tokens: int64 [regions, 4]: tokens at each level.
        distortion: float32 [regions, 4]: of each level; falls along it.
        order: int64 [3 x regions]: halvings, best first; halving i is the (i % 3 + 1)-th of region i // 3.
    """

    regions: Regions
    levels: Tensor
    tokens: Tensor
    distortion: Tensor
    order: Tensor

    @classmethod
    def of(cls, regions: Regions, values: Tensor, first_frame_weight: float = 1.0) -> Prices:
        """Prices the content `values`, float32 [grid.count, channels].

        Args:
            first_frame_weight: factor on what is lost in the first latent frame.
        """
        distortions = regions.distortions(values)
        distortions = torch.where(regions.first[:, None], distortions * first_frame_weight, distortions)
        paths = torch.tensor([_path(order) for order in _ORDERS], device=values.device)  # [orders, 4]
        cost = distortions[:, paths[:, 1]] + distortions[:, paths[:, 2]]
        # An axis of one patch has nothing to halve: its halving costs no token and comes first.
        late = torch.tensor([_lateness(order) for order in _ORDERS], device=values.device)  # [orders, axes]
        missing = (regions.extent == 1).to(cost.dtype) @ late.T.to(cost.dtype)
        best = torch.where(missing == missing.amin(dim=1, keepdim=True), cost, torch.inf).argmin(dim=1)
        levels = paths[best]
        tokens = regions.counts.gather(1, levels)
        distortion = distortions.gather(1, levels).cummin(dim=1).values
        gain = _convex(tokens.diff(dim=1), -distortion.diff(dim=1)).flatten()
        order = torch.argsort(gain, descending=True, stable=True)
        return cls(regions, levels, tokens, distortion, order)

    @cached_property
    def _spent(self) -> Tensor:
        """int64 [3 x regions]: tokens once each halving, in order, is bought."""
        return self.least + self.tokens.diff(dim=1).flatten()[self.order].cumsum(0)

    @property
    def least(self) -> int:
        """Tokens with every region merged into one."""
        return self.regions.grid.least

    def allocate(self, budget: int) -> TokenPlan:
        """The plan of least distortion within exactly `budget` tokens.

        Raises:
            ValueError: the budget is below one token a region or above one a patch.
        """
        self._check(budget)
        grid = self.regions.grid
        bought = int(torch.searchsorted(self._spent, budget, right=True))
        region = self.order[:bought] // 3
        depth = torch.bincount(region, minlength=len(self.tokens))
        bits = self.levels.gather(1, depth[:, None])  # [regions, 1]
        place = torch.arange(_PLACES, device=bits.device)[None] & bits
        left = budget - (int(self._spent[bought - 1]) if bought else self.least)
        if left:
            # The next halving is worth more tokens than are left: so many of its region's tokens are halved.
            index = int(self.order[bought]) // 3
            before, after = self.levels[index, int(depth[index])], self.levels[index, int(depth[index]) + 1]
            whole = torch.arange(_PLACES, device=bits.device)
            coarse, fine = whole & before, whole & after
            halved = torch.unique(coarse[self.regions.patches[index] < grid.count])[:left]
            place[index] = torch.where(torch.isin(coarse, halved), fine, coarse)
        patches = self.regions.patches
        leaders = torch.empty(grid.count + 1, dtype=torch.long, device=patches.device)
        leaders[patches] = patches.gather(1, place)
        return TokenPlan(grid, leaders[:-1])

    def _check(self, budget: int) -> None:
        grid = self.regions.grid
        if not self.least <= budget <= grid.count:
            raise ValueError(f"budget: {budget} tokens; this grid takes {self.least} to {grid.count}")


def _path(order: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate((_AXES[axis] for axis in order), int.__or__)]


def _lateness(order: tuple[int, ...]) -> list[int]:
    """When each axis is halved, for each: weights that tell every set of missing axes apart by how late they come."""
    return [4 ** order.index(axis) for axis in range(3)]


def _convex(tokens: Tensor, saved: Tensor) -> Tensor:
    """Savings per token [regions, 3] of successive halvings, pooled where a later one saves more than the one before.

    A halving that costs no token comes first and saves infinitely much per token.
    """
    slopes = torch.full((len(saved), 3, 4), -torch.inf, device=saved.device)
    for start, end in itertools.combinations(range(4), 2):
        count = tokens[:, start:end].sum(dim=1)
        total = saved[:, start:end].sum(dim=1)
        slopes[:, start, end] = torch.where(count > 0, total / count.clamp(min=1), torch.inf)
    # The antitonic regression in closed form: least over starts of the greatest over ends of the means between.
    rates = [
        torch.stack([slopes[:, start, level + 1 :].amax(dim=1) for start in range(level + 1)]).amin(dim=0)
        for level in range(3)
    ]
    return torch.stack(rates, dim=1)
