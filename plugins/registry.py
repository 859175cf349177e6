"""The styles that lie in the styles folders, found again at every call so that no restart is needed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cinecat.plugins.errors import StyleError, near_miss, quoted
from cinecat.plugins.lora import LoraHeader, inspect_lora
from cinecat.plugins.manifest import MANIFEST_NAME, StyleManifest, read_manifest

BUNDLED = Path(__file__).parent / "bundled"

# A file changed this recently may change again without its timestamps showing it: the kernel's clock ticks every few
# milliseconds.
_UNSETTLED_NS = 100_000_000
_MAX_NAMES_SHOWN = 20

# Inode, size, and times of last change of content and of the inode; None where there is no file.
_Signature = tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Style:
    """A style that can be offered.

    Attributes:
        folder: where it lies.
        weights_path: of its LoRA file.
        header: what the LoRA changes.
        fingerprint: sha256 of the weights file, in hexadecimal.
    """

    manifest: StyleManifest
    folder: Path
    weights_path: Path
    header: LoraHeader
    fingerprint: str


@dataclass(frozen=True)
class StyleProblem:
    """A folder that looks like a style but cannot be offered, and why."""

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

    def holds(self) -> bool:
        return self.settled and all(_signature(path) == known for path, known in self.signatures.items())


@dataclass(frozen=True)
class _Listing:
    styles: tuple[Style, ...]
    problems: tuple[StyleProblem, ...]


class StyleRegistry:
    """Styles in `<folder>/<any name>/style.toml` of some folders. Safe to use from several threads.

    Every call looks at the folders. It reads only what has changed since the last one; a new or changed weights file is
    hashed, which takes seconds per gigabyte. Folders whose names start with a dot are left alone, so that a style can
    be written beside the others and renamed into place.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """Folders need not exist. Where two offer the same name and version, the earlier one wins."""
        self._folders = tuple(folders)
        self._lock = threading.Lock()
        self._entries: dict[Path, _Entry] = {}

    def styles(self) -> tuple[Style, ...]:
        """By name, then newest version first."""
        return self._read().styles

    def problems(self) -> tuple[StyleProblem, ...]:
        """Folders that cannot be offered, in the order of the styles folders and then by name."""
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
            for root in self._folders:
                try:
                    found = list(_style_folders(root))
                except OSError as error:
                    problems.append(StyleProblem(root, f"cannot be listed ({error.strerror})"))
                    continue
                for folder in found:
                    known = self._entries.get(folder)
                    entries[folder] = known if known is not None and known.holds() else _read_folder(folder)
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
                    f"{first.folder}; change name or version",
                )
            problems.append(outcome)
        ordered = sorted(offered, key=lambda key: (key[0], [-part for part in key[1]]))
        return _Listing(tuple(offered[key] for key in ordered), tuple(problems))


def _style_folders(root: Path) -> Iterator[Path]:
    if not root.exists():
        return
    for folder in sorted(root.iterdir()):
        if not folder.name.startswith(".") and _has_manifest(folder):
            yield folder


def _has_manifest(folder: Path) -> bool:
    try:
        (folder / MANIFEST_NAME).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # there may be one: reading it says what is wrong
        return True
    return True


def _read_folder(folder: Path) -> _Entry:
    # Signatures are taken before the files are read: a change during the reading then shows at the next call.
    now = time.time_ns()
    signatures = {folder / MANIFEST_NAME: _signature(folder / MANIFEST_NAME)}
    outcome: Style | StyleProblem
    try:
        manifest = read_manifest(folder)
        weights_path = folder / manifest.weights
        signatures[weights_path] = _signature(weights_path)
        outcome = _read_style(folder, manifest, weights_path)
    except StyleError as error:
        outcome = StyleProblem(folder, f"{error}")
    except OSError as error:
        outcome = StyleProblem(folder, f"cannot be read ({error.strerror})")
    recent = any(signature is not None and abs(now - signature[3]) < _UNSETTLED_NS for signature in signatures.values())
    # Without a manifest it is not known which file would mend the folder; reading it again costs little.
    understood = len(signatures) == 2
    return _Entry(outcome, signatures, settled=understood and not recent)


def _read_style(folder: Path, manifest: StyleManifest, weights_path: Path) -> Style:
    header = inspect_lora(weights_path)
    with weights_path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    if manifest.sha256 and manifest.sha256.lower() != fingerprint:
        raise StyleError(
            f"{MANIFEST_NAME}: sha256 is {manifest.sha256[:12]}..., but {manifest.weights} has {fingerprint[:12]}...; "
            "copy the file again or correct the key"
        )
    return Style(manifest, folder, weights_path, header, fingerprint)


def _signature(path: Path) -> _Signature:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _advice(name: str, near: str, names: Sequence[str], problems: Sequence[StyleProblem]) -> str:
    for problem in problems:
        if problem.folder.name == name:
            return f"the folder of that name cannot be offered: {problem.reason}"
    if not names:
        return "no style is installed"
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    there_are = f"there are {', '.join(names[:_MAX_NAMES_SHOWN])}{more}"
    return f"did you mean {near}? {there_are}" if near else there_are
