"""The content cache keeps what is used and no more than it may."""

from __future__ import annotations

import torch
from torch import Tensor

from cinecat.engines.cache import ContentCache

KIB = torch.zeros(256)  # float32: 1 KiB


def test_a_known_key_is_not_computed_again() -> None:
    cache: ContentCache[Tensor] = ContentCache(4096, lambda tensor: tensor.nbytes)
    first, known = cache.get("a", lambda: KIB.clone())
    again, known_again = cache.get("a", lambda: KIB.clone())
    assert (known, known_again) == (False, True)
    assert again is first


def test_the_least_recently_used_is_dropped_at_the_bound() -> None:
    cache: ContentCache[Tensor] = ContentCache(2048, lambda tensor: tensor.nbytes)
    for key in ("a", "b", "a", "c"):
        cache.get(key, KIB.clone)
    assert [cache.get(key, KIB.clone)[1] for key in ("a", "c", "b")] == [True, True, False]
    assert len(cache) == 2


def test_what_is_larger_than_the_bound_is_returned_and_drops_nothing() -> None:
    cache: ContentCache[Tensor] = ContentCache(1024, lambda tensor: tensor.nbytes)
    cache.get("a", KIB.clone)
    assert cache.get("big", lambda: torch.zeros(1000))[0].numel() == 1000
    assert cache.get("a", KIB.clone)[1]
