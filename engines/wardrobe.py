"""What requests wear: their styles, and in steps with merged tokens the model's CAT adapter with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cinecat.engines.cache import ContentCache
from cinecat.engines.errors import EngineError, NoFreeSlot
from cinecat.engines.messages import ResidentStyle, SlotUse, StyleUse
from cinecat.engines.slots import Factors, StyleSlots, Worn
from cinecat.plugins.errors import LoraError
from cinecat.plugins.fingerprint import fingerprint
from cinecat.plugins.lora import load_lora


@dataclass(frozen=True)
class CatAdapter:
    """A LoRA that is worn only in steps with merged tokens, by its file."""

    path: Path
    fingerprint: str

    @classmethod
    def beside(cls, checkpoint: Path) -> CatAdapter | None:
        """The one in a checkpoint's folder, `cat_adapter/cat_adapter.safetensors` as train-cat writes it, if any."""
        path = checkpoint / "cat_adapter" / "cat_adapter.safetensors"
        return cls(path, fingerprint(path)) if path.is_file() else None


@dataclass(frozen=True)
class Outfit:
    """Places in the banks that a request has pinned.

    Attributes:
        whole: for steps in which every patch is a token.
        merged: for the others.
        note: what the caller may want to know.
    """

    whole: Worn
    merged: Worn
    note: str = ""


class Wardrobe:
    """Makes styles resident for requests, from memory or their files."""

    def __init__(self, slots: StyleSlots, cache_bytes: int, adapter: CatAdapter | None) -> None:
        """Args:
        cache_bytes: bound of the styles that are kept in memory as read, besides those in slots.
        adapter: None for none.
        """
        self._slots = slots
        self._adapter = adapter
        self._read: ContentCache[Factors] = ContentCache(cache_bytes, _size)

    def dress(self, styles: tuple[StyleUse, ...], merging: bool) -> Outfit:
        """Pins slots until `undress`.

        Args:
            merging: whether there may be steps with merged tokens.

        Raises:
            NoFreeSlot: running requests wear all slots.
            EngineError: the styles cannot be worn.
        """
        strengths: defaultdict[str, float] = defaultdict(float)
        for style in styles:
            strengths[style.fingerprint] += style.strength  # one file under two names
        paths = {style.fingerprint: Path(style.path) for style in styles}
        whole = self._wear(strengths, paths)
        if not merging or self._adapter is None:
            return Outfit(whole, whole)
        if whole.slot and self._slots.count == 1:
            return Outfit(whole, whole, "tokenization: without the CAT adapter, since there is one style slot only")
        try:
            with_adapter = {**strengths, self._adapter.fingerprint: 1.0}
            merged = self._wear(with_adapter, {**paths, self._adapter.fingerprint: self._adapter.path})
        except NoFreeSlot:
            self._slots.take_off(whole)
            raise
        except EngineError as error:
            return Outfit(whole, whole, f"tokenization: without the CAT adapter: {error}")
        return Outfit(whole, merged)

    def undress(self, outfit: Outfit) -> None:
        """Ends what `dress` began; the styles stay resident until their slots are needed."""
        self._slots.take_off(outfit.whole)
        if outfit.merged is not outfit.whole:
            self._slots.take_off(outfit.merged)

    def warm(self, style: StyleUse) -> None:
        """Makes a style resident. Raises as `dress`."""
        self._slots.take_off(self._wear({style.fingerprint: 1.0}, {style.fingerprint: Path(style.path)}))

    def residency(self) -> tuple[ResidentStyle, ...]:
        """What is in the slots, least recently used first."""
        return self._slots.residency()

    def take_use(self) -> SlotUse:
        """What was done with the slots since the last call."""
        return self._slots.take_use()

    def _wear(self, strengths: Mapping[str, float], paths: Mapping[str, Path]) -> Worn:
        return self._slots.wear(strengths, lambda name: self._load(paths[name], name))

    def _load(self, path: Path, name: str) -> Factors:
        """What is worn under a fingerprint must be what that says."""
        try:
            return self._read.get(name, lambda: load_lora(path, name))[0]
        except LoraError as error:
            raise EngineError(f"styles: {error}") from error


def _size(factors: Factors) -> int:
    return sum(a.nbytes + b.nbytes for a, b in factors.values())
