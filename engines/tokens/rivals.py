"""Other ways to share tokens between patches, for comparison: same budget, same merge and unmerge, another partition.

Each is at its best as measured here: it keeps the first latent frame fine where the budget lets it, as our allocation
chooses to, and where the published method compares in cosines, it compares in the distances that merging loses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cinecat.engines.tokens.allocation import Prices, Regions
from cinecat.engines.tokens.grid import Grid
from cinecat.engines.tokens.plan import TokenPlan

Partition = Callable[[Grid, Tensor, int], TokenPlan]
"""Grid, clean content of its patches float32 [grid.count, channels], exact budget in tokens: a plan.

Raises ValueError for a budget that it cannot spend exactly.
"""

_SPATIAL_FIRST = (0, 2, 3, 7)
"""Halved axes of a region, as sets of bits, after 0 to 3 halvings: rows, then columns, and time last, since most of a
film stays where it is."""

_GOLDEN = 0.6180339887498949


def _first_frame_stays(grid: Grid, budget: int) -> bool:
    """Whether a budget leaves a token for every eight later patches once the first latent frame is fine."""
    return (budget - grid.frame_count) * 8 >= grid.count - grid.frame_count


def fixed_grid(grid: Grid, content: Tensor, budget: int) -> TokenPlan:
    """Blind to content: all regions are halved once before any again, in an order that spreads them evenly."""
    regions = Regions.of(grid, str(content.device))
    number = torch.arange(len(regions.patches), device=content.device, dtype=torch.float64)
    return _blind(regions, (number * _GOLDEN).frac()[:, None] + torch.arange(3, device=content.device), budget)


def random_regions(seed: int) -> Partition:
    """Blind to content: random regions are halved, by random amounts."""

    def partition(grid: Grid, content: Tensor, budget: int) -> TokenPlan:
        regions = Regions.of(grid, str(content.device))
        drawn = torch.rand(len(regions.patches), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return _blind(regions, drawn.sort(dim=1).values.to(content.device), budget)

    return partition


def _blind(regions: Regions, turn: Tensor, budget: int) -> TokenPlan:
    """Buys halvings in the order of their turns, [regions, 3], which rise along a region's halvings."""
    levels = torch.tensor(_SPATIAL_FIRST, device=turn.device).expand(len(turn), -1)
    tokens = regions.counts.gather(1, levels)
    if _first_frame_stays(regions.grid, budget):
        turn = torch.where(regions.first[:, None], turn - 4.0, turn)
    order = torch.argsort(turn.flatten(), stable=True)
    nothing = torch.zeros_like(levels, dtype=torch.float32)
    return Prices(regions, levels, tokens, nothing, order).allocate(budget)


def similarity(grid: Grid, content: Tensor, budget: int) -> TokenPlan:
    """Bipartite soft matching, in the manner of ToMe (arXiv 2210.09461).

    Tokens alternate between two sets; each of the first finds the nearest of the second, wherever it is, and the
    nearest pairs merge. A round at most halves them; rounds follow until the budget is met. In the first round the sets
    alternate as a chessboard does, so that every neighbour in space and time is in the other set.
    """
    _check(grid, budget)
    fine = grid.frame_count if _first_frame_stays(grid, budget) else 0
    values = content[fine:]
    token = torch.arange(len(values), device=content.device)
    sizes = torch.ones(len(values), device=content.device)
    side = grid.positions(content.device)[fine:].sum(dim=1).long() % 2
    while len(values) > budget - fine:
        movers, stayers = (side == 1).nonzero()[:, 0], (side == 0).nonzero()[:, 0]
        if not len(movers) or not len(stayers):
            side = torch.arange(len(values), device=content.device) % 2
            continue
        distance, nearest = _nearest(values[movers], values[stayers])
        merging = torch.argsort(distance, stable=True)[: len(values) - (budget - fine)]
        target = torch.arange(len(values), device=content.device)
        target[movers[merging]] = stayers[nearest[merging]]
        _, joined = torch.unique(target, return_inverse=True)
        count = int(joined.max()) + 1
        weights = torch.zeros(count, device=content.device).index_add_(0, joined, sizes)
        total = torch.zeros(count, values.shape[1], device=content.device)
        values = total.index_add_(0, joined, values * sizes[:, None]) / weights[:, None]
        sizes, token = weights, joined[token]
        side = torch.arange(count, device=content.device) % 2
    return TokenPlan.from_labels(grid, torch.cat([torch.arange(fine, device=content.device), fine + token]))


_ROWS = 1024
"""Rows of a matrix of distances at once."""


