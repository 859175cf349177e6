"""The styles that there are, as the models of a server can wear them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cinecat.plugins.lora import IgnoredKey, LoraHeader
from cinecat.plugins.manifest import StyleManifest
from cinecat.plugins.registry import Style, StyleProblem
from cinecat.server.style_activity import StyleActivity
from cinecat.server.styles import StyleCatalogue


class StyleModels:
    """Styles by name, checked against every model that is served."""

    def __init__(self, catalogues: Callable[[], Sequence[StyleCatalogue]]) -> None:
        """`catalogues` gives those of the models that are served now, at least one; all of one registry and one
        activity.
        """
        self._catalogues = catalogues

    @property
    def _first(self) -> StyleCatalogue:
        return self._catalogues()[0]

    @property
    def family(self) -> str:
        """Of the default model."""
        return self._first.family

    @property
    def activity(self) -> StyleActivity:
        """What the styles have been used for."""
        return self._first.activity

    def styles(self) -> tuple[Style, ...]:
        """As `StyleCatalogue.styles`."""
        return self._first.styles()

    def versions(self, name: str) -> tuple[Style, ...]:
        """As `StyleCatalogue.versions`."""
        return self._first.versions(name)

    def problems(self) -> tuple[StyleProblem, ...]:
        """As `StyleCatalogue.problems`."""
        return self._first.problems()

    def find(self, name: str, version: str = "") -> Style:
        """As `StyleCatalogue.find`."""
        return self._first.find(name, version)

    def families(self, manifest: StyleManifest, header: LoraHeader) -> list[str]:
        """Of the models that can wear what a file changes."""
        return list(dict.fromkeys(each.family for each in self._catalogues() if not each.misfit(manifest, header)))

    def wearers(self, manifest: StyleManifest, header: LoraHeader) -> list[str]:
        """Names of the models that can wear what a file changes."""
        return [each.model_name for each in self._catalogues() if not each.misfit(manifest, header)]

    def misfit(self, manifest: StyleManifest, header: LoraHeader) -> str:
        """Why no model can wear what a file changes; empty when one can."""
        misfits = [each.misfit(manifest, header) for each in self._catalogues()]
        return "; ".join(dict.fromkeys(misfits)) if all(misfits) else ""

    def incompatibility(self, style: Style) -> str:
        """Why no model can wear a style; empty when one can."""
        return self.misfit(style.manifest, style.header)

    def ignored(self, manifest: StyleManifest, header: LoraHeader) -> tuple[IgnoredKey, ...]:
        """Tensors of a file that do nothing when the first model that can wear it does, and why."""
        catalogues = self._catalogues()
        wearing = (each for each in catalogues if not each.misfit(manifest, header))
        return next(wearing, catalogues[0]).ignored(header)
