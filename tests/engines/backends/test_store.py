"""The store of engines within one process: what it gives out, refuses, keeps and removes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cinecat.engines.backends.store import EngineStore
from cinecat.engines.backends.store_entry import compare_checksums
from cinecat.engines.backends.store_events import Outcome, StoreEvent
from cinecat.engines.backends.store_folder import default_engine_folder
from cinecat.engines.backends.store_lease import Lease
from cinecat.engines.errors import EngineCacheError, EngineError
from tests.engines.backends.builds import KEY, key, write_engine

ENGINE_BYTES = 6 + 256 * 64


class Watched:
    """A store, what it announced, and how many builds it ran."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.events: list[StoreEvent] = []
        self.store = EngineStore(root, max_bytes, self.events.append)
        self.builds = 0

    def build(self, number: int | None = None) -> Path:
        def make(folder: Path) -> None:
            self.builds += 1
            write_engine(folder)

        return self.store.build(KEY if number is None else key(number), make)

    def outcomes(self) -> list[str]:
        outcomes = [str(event.outcome) for event in self.events]
        self.events.clear()
        return outcomes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "engines"


@pytest.fixture
def watched(root: Path) -> Watched:
    return Watched(root)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {".locks"}


def read_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the bytes that are read for checksums."""
    read: list[int] = []

    def reading(*arguments: object, **options: object) -> object:
        entry, advance, *rest = arguments
        return compare_checksums(entry, lambda size: (read.append(size), advance(size))[1], *rest, **options)  # type: ignore[operator, arg-type, func-returns-value]

    monkeypatch.setattr("cinecat.engines.backends.store.compare_checksums", reading)
    return read


def test_an_engine_is_built_once_and_then_found(watched: Watched, root: Path) -> None:
    assert watched.store.get(KEY) is None
    assert not root.exists()
    files = watched.build()
    assert (files / "plan.engine").read_bytes() == b"engine"
    assert watched.outcomes() == ["miss", "miss", "built"]
    assert watched.build() == files == watched.store.get(KEY)
    assert watched.outcomes() == ["hit", "hit"]
    assert watched.builds == 1
    assert names(root) == {KEY.digest}


def test_a_build_tells_its_seconds_and_bytes(watched: Watched) -> None:
    watched.build()
    built = watched.events[-1]
    entry = watched.store.entries()[0]
    assert (built.outcome, built.digest, built.size_bytes) == (Outcome.BUILT, KEY.digest, ENGINE_BYTES)
    assert entry.manifest is not None
    assert entry.manifest.build_seconds == built.seconds > 0
    assert entry.manifest.key == KEY
    assert set(entry.manifest.files) == {"plan.engine", "weights/0.bin"}


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(watched: Watched, root: Path) -> None:
    def fail(folder: Path) -> None:
        write_engine(folder)
        raise RuntimeError("no such kernel") from KeyError("cause")

    with pytest.raises(RuntimeError, match="no such kernel") as raised:
        watched.store.build(KEY, fail)
    assert isinstance(raised.value.__cause__, KeyError)
    assert names(root) == set()
    assert watched.build().is_dir()


def link_out(folder: Path) -> None:
    (folder / "secret").symlink_to("/etc/hostname")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize(
    ("make", "problem"),
    [(lambda folder: None, "wrote no file"), (link_out, "secret is a link"), (pipe, "pipe is a link or a device")],
)
def test_a_build_that_writes_no_engine_is_refused(
    watched: Watched, root: Path, make: Callable[[Path], None], problem: str
) -> None:
    with pytest.raises(EngineCacheError, match=problem):
        watched.store.build(KEY, make)
    assert names(root) == set()


def flip(entry: Path) -> None:
    path = entry / "engine" / "weights" / "0.bin"
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)


def manifest_of_another_version(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))


def manifest_of_another_engine(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "key": {"backend": "onnxruntime"}}))


def manifest_that_escapes(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["files"]["../../../other"] = {"size_bytes": 1, "sha256": "0" * 64}
    (entry / "manifest.json").write_text(json.dumps(manifest))


def link_to_a_copy(path: Path) -> None:
    """The same content, outside of the entry."""
    copy = path.parents[3] / "outside"
    path.rename(copy)
    path.symlink_to(copy)


def replaced_by_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("an engine")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "a truncated file": lambda entry: os.truncate(entry / "engine" / "plan.engine", 3),
    "a missing file": lambda entry: (entry / "engine" / "plan.engine").unlink(),
    "an extra file": lambda entry: (entry / "engine" / "weights" / "1.bin").write_bytes(b"x"),
    "no files": lambda entry: shutil.rmtree(entry / "engine"),
    "a link out": lambda entry: link_to_a_copy(entry / "engine" / "plan.engine"),
    "a folder linked out": lambda entry: link_to_a_copy(entry / "engine" / "weights"),
    "all linked out": lambda entry: link_to_a_copy(entry / "engine"),
    "a pipe for a file": lambda entry: (
        (entry / "engine" / "plan.engine").unlink(),
        os.mkfifo(entry / "engine" / "plan.engine"),
    ),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "half a manifest": lambda entry: os.truncate(entry / "manifest.json", 100),
    "another version": manifest_of_another_version,
    "another engine": manifest_of_another_engine,
    "a path out": manifest_that_escapes,
    "no file used": lambda entry: (entry / "used").unlink(),
    "used is a folder": lambda entry: ((entry / "used").unlink(), (entry / "used").mkdir()),
    "used is a link": lambda entry: ((entry / "used").unlink(), (entry / "used").symlink_to("manifest.json")),
    "an empty folder": lambda entry: (shutil.rmtree(entry), entry.mkdir()),
    "a file": replaced_by_a_file,
    "a link to nowhere": lambda entry: (shutil.rmtree(entry), entry.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("fresh", [True, False], ids=["another store", "the store that uses it"])
def test_what_is_damaged_is_told_removed_and_built_anew(watched: Watched, root: Path, damage: str, fresh: bool) -> None:
    files = watched.build()
    DAMAGE[damage](root / KEY.digest)
    if fresh:
        watched = Watched(root)
    watched.events.clear()
    assert watched.store.get(KEY) is None
    damaged = [event for event in watched.events if event.outcome is Outcome.DAMAGED]
    assert len(damaged) == 1
    assert damaged[0].detail != KEY.describe()
    assert not os.path.lexists(root / KEY.digest)
    assert watched.build() == files
    assert (files / "plan.engine").read_bytes() == b"engine"
    assert watched.store.verify(watched.store.entries()[0]) == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_build_looks_again_before_it_begins(watched: Watched, root: Path, damage: str) -> None:
    watched.build()
    DAMAGE[damage](root / KEY.digest)
    watched.build()
    assert watched.builds == 2
    assert watched.store.get(KEY)


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_what_is_damaged_and_prune_removes_it(watched: Watched, root: Path, damage: str) -> None:
    watched.build()
    watched.build(1)
    watched.store.close()
    DAMAGE[damage](root / KEY.digest)
    problems = {entry.digest: watched.store.verify(entry) for entry in watched.store.entries()}
    assert problems.pop(KEY.digest)
    assert problems == {key(1).digest: []}
    pruned = watched.store.prune(None)
    assert [entry.digest for entry in pruned.removed] == [KEY.digest]
    assert names(root) == {key(1).digest}


def test_bytes_that_rot_under_an_unchanged_stat_are_found_by_verify_and_not_served_again(
    watched: Watched, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = watched.build()
    monkeypatch.setattr("cinecat.engines.backends.store_entry.checksum", lambda path, advance: "0" * 64)
    assert watched.store.get(KEY) == files  # its files did not change, so nothing is read
    assert len(watched.store.verify(watched.store.entries()[0])) == 2
    monkeypatch.undo()
    assert watched.store.entries()[0].problems
    assert watched.store.get(KEY) is None


def test_files_are_read_when_they_are_new_to_the_folder_and_then_no_more(
    watched: Watched, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_sizes(monkeypatch)
    watched.build()
    assert watched.store.get(KEY)
    assert read == []
    shutil.copytree(root, tmp_path / "copy")  # other inodes
    copy = Watched(tmp_path / "copy")
    assert copy.store.get(KEY)
    assert (sum(read), copy.outcomes()) == (ENGINE_BYTES, ["checking", "hit"])
    assert copy.store.get(KEY)
    assert sum(read) == ENGINE_BYTES


@pytest.mark.parametrize("content", ["", "[]", "{", '{"plan.engine": 1}', '{"plan.engine": [1, 2, 3, 4, "a"]}'])
def test_nonsense_in_the_notes_means_reading_again(watched: Watched, root: Path, content: str) -> None:
    files = watched.build()
    (root / KEY.digest / "checked.json").write_text(content)
    watched.events.clear()
    assert watched.store.get(KEY) == files
    assert watched.outcomes() == ["checking", "hit"]


def test_the_longest_unused_go_first(watched: Watched, root: Path) -> None:
    for number in range(4):
        watched.build(number)
        os.utime(root / key(number).digest / "used", (number, number))
    watched.store.close()
    assert watched.store.get(key(1))
    watched.store.close()
    assert [entry.digest for entry in watched.store.entries()] == [key(number).digest for number in (0, 2, 3, 1)]
    watched.events.clear()
    pruned = watched.store.prune(2 * ENGINE_BYTES)
    assert [entry.digest for entry in pruned.removed] == [key(0).digest, key(2).digest]
    assert (pruned.kept_bytes, pruned.in_use) == (2 * ENGINE_BYTES, ())
    assert names(root) == {key(3).digest, key(1).digest}
    assert watched.outcomes() == ["evicted", "evicted"]


def test_a_use_rewrites_nothing_but_the_time(watched: Watched, root: Path) -> None:
    watched.build()
    before = {path: path.stat().st_mtime_ns for path in (root / KEY.digest).rglob("*")}
    os.utime(root / KEY.digest / "used", (1, 1))
    watched.store.get(KEY)
    after = {path: path.stat().st_mtime_ns for path in (root / KEY.digest).rglob("*")}
    assert {path.name for path in before if before[path] != after[path]} == {"used"}


def test_a_build_makes_room_for_itself_but_not_by_what_is_in_use(root: Path) -> None:
    watched = Watched(root, 2 * ENGINE_BYTES)
    watched.build(0)
    watched.build(1)
    watched.store.release(key(0))
    watched.build(2)
    assert names(root) == {key(1).digest, key(2).digest}
    watched.build(3)
    assert names(root) == {key(1).digest, key(2).digest, key(3).digest}


def test_an_engine_in_use_is_neither_pruned_nor_removed_until_it_is_released(watched: Watched, root: Path) -> None:
    watched.build()
    other = EngineStore(root, None)
    pruned = other.prune(0)
    assert (pruned.removed, [entry.digest for entry in pruned.in_use]) == ((), [KEY.digest])
    assert not other.remove(other.entries()[0])
    watched.store.release(KEY)
    assert other.remove(other.entries()[0])
    assert names(root) == set()


def test_an_engine_taken_twice_is_held_once(watched: Watched, root: Path) -> None:
    watched.build()
    watched.store.get(KEY)
    watched.store.release(KEY)
    assert watched.store.remove(watched.store.entries()[0])


def test_an_entry_that_was_built_anew_after_it_was_listed_is_not_removed(watched: Watched, root: Path) -> None:
    watched.build()
    flip(root / KEY.digest)
    os.truncate(root / KEY.digest / "engine" / "plan.engine", 1)
    listed = watched.store.entries()[0]
    watched.build()
    watched.store.close()
    assert not watched.store.remove(listed)
    assert watched.store.get(KEY)


def test_a_lease_on_an_entry_that_went_meanwhile_is_none(watched: Watched, root: Path) -> None:
    watched.build()
    watched.store.close()
    with Lease(root / KEY.digest) as late:
        assert watched.store.prune(0).removed
        assert not late.share()
    watched.build()
    with Lease(root / KEY.digest) as first, Lease(root / KEY.digest) as second:
        assert first.share()
        assert second.share()
        assert not second.claim()


def test_what_is_not_the_stores_stays(watched: Watched, root: Path) -> None:
    root.mkdir(parents=True)
    foreign = ["notes.txt", ".building-mine", f".building-{KEY.digest}", f"{KEY.digest}.bak", KEY.digest.upper()]
    for name in foreign:
        (root / name).mkdir()
    watched.build()
    watched.store.close()
    watched.store.prune(0)
    assert names(root) == set(foreign)


def test_leftovers_are_swept_by_the_next_build_and_by_prune(watched: Watched, root: Path) -> None:
    leftovers = [f".building-{KEY.digest}-{'0' * 16}", f".building-{key(1).digest}-{'1' * 16}"]
    leftovers += [f".removed-{KEY.digest}-{'2' * 16}"]
    for sweep in (watched.build, lambda: watched.store.prune(None)):
        for name in leftovers:
            write_engine_in(root / name)
        sweep()
        assert names(root) == {KEY.digest}


def write_engine_in(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_engine(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_folder_settings_and_what_to_do(watched: Watched, root: Path, code: int) -> None:
    def full(folder: Path) -> None:
        raise OSError(code, "No space left on device")

    with pytest.raises(EngineCacheError) as raised:
        watched.store.build(KEY, full)
    message = str(raised.value)
    assert isinstance(raised.value, EngineError)
    for part in (str(root), "engine_cache_dir", "engine_cache_gib", "cinecat engines prune", "full"):
        assert part in message
    assert names(root) == set()


def test_other_errors_of_a_build_are_its_own(watched: Watched) -> None:
    def missing(folder: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "model.onnx")

    with pytest.raises(FileNotFoundError, match=r"model\.onnx"):
        watched.store.build(KEY, missing)


def test_a_folder_that_is_a_file_is_told_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("")
    store = EngineStore(tmp_path / "engines", None)
    with pytest.raises(EngineCacheError, match=r"engine_cache_dir: .*engines cannot be used"):
        store.build(KEY, write_engine)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told_with_the_setting(watched: Watched, root: Path) -> None:
    root.mkdir(parents=True)
    root.chmod(0o500)
    with pytest.raises(EngineCacheError, match=r"engine_cache_dir: .* may not be used by this user"):
        watched.build()
    root.chmod(0o700)


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_engine_folder() == tmp_path / "cinecat" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_engine_folder() == tmp_path / ".cache" / "cinecat" / "engines"
