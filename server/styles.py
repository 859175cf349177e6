"""The styles that there are, as the loaded model can wear them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cinecat.engines.messages import ModelInfo, StyleUse
from cinecat.plugins.errors import StyleError
from cinecat.plugins.lora import IgnoredKey, LoraHeader
from cinecat.plugins.manifest import BaseDims, StyleManifest
from cinecat.plugins.registry import Style, StyleProblem, StyleRegistry, UnknownStyle
from cinecat.server.style_activity import StyleActivity
from cinecat.v1 import clip_pb2

_MAX_NAME = 64
_MAX_LAYERS_SHOWN = 3

_PATCHES = "patch_embedding"
_OUTSIDE = "changes a layer outside the transformer's blocks, where no style reaches"


class StyleChanged(StyleError):
    """A style has other weights than it had when a job was accepted with it."""


class StyleCatalogue:
    """Styles by name, checked against one model.

    Attributes:
        activity: what they have been used for.
    """

    def __init__(self, registry: StyleRegistry, model: ModelInfo, activity: StyleActivity | None = None) -> None:
        """`activity` is that of all models of a server."""
        self._registry = registry
        self._model = model
        self._dims = _dims(model)
        self.activity = activity or StyleActivity()

    @property
    def model_name(self) -> str:
        """Of the model that they are checked against."""
        return self._model.name

    @property
    def family(self) -> str:
        """What that model is one of."""
        return self._model.family

    def styles(self) -> tuple[Style, ...]:
        """By name, then newest version first. Reads the folders, and hashes what is new in them: use a thread."""
        return self._registry.styles()

    def versions(self, name: str) -> tuple[Style, ...]:
        """The styles of a name, newest version first. Reads as `styles` does."""
        return tuple(style for style in self._registry.styles() if style.manifest.name == name)

    def problems(self) -> tuple[StyleProblem, ...]:
        """Folders and packages that cannot be offered. Reads as `styles` does."""
        return self._registry.problems()

    def find(self, name: str, version: str = "") -> Style:
        """Raises UnknownStyle, naming those there are."""
        if max(len(name), len(version)) > _MAX_NAME:
            raise UnknownStyle(f"no style has a name or version of more than {_MAX_NAME} characters")
        return self._registry.find(name, version)

    def incompatibility(self, style: Style) -> str:
        """Why the model cannot wear a style; empty when it can."""
        return self.misfit(style.manifest, style.header)

    def misfit(self, manifest: StyleManifest, header: LoraHeader) -> str:
        """Why the model cannot wear what a file changes; empty when it can."""
        model = self._model
        for target, shape in header.targets.items():
            expected = model.style_targets.get(target) or model.other_targets.get(target)
            if expected is None:
                return f"changes {target}, which {model.name} ({model.family}) does not have"
            if target == _PATCHES:  # text-to-video models embed fewer channels; their styles are worn without it
                expected = (shape.in_features, expected[1])
            if expected != (shape.in_features, shape.out_features):
                return (
                    f"was made for a {shape.in_features} -> {shape.out_features} {target}, "
                    f"{model.name} ({model.family}) has {expected[0]} -> {expected[1]}"
                )
        for key in ("dim", "ffn_dim", "layers"):
            wanted, found = getattr(manifest.base_dims, key), getattr(self._dims, key)
            if wanted is not None and found is not None and wanted != found:
                return f"was made for {key} = {wanted}, {model.name} ({model.family}) has {found}"
        ranks = self._worn_ranks(header)
        if not ranks:
            layers = ", ".join(sorted(header.targets)[:_MAX_LAYERS_SHOWN])
            return (
                f"changes only layers outside the transformer's blocks ({layers}), where no style reaches; start the "
                "server with --model-variant FILE to have it in every clip"
            )
        highest = max(ranks.values())
        if highest > model.max_rank:
            return f"rank {highest} is more than a slot holds ({model.max_rank}; the setting max_rank raises it)"
        return ""

    def ignored(self, header: LoraHeader) -> tuple[IgnoredKey, ...]:
        """Tensors of a file that do nothing when the model wears it, and why."""
        outside = [
            IgnoredKey(key, _OUTSIDE)
            for target in header.targets
            if target in self._model.other_targets
            for key in header.keys.get(target, (target,))
        ]
        return (*header.ignored, *outside)

    def incompatibility_together(self, styles: Iterable[Style]) -> str:
        """Why compatible styles cannot share a slot; empty when they can. One file under two names counts once."""
        ranks: dict[str, dict[str, int]] = {}
        for style in {style.fingerprint: style for style in styles}.values():
            for target, rank in self._worn_ranks(style.header).items():
                ranks.setdefault(target, {})[style.manifest.name] = rank
        if not ranks:
            return ""
        highest = max(ranks, key=lambda target: sum(ranks[target].values()))
        total = sum(ranks[highest].values())
        if total <= self._model.max_rank:
            return ""
        each = " and ".join(f"{name!r} (rank {rank})" for name, rank in ranks[highest].items())
        return (
            f"{each} add up to rank {total}, a slot holds {self._model.max_rank}; wear fewer of them, or raise the "
            f"server's setting max_rank to {total}"
        )

    def uses(self, styles: Sequence[clip_pb2.StyleRef], kept: Callable[[str], Path | None]) -> tuple[StyleUse, ...]:
        """The files behind the references of an accepted job.

        Args:
            kept: the file that is kept for accepted jobs under a fingerprint, if there is one.

        Raises:
            UnknownStyle: one was removed since the request was accepted, and its file was not kept.
            StyleChanged: one has other weights since, and its file was not kept.
        """
        return tuple(self._use(ref, kept) for ref in styles)

    def _use(self, ref: clip_pb2.StyleRef, kept: Callable[[str], Path | None]) -> StyleUse:
        path = kept(ref.fingerprint)
        if path is not None:
            return StyleUse(str(path), ref.fingerprint, ref.strength)
        style = self._registry.find(ref.name, ref.version)
        if ref.fingerprint not in ("", style.fingerprint):
            raise StyleChanged(
                f"style {ref.name!r} {ref.version} was replaced since the request was accepted: its weights were "
                f"{ref.fingerprint[:12]}... and are {style.fingerprint[:12]}...; ask again"
            )
        return StyleUse(str(style.weights_path), style.fingerprint, ref.strength)

    def _worn_ranks(self, header: LoraHeader) -> dict[str, int]:
        """Ranks of the targets that a slot takes."""
        return {target: shape.rank for target, shape in header.targets.items() if target in self._model.style_targets}


def _dims(model: ModelInfo) -> BaseDims:
    """What the layers that a style may change tell about a model's sizes."""
    targets = model.style_targets
    dim = next((size for name, (size, _) in targets.items() if name.endswith("attn2.to_q")), None)
    ffn_dim = next((size for name, (_, size) in targets.items() if name.endswith("ffn.net.0.proj")), None)
    layers = len({name.split(".")[1] for name in targets})
    return BaseDims(dim=dim, ffn_dim=ffn_dim, layers=layers or None)
