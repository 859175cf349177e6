"""The styles that there are, looked for again at every call so that no restart is needed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cinecat.plugins.errors import StyleError, near_miss, quoted, shown
from cinecat.plugins.lora import LoraHeader, inspect_lora
from cinecat.plugins.manifest import MANIFEST_NAME, StyleManifest, read_manifest
from cinecat.plugins.sources import FolderSource, Place, SourceError, StyleSource

BUNDLED = Path(__file__).parent / "bundled"

# A file changed this recently may change again without its timestamps showing it: the kernel's clock ticks every few
# milliseconds.
_UNSETTLED_NS = 100_000_000
_MAX_NAMES_SHOWN = 20

# Inode, size, times of last change of content and of the inode, and number of links; None where there is no file.
_Signature = tuple[int, int, int, int, int] | None


@dataclass(frozen=True)
class Style:
    """A style that can be offered.

    Attributes:
        folder: where it lies.
        weights_path: of its LoRA file.
        header: what the LoRA changes.
        fingerprint: sha256 of the weights file, in hexadecimal.
        weights_bytes: size of the LoRA file.
        place: where it was found.
    """

    manifest: StyleManifest
    folder: Path
    weights_path: Path
    header: LoraHeader
    fingerprint: str
    weights_bytes: int
    place: Place


@dataclass(frozen=True)
class StyleProblem:
    """What looks like a style but cannot be offered, and why.

    Attributes:
        folder: of the style; of a package that cannot be read, only its entry point's name.
    """

    folder: Path
    reason: str


class UnknownStyle(StyleError):
    """No style of that name, or not in that version.

    Attributes:
        names: of the styles there are.
        near_miss: the name that was probably meant, or empty.
    """

    def __init__(self, message: str, names: Sequence[str] = (), near_miss: str = "") -> None:
        super().__init__(message)
        self.names = tuple(names)
        self.near_miss = near_miss


@dataclass(frozen=True)
class _Entry:
    """A folder as it was read. It holds as long as its files keep their signatures."""

    outcome: Style | StyleProblem
    signatures: dict[Path, _Signature]
    settled: bool

    def renewed(self) -> _Entry | None:
        """The entry with its files' signatures of now; None when it no longer holds."""
        now = {path: _signature(path) for path in self.signatures}
        holds = self.settled and all(_same(self.signatures[path], now[path]) for path in now)
        return replace(self, signatures=now) if holds else None


@dataclass(frozen=True)
class _Listing:
    styles: tuple[Style, ...]
    problems: tuple[StyleProblem, ...]


