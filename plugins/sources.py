"""Where styles come from: folders that hold style folders, and Python packages that announce some.

A package offers styles through the entry point group `cinecat.styles`. An entry point's value is a package or module;
the folder it lies in is a style, or holds style folders. Nothing of the package itself is run to find them, only the
packages that a dotted name passes through.
"""

from __future__ import annotations

import enum
import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from cinecat.plugins.errors import StyleError, quoted, shown
from cinecat.plugins.manifest import MANIFEST_NAME

GROUP = "cinecat.styles"


class Origin(enum.StrEnum):
    """Who put a style there, which decides who may take it away."""

    BUNDLED = "bundled"
    FOLDER = "folder"
    INSTALLED = "installed"
    PACKAGE = "package"


@dataclass(frozen=True)
class Place:
    """A folder that may hold a style.

    Attributes:
        provider: of a package's style, the entry point and its distribution, e.g. "dusk (cinecat-dusk 1.2)".
    """

    folder: Path
    origin: Origin
    provider: str = ""


class SourceError(StyleError):
    """A source, or a part of it, in which no styles can be looked for.

    Attributes:
        place: the folder, or the package's entry point.
        reason: what is wrong with it.
    """

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)
        self.place = place
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class StyleSource(Protocol):
    """Some folders with style.toml, as they are now."""

    def places(self) -> Iterator[Place | SourceError]: ...


@dataclass(frozen=True)
class FolderSource:
    """The styles in `<root>/<any name>/`. The root need not exist.

    Folders whose names start with a dot are left alone, so that a style can be written beside the others and renamed
    into place.
    """

    root: Path
    origin: Origin = Origin.FOLDER

    def places(self) -> Iterator[Place | SourceError]:
        try:
            folders = list(_style_folders(self.root))
        except OSError as error:
            yield SourceError(shown(self.root), f"cannot be listed ({error.strerror})")
            return
        for folder in folders:
            yield Place(folder, self.origin)


class PackageSource:
    """The styles of installed Python packages. Looks again when something was installed or removed."""

    def __init__(self, announced: Callable[[], Iterable[EntryPoint]] = lambda: entry_points(group=GROUP)) -> None:
        self._announced = announced
        self._lock = threading.Lock()
        self._seen: object = None
        self._roots: list[tuple[Path, str] | SourceError] = []

    def places(self) -> Iterator[Place | SourceError]:
        for root in self._located():
            if isinstance(root, SourceError):
                yield root
                continue
            folder, provider = root
            try:
                folders = [folder] if _has_manifest(folder) else list(_style_folders(folder))
            except OSError as error:
                yield SourceError(provider, f"{shown(folder)} cannot be listed ({error.strerror})")
                continue
            if not folders:
                missing = f"there is no {MANIFEST_NAME} in {shown(folder)} or in a folder of it; add one"
                yield SourceError(provider, missing)
            for each in folders:
                yield Place(each, Origin.PACKAGE, provider)

    def _located(self) -> list[tuple[Path, str] | SourceError]:
        """Installing or removing a package changes a folder on sys.path; the metadata is read only then."""
        with self._lock:
            seen = tuple((path, _changed(path)) for path in sys.path)
            if seen != self._seen:
                importlib.invalidate_caches()
                self._roots = list(self._all_roots())
                self._seen = seen
            return self._roots

    def _all_roots(self) -> Iterator[tuple[Path, str] | SourceError]:
        try:
            entries = list(self._announced())
        except Exception as error:  # whatever the metadata of some package holds
            yield SourceError(GROUP, f"the installed packages cannot be read: {type(error).__name__}: {error}")
            return
        for entry in entries:
            yield from _roots(entry)


def _roots(entry: EntryPoint) -> Iterator[tuple[Path, str] | SourceError]:
    distribution = f" ({entry.dist.name} {entry.dist.version})" if entry.dist is not None else ""
    provider = f"{entry.name}{distribution}"
    try:
        spec = find_spec(entry.module)
    except Exception as error:  # whatever the packages around it do
        yield SourceError(provider, f"{quoted(entry.value)} cannot be found: {type(error).__name__}: {error}")
        return
    if spec is None:
        yield SourceError(provider, f"there is no package {quoted(entry.value)}; install the distribution again")
    elif spec.submodule_search_locations is not None:
        yield from ((Path(folder), provider) for folder in spec.submodule_search_locations)
    elif spec.origin is not None and spec.has_location:
        yield Path(spec.origin).parent, provider
    else:
        yield SourceError(provider, f"{quoted(entry.value)} lies in no folder; name a package that does")


def _changed(path: str) -> int:
    try:
        return Path(path or ".").stat().st_mtime_ns
    except OSError:
        return 0


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
