"""The installed styles as the loaded model can wear them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cinecat.engines.messages import ModelInfo, StyleUse
from cinecat.plugins.registry import Style, StyleProblem, StyleRegistry, UnknownStyle
from cinecat.v1 import clip_pb2

_MAX_NAME = 64


class StyleCatalogue:
    """Styles by name, checked against one model."""

    def __init__(self, registry: StyleRegistry, model: ModelInfo) -> None:
        self._registry = registry
        self._model = model

    def styles(self) -> tuple[Style, ...]:
        """By name, then newest version first. Reads the folders, and hashes what is new in them: use a thread."""
        return self._registry.styles()

    def problems(self) -> tuple[StyleProblem, ...]:
        """Folders that cannot be offered. Reads as `styles` does."""
        return self._registry.problems()

    def find(self, name: str, version: str = "") -> Style:
        """Raises UnknownStyle, naming those there are."""
        if max(len(name), len(version)) > _MAX_NAME:
            raise UnknownStyle(f"no style has a name or version of more than {_MAX_NAME} characters")
        return self._registry.find(name, version)

    def incompatibility(self, style: Style) -> str:
        """Why the model cannot wear a style; empty when it can."""
        model = self._model
        for target, shape in style.header.targets.items():
            expected = model.style_targets.get(target)
            if expected is None:
                return f"changes {target}, which {model.name} ({model.family}) does not have"
            if expected != (shape.in_features, shape.out_features):
                return (
                    f"was made for a {shape.in_features} -> {shape.out_features} {target}, "
                    f"{model.name} ({model.family}) has {expected[0]} -> {expected[1]}"
                )
        return self.incompatibility_together([style])

    def incompatibility_together(self, styles: Iterable[Style]) -> str:
        """Why compatible styles cannot share a slot; empty when they can."""
        ranks: Counter[str] = Counter()
        for style in styles:
            ranks.update({target: shape.rank for target, shape in style.header.targets.items()})
        highest = max(ranks.values(), default=0)
        if highest <= self._model.max_rank:
            return ""
        return f"rank {highest} is more than a slot holds ({self._model.max_rank}; the setting max_rank raises it)"

    def uses(self, styles: Sequence[clip_pb2.StyleRef]) -> tuple[StyleUse, ...]:
        """The files behind resolved references.

        Raises:
            UnknownStyle: one was removed since the request was accepted.
        """
        found = [(self._registry.find(ref.name, ref.version), ref.strength) for ref in styles]
        return tuple(StyleUse(str(style.weights_path), style.fingerprint, strength) for style, strength in found)