class StyleRegistry:
    """The styles of some sources. Safe to use from several threads.

    Every call looks at the folders. It reads only what has changed since the last one; a new or changed weights file is
    hashed, which takes seconds per gigabyte.
    """

    def __init__(self, sources: Sequence[Path | StyleSource]) -> None:
        """A path is a FolderSource. Where two sources offer the same name and version, the earlier one wins."""
        self._sources = tuple(FolderSource(source) if isinstance(source, Path) else source for source in sources)
        self._lock = threading.Lock()
        self._entries: dict[Path, _Entry] = {}

    def styles(self) -> tuple[Style, ...]:
        """By name, then newest version first."""
        return self._read().styles

    def problems(self) -> tuple[StyleProblem, ...]:
        """What cannot be offered, in the order of the sources and then by name."""
        return self._read().problems

    def find(self, name: str, version: str = "") -> Style:
        """The style of a name, in its newest version when none is given.

        Raises:
            UnknownStyle: naming those there are.
        """
        listing = self._read()
        versions = [style for style in listing.styles if style.manifest.name == name]
        for style in versions:
            if version in ("", style.manifest.version):
                return style
        names = tuple(dict.fromkeys(style.manifest.name for style in listing.styles))
        if versions:
            known = ", ".join(style.manifest.version for style in versions)
            raise UnknownStyle(f"style {quoted(name)} has no version {quoted(version)}; it has {known}", names, name)
        near = near_miss(name, names)
        raise UnknownStyle(f"no style {quoted(name)}; {_advice(name, near, names, listing.problems)}", names, near)

    def _read(self) -> _Listing:
        with self._lock:
            problems = []
            entries = {}
            for source in self._sources:
                for place in source.places():
                    if isinstance(place, SourceError):
                        problems.append(StyleProblem(Path(place.place), place.reason))
                        continue
                    known = self._entries.get(place.folder)
                    entries[place.folder] = (known and known.renewed()) or _read_folder(place)
            self._entries = entries
        offered: dict[tuple[str, tuple[int, ...]], Style] = {}
        for entry in entries.values():
            outcome = entry.outcome
            if isinstance(outcome, Style):
                key = (outcome.manifest.name, outcome.manifest.version_key)
                first = offered.setdefault(key, outcome)
                if first is outcome:
                    continue
                outcome = StyleProblem(
                    outcome.folder,
                    f"{MANIFEST_NAME}: {outcome.manifest.name} {outcome.manifest.version} is already offered by "
                    f"{shown(first.folder)}; change name or version",
                )
            problems.append(outcome)
        ordered = sorted(offered, key=lambda key: (key[0], [-part for part in key[1]]))
        return _Listing(tuple(offered[key] for key in ordered), tuple(problems))


def _read_folder(place: Place) -> _Entry:
    # Signatures are taken before the files are read: a change during the reading then shows at the next call.
    now, folder = time.time_ns(), place.folder
    signatures = {folder / MANIFEST_NAME: _signature(folder / MANIFEST_NAME)}
    outcome: Style | StyleProblem
    understood = False
    try:
        manifest = read_manifest(folder)
        for name in filter(None, (manifest.weights, manifest.preview)):
            signatures[folder / name] = _signature(folder / name)
        understood = True
        outcome = _read_style(place, manifest)
    except StyleError as error:
        outcome = StyleProblem(folder, f"{error}")
    except OSError as error:
        outcome = StyleProblem(folder, f"cannot be read ({error.strerror})")
    except RecursionError:
        outcome = StyleProblem(folder, f"{MANIFEST_NAME} holds tables in tables; keep to its keys")
    recent = any(signature is not None and abs(now - signature[3]) < _UNSETTLED_NS for signature in signatures.values())
    # Without a manifest it is not known which file would mend the folder; reading it again costs little.
    return _Entry(outcome, signatures, settled=understood and not recent)


def _read_style(place: Place, manifest: StyleManifest) -> Style:
    weights_path = place.folder / manifest.weights
    header = inspect_lora(weights_path)
    with weights_path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
    if manifest.sha256 and manifest.sha256.lower() != fingerprint:
        raise StyleError(
            f"{MANIFEST_NAME}: sha256 is {manifest.sha256[:12]}..., but {manifest.weights} has {fingerprint[:12]}...; "
            "copy the file again or correct the key"
        )
    return Style(manifest, place.folder, weights_path, header, fingerprint, size, place)


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink)


def _same(before: _Signature, after: _Signature) -> bool:
    """Whether a file is as it was. Another link to it, such as accepted jobs keep, changes the inode's time and is no
    reason to read gigabytes again.
    """
    if before is None or after is None:
        return before == after
    return before[:3] == after[:3] and (before[3] == after[3] or before[4] != after[4])


def _advice(name: str, near: str, names: Sequence[str], problems: Sequence[StyleProblem]) -> str:
    for problem in problems:
        if name and problem.folder.name.partition("@")[0] == name:
            return f"the folder of that name cannot be offered: {problem.reason}"
    if not names:
        return "no style is installed"
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    there_are = f"there are {', '.join(names[:_MAX_NAMES_SHOWN])}{more}"
    return f"did you mean {near}? {there_are}" if near else there_are