def _nearest(ones: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance from each of some vectors to the nearest of others, and which that is."""
    found = [_squared_distances(rows, others).min(dim=1) for rows in torch.split(ones, _ROWS)]
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def _squared_distances(ones: Tensor, others: Tensor) -> Tensor:
    squares = ones.square().sum(dim=1)[:, None] + others.square().sum(dim=1)[None]
    return (squares - 2.0 * ones @ others.T).clamp(min=0.0)


@dataclass(frozen=True)
class StaticThenClusters:
    """In the manner of PruneVid (arXiv 2412.16117): what is static merges over time, then clusters form in space.

    A place whose content hardly changes within a segment of latent frames becomes one unit there; every other patch is
    a unit of its own. Units then cluster by density peaks, static ones of a segment and moving ones of a frame apart,
    each group into a share of the budget that its size asks for.

    Attributes:
        segment: latent frames, at most.
        still: share of a place's energy that may change; 0.36 is a mean cosine of 0.8, the published threshold.
        neighbours: that a density is the mean over.
    """

    segment: int = 4
    still: float = 0.36
    neighbours: int = 5

    def __call__(self, grid: Grid, content: Tensor, budget: int) -> TokenPlan:
        _check(grid, budget)
        starts = list(range(1, grid.frames, self.segment))
        segments = [range(start, min(start + self.segment, grid.frames)) for start in starts]
        # The static part of every segment, and every frame, have one cluster at least.
        fits = budget >= grid.frame_count + len(segments) + grid.frames
        fine = grid.frame_count if fits and _first_frame_stays(grid, budget) else 0
        if not fine:
            segments = [range(1), *segments]
        folded, group = self._fold(grid, content, segments, budget)
        vectors = folded.mean(content[None])[0]
        cluster = torch.arange(len(vectors), device=content.device)
        groups = [(group == number).nonzero()[:, 0] for number in range(1 if fine else 0, int(group.max()) + 1)]
        groups = [units for units in groups if len(units)]
        for units, share in zip(groups, _shares([len(units) for units in groups], budget - fine), strict=True):
            cluster[units] = units[_density_peaks(vectors[units], share, self.neighbours)]
        return TokenPlan.from_labels(grid, cluster[folded.token_of])

    def _fold(self, grid: Grid, content: Tensor, segments: list[range], budget: int) -> tuple[TokenPlan, Tensor]:
        """Merges static places over time, stillest first, while at least `budget` units are left.

        Returns:
            The units as a plan, and the group of each, int64 [units]: 0 in the first latent frame where that is no
            segment, then one number for every frame and one for the static part of every segment.
        """
        frames = content.view(grid.frames, grid.frame_count, -1)
        change, saved = [], []
        for segment in segments:
            part = frames[segment.start : segment.stop]
            moved = (part - part.mean(dim=0)).square().sum(dim=(0, 2))
            change.append(moved / part.square().sum(dim=(0, 2)).clamp(min=1e-12))
            saved.append(torch.full((grid.frame_count,), len(segment) - 1, device=content.device))
        order = torch.argsort(torch.cat(change), stable=True)
        allowed = torch.empty(len(order), dtype=torch.bool, device=content.device)
        allowed[order] = torch.cat(saved)[order].cumsum(0) <= grid.count - budget
        static = (allowed & (torch.cat(change) <= self.still)).view(len(segments), -1)
        patch = torch.arange(grid.count, device=content.device).view(grid.frames, -1)
        leaders, group = patch.clone(), torch.zeros_like(patch)
        for number, segment in enumerate(segments):
            inside = slice(segment.start, segment.stop)
            frame = torch.arange(segment.start, segment.stop, device=content.device)[:, None]
            leaders[inside] = torch.where(static[number], patch[segment.start], patch[inside])
            group[inside] = torch.where(static[number], 1 + grid.frames + number, 1 + frame)
        folded = TokenPlan(grid, leaders.flatten())
        return folded, group.flatten()[torch.unique(folded.leaders)]


def _density_peaks(vectors: Tensor, clusters: int, neighbours: int) -> Tensor:
    """The centre of the cluster of each of `vectors` [n, channels], int64 [n], by density peaks (DPC-KNN)."""
    count = len(vectors)
    if clusters >= count:
        return torch.arange(count, device=vectors.device)
    squared = _squared_distances(vectors, vectors) / vectors.shape[1]
    nearest = squared.topk(min(neighbours + 1, count), largest=False).values[:, 1:]
    density = (-nearest.mean(dim=1)).exp()
    # Equal densities are told apart by their place, so that there is one order.
    rank = torch.empty(count, dtype=torch.long, device=vectors.device)
    rank[torch.argsort(density, descending=True, stable=True)] = torch.arange(count, device=vectors.device)
    denser = rank[None] < rank[:, None]
    far = squared.amax(dim=1)
    gap = torch.where(denser.any(dim=1), squared.masked_fill(~denser, torch.inf).amin(dim=1), far)
    centres = torch.argsort(gap.sqrt() * density, descending=True, stable=True)[:clusters]
    cluster = centres[squared[:, centres].argmin(dim=1)]
    cluster[centres] = centres
    return cluster


def _shares(sizes: list[int], budget: int) -> list[int]:
    """`budget` in parts that go with `sizes`: at least 1 and at most the size each."""
    total = sum(sizes)
    exact = [size * budget / total for size in sizes]
    shares = [min(size, max(1, int(part))) for size, part in zip(sizes, exact, strict=True)]
    while (left := budget - sum(shares)) != 0:
        step = 1 if left > 0 else -1
        able = [i for i in range(len(sizes)) if 1 <= shares[i] + step <= sizes[i]]
        if not able:
            raise ValueError(f"budget: {budget} tokens for {len(sizes)} groups of {total} units")
        best = max(able, key=lambda i: (step * (exact[i] - shares[i]), -i))
        shares[best] += step
    return shares


def _check(grid: Grid, budget: int) -> None:
    if not 1 <= budget <= grid.count:
        raise ValueError(f"budget: {budget} tokens; this grid takes 1 to {grid.count}")


EQUAL_TOKENS: dict[str, Partition] = {
    "fixed": fixed_grid,
    "random": random_regions(0),
    "similarity": similarity,
    "static_clusters": StaticThenClusters(),
}
"""Rivals at equal tokens, by name."""
