"""Which shapes an engine's inputs take in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cinecat.engines.backends.contract import Bucket, Range, StackInputs
from cinecat.engines.backends.export import open_sizes
from cinecat.engines.errors import EngineError


@dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input, from least to most, and that to be fastest at."""

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


def input_shapes(name: str, shape: Sequence[int], bucket: Bucket) -> ShapeRange:
    """The shapes of an input of the exported graph in a bucket.

    Args:
        name: one of `export.graph_names`.
        shape: the graph's; what it says of open dimensions does not matter.

    Raises:
        EngineError: the graph leaves a dimension open (-1) that the contract closes.
    """
    sizes = {"rows": bucket.rows, "tokens": bucket.tokens, "text": bucket.text}
    opened = open_sizes(name)
    for dimension, size in enumerate(shape):
        if size < 0 and dimension not in opened:
            raise EngineError(f"engines: the graph's input {name} leaves dimension {dimension} open")
    ranges = [sizes[opened[dimension]] if dimension in opened else None for dimension in range(len(shape))]

    def at(end: str) -> tuple[int, ...]:
        return tuple(
            size if known is None else int(getattr(known, end)) for known, size in zip(ranges, shape, strict=True)
        )

    return ShapeRange(at("least"), at("best"), at("most"))


def tightest(buckets: Sequence[Bucket], inputs: StackInputs) -> int | None:
    """Index of the smallest bucket that covers a forward's shapes; None where none does."""
    covering = [index for index, bucket in enumerate(buckets) if bucket.covers(inputs)]
    return min(covering, key=lambda index: _largest(buckets[index]), default=None)


def hull(buckets: Sequence[Bucket]) -> Bucket:
    """One bucket around all, best where the first is."""

    def around(ranges: Sequence[Range]) -> Range:
        return Range(min(each.least for each in ranges), ranges[0].best, max(each.most for each in ranges))

    return Bucket(
        around([bucket.rows for bucket in buckets]),
        around([bucket.tokens for bucket in buckets]),
        around([bucket.text for bucket in buckets]),
    )


def _largest(bucket: Bucket) -> tuple[int, int]:
    return bucket.rows.most * bucket.tokens.most, bucket.text.most
