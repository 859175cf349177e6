"""The store of engines among processes that wait, die and fill the disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cinecat.engines.backends.store import EngineStore
from cinecat.engines.backends.store_events import Outcome, StoreEvent
from cinecat.engines.errors import EngineCacheError
from tests.engines.backends.builds import KEY, wait_for, write_engine

ROOT = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "engines"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(processes: list[subprocess.Popen[bytes]], function: str, root: Path, notes: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.engines.backends.builds", function, str(root), str(notes)]
    processes.append(subprocess.Popen(command, cwd=ROOT))
    return processes[-1]


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {".locks"}


def test_of_two_processes_one_builds_and_the_other_takes_what_it_built(
    root: Path, notes: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    first = start(processes, "build_and_log", root, notes)
    wait_for(notes / "building")
    second = start(processes, "build_and_log", root, notes)
    events: list[StoreEvent] = []
    waiting = threading.Event()

    def announce(event: StoreEvent) -> None:
        events.append(event)
        if event.outcome is Outcome.WAITING:
            waiting.set()

    store = EngineStore(root, None, announce)
    third = threading.Thread(target=lambda: store.build(KEY, write_engine))
    third.start()
    assert waiting.wait(60)
    assert EngineStore(root, None).get(KEY) is None  # does not wait
    (notes / "go-on").touch()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    third.join(60)
    assert len((notes / "made").read_text().splitlines()) == 1
    assert len(list(notes.glob("done-*"))) == 2
    assert [event.outcome for event in events] == [Outcome.MISS, Outcome.WAITING, Outcome.HIT]
    assert names(root) == {KEY.digest}


def test_a_build_killed_half_way_is_no_engine_and_is_swept(
    root: Path, notes: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    victim = start(processes, "build_forever", root, notes)
    wait_for(notes / "half")
    store = EngineStore(root, None)
    store.prune(0)
    assert len(names(root)) == 1  # a build that goes on keeps what it wrote
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    leftover = names(root)
    assert len(leftover) == 1
    assert store.get(KEY) is None
    assert store.entries() == []
    assert names(root) == leftover
    files = store.build(KEY, write_engine)
    assert names(root) == {KEY.digest}
    assert store.verify(store.entries()[0]) == []
    assert (files / "plan.engine").read_bytes() == b"engine"


def test_a_caller_that_waits_builds_when_the_builder_is_killed(
    root: Path, notes: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    victim = start(processes, "build_forever", root, notes)
    wait_for(notes / "half")
    waiting = threading.Event()
    store = EngineStore(root, None, lambda event: waiting.set() if event.outcome is Outcome.WAITING else None)
    thread = threading.Thread(target=lambda: store.build(KEY, write_engine))
    thread.start()
    assert waiting.wait(60)
    victim.send_signal(signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive()
    assert names(root) == {KEY.digest}


def test_an_engine_that_a_process_uses_is_pruned_once_it_died(
    root: Path, notes: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    store = EngineStore(root, None)
    store.build(KEY, write_engine)
    store.close()
    user = start(processes, "hold", root, notes)
    wait_for(notes / "held")
    assert len(store.prune(0).in_use) == 1
    assert names(root) == {KEY.digest}
    user.send_signal(signal.SIGKILL)
    user.wait()
    assert len(store.prune(0).removed) == 1
    assert names(root) == set()


def test_processes_that_build_take_and_prune_at_once_only_ever_see_whole_engines(
    root: Path, notes: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    churning = [start(processes, "churn", root, notes) for _ in range(4)]
    assert [process.wait(120) for process in churning] == [0] * 4
    store = EngineStore(root, None)
    assert all(store.verify(entry) == [] for entry in store.entries())
    assert not [name for name in names(root) if name.startswith(".")]


def test_a_process_may_die_before_any_of_its_file_operations(
    root: Path, notes: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    assert start(processes, "die_everywhere", root, notes).wait(200) == 0
    building, pruning = map(int, (notes / "deaths").read_text().split())
    assert building > 20
    assert pruning > 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command to make a small disk with")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(folder: Path) -> None:
    """Writes until nothing fits any more."""
    with (folder / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65_536))


def fill_and_tell_in_other_words(folder: Path) -> None:
    try:
        fill(folder)
    except OSError:
        raise RuntimeError("the writer failed to write") from None


@pytest.mark.parametrize("make", [fill, fill_and_tell_in_other_words])
def test_a_build_that_fills_the_disk_gives_the_space_back_and_harms_nothing(small_disk: Path, make: object) -> None:
    store = EngineStore(small_disk / "engines", None)
    store.build(KEY, write_engine)
    free = os.statvfs(small_disk).f_bavail
    other = KEY.of({**KEY.fields, "bucket": (4, 320)})
    with pytest.raises(EngineCacheError, match=r"engine_cache_dir: the disk of .* is full.*engine_cache_gib"):
        store.build(other, make)  # type: ignore[arg-type]
    assert os.statvfs(small_disk).f_bavail == free
    assert names(small_disk / "engines") == {KEY.digest}
    assert [store.verify(entry) for entry in store.entries()] == [[]]
    assert store.build(other, write_engine).is_dir()


def test_an_engine_whose_manifest_finds_no_space_does_not_appear(small_disk: Path) -> None:
    def leave_nothing(folder: Path) -> None:
        write_engine(folder)
        with pytest.raises(OSError, match="No space left"):
            fill(small_disk)

    store = EngineStore(small_disk / "engines", None)
    with pytest.raises(EngineCacheError, match="is full"):
        store.build(KEY, leave_nothing)
    assert names(small_disk / "engines") == set()
    with pytest.raises(EngineCacheError, match="is full"):
        store.build(KEY, write_engine)
    assert store.get(KEY) is None
    (small_disk / "filling").unlink()
    assert store.build(KEY, write_engine).is_dir()


def test_a_build_has_the_space_that_killed_builds_took(small_disk: Path) -> None:
    store = EngineStore(small_disk / "engines", None)
    store.build(KEY, write_engine)
    store.close()
    store.prune(0)
    leftover = small_disk / "engines" / f".building-{KEY.digest}-{'0' * 16}"
    leftover.mkdir()
    (leftover / "half").write_bytes(bytes(3 * 2**20))
    assert store.build(KEY, lambda folder: (folder / "plan.engine").write_bytes(bytes(2 * 2**20)) and None)


def test_a_full_disk_serves_what_it_has_and_can_be_pruned(small_disk: Path) -> None:
    store = EngineStore(small_disk / "engines", None)
    store.build(KEY, write_engine)
    (small_disk / "engines" / KEY.digest / "checked.json").unlink()
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk)
    assert store.get(KEY)  # though its checksums cannot be noted down
    store.close()
    assert len(store.prune(0).removed) == 1


def test_a_read_only_disk_serves_what_it_has_and_says_why_it_takes_no_more(small_disk: Path) -> None:
    events: list[StoreEvent] = []
    store = EngineStore(small_disk / "engines", None, events.append)
    store.build(KEY, write_engine)
    other = KEY.of({**KEY.fields, "bucket": (4, 320)})
    damaged = store.build(other, write_engine)
    (damaged / "plan.engine").write_bytes(b"")
    store.close()
    (small_disk / "engines" / KEY.digest / "checked.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert store.get(KEY)
    events.clear()
    assert store.get(other) is None
    assert [event.outcome for event in events] == [Outcome.DAMAGED, Outcome.MISS]
    with pytest.raises(EngineCacheError, match=r"engine_cache_dir: .* may not be used by this user"):
        store.build(other, write_engine)
    assert [bool(store.verify(entry)) for entry in store.entries()].count(True) == 1
