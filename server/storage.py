"""What a server keeps on disk and elsewhere, opened at its start; what cannot be is told by the setting's name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import structlog
from filelock import FileLock, Timeout

from cinecat.plugins.formats.registry import installed_formats
from cinecat.plugins.installed import InstalledStyles
from cinecat.plugins.registry import BUNDLED, StyleRegistry
from cinecat.plugins.sources import FolderSource, Origin, PackageSource
from cinecat.server.artifacts import ArtifactError, ArtifactStore
from cinecat.server.checkpoints import Checkpoints
from cinecat.server.database import DatabaseError
from cinecat.server.settings import Settings, SettingsError
from cinecat.server.store import JobStore

log = structlog.get_logger(__name__)


@contextlib.contextmanager
def sole_use_of(folder: Path) -> Iterator[None]:
    """Two servers on one database would both run its jobs. The lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "server.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SettingsError(f"data_dir: {folder} is in use by another server; give each its own") from error
    except OSError as error:
        raise SettingsError(f"data_dir: {folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


def open_store(settings: Settings, folder: Path) -> JobStore:
    """Raises SettingsError, as all of these do."""
    try:
        return JobStore(settings.database_url or folder / "jobs.sqlite")
    except DatabaseError as error:
        raise SettingsError(f"{error}") from error


def open_artifacts(url: str) -> ArtifactStore:
    """Without what a former server left half-written."""
    try:
        artifacts = ArtifactStore(url)
        artifacts.clear_scratch()
    except (ArtifactError, OSError) as error:
        raise SettingsError(f"artifact_url: {error}") from error
    return artifacts


def check_owner(artifacts: ArtifactStore, identity: str) -> None:
    """Each server takes files that its database does not know for orphans, so two must not share a folder."""
    try:
        owner = artifacts.owner()
    except ArtifactError as error:
        raise SettingsError(f"artifact_url: {error}") from error
    if owner not in ("", identity):
        raise SettingsError(
            "artifact_url: the clips there belong to another job database; name another folder, or delete the file "
            "'owner' in it to keep them beside this database's"
        )


def open_checkpoints(folder: Path) -> Checkpoints:
    """Of jobs that run."""
    try:
        return Checkpoints(folder)
    except OSError as error:
        raise SettingsError(f"data_dir: {folder} cannot hold checkpoints: {error}") from error


def open_installed(folder: Path) -> InstalledStyles:
    """Uploaded styles, without what broke off."""
    try:
        installed = InstalledStyles(folder)
        installed.clear_leftovers()
    except OSError as error:
        raise SettingsError(f"data_dir: {folder} cannot hold uploaded styles: {error}") from error
    return installed


def open_registry(settings: Settings, installed: InstalledStyles) -> StyleRegistry:
    """All styles that there are."""
    for problem in installed_formats().problems:
        log.warning("adapter format not usable", entry_point=problem.entry_point, reason=problem.reason)
    folders = [FolderSource(path.expanduser()) for path in settings.styles_dirs]
    for folder in folders:
        if not folder.root.is_dir():
            log.warning("styles folder is not there; it is watched", folder=str(folder.root))
    return StyleRegistry([FolderSource(BUNDLED, Origin.BUNDLED), *folders, installed.source, PackageSource()])
