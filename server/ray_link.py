"""Between the front and an engine core on a Ray cluster: has the core placed on a node, and passes calls on to it.

A process of its own, the driver of a Ray job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from cinecat.engines.logs import configure_logging
from cinecat.engines.messages import Answer, Call, CoreConfig, CorePlaced, Failure, Notice, WaitsForRoom
from cinecat.engines.process import die_with_parent
from cinecat.server.ray_host import CoreHost, Hosted
from cinecat.server.ray_translation import Translation, in_words

log = logging.getLogger(__name__)

_ROOM_SECONDS = 5.0  # from which on it is worth saying that a replica waits
_CLOSE_SECONDS = 1.2
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Placement:
    """What a replica takes of the cluster, on one node.

    Attributes:
        address: of the cluster, as `ray.init` takes it.
        cpus, gpus: of the node.
        gpus_optional: in a cluster that has no GPU at all it is placed without.
    """

    address: str
    cpus: float
    gpus: int
    gpus_optional: bool = False


class _Gone(Exception):
    """The core, its node or the cluster is; the message says which."""


def run_link(connection: Connection, config: CoreConfig, body: Callable[..., None], placement: Placement) -> None:
    """Body of the process: to the front it is what `body` is on the node. It ends when the core does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as the core: the end of a terminal tears no step
    configure_logging(config.log_format, config.log_level)
    die_with_parent()
    front = _Front(connection)
    if find_spec("ray") is None:
        front.say(Failure("model", "executor: ray is not installed; pip install 'cinecat[ray]'"))
        return
    try:
        # Ray prints what all nodes have to say of themselves, at length; the core's log comes by `_Link.tell`.
        with Path(os.devnull).open("w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            _connect(placement.address)
            link = _Link(front, config, body, placement)
            threading.Thread(target=link.tell, name="core-log", daemon=True).start()
            if link.load():
                threading.Thread(target=link.watch, name="core-watch", daemon=True).start()
                front.serve(link.answer)
            link.close()
            os._exit(0)  # Ray's own way out takes seconds
    except Exception as error:
        front.leave(in_words(error))


def _connect(address: str) -> None:
    import ray

    try:
        if address != "auto":  # Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise _Gone(f"ray_address: there is no Ray cluster at {address}: {in_words(error)}") from error


class _Front:
    """The pipe to the front, which two threads may want to tell of the core's end; only the first does."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._due = True  # it waits for something: for Ready at first
        self._lock = threading.Lock()

    def announce(self, notice: Notice) -> None:
        self._connection.send(notice)

    def say(self, answer: Answer | Notice) -> None:
        """Raises OSError where nobody listens any more."""
        with self._lock:
            self._due = False
            self._connection.send(answer)

    def serve(self, answer: Callable[[Call], Answer | Notice]) -> None:
        """Has calls answered until the front closes the pipe or a failure is fatal."""
        while True:
            try:
                call: Call = self._connection.recv()
            except (EOFError, OSError):
                return
            self._due = True
            said = answer(call)
            self.say(said)
            if isinstance(said, Failure) and said.fatal:
                return

    def leave(self, reason: str) -> NoReturn:
        """Tells the front why, if it waits, and ends the process."""
        self._lock.acquire()
        log.error("%s", reason)
        if self._due:
            with contextlib.suppress(OSError):
                self._connection.send(Failure("died", reason, fatal=True))
        os._exit(1)


class _Link:
    """A core on a node, and calls translated for it."""

    def __init__(self, front: _Front, config: CoreConfig, body: Callable[..., None], placement: Placement) -> None:
        """Waits until a node has room, and has the core spawned there; the front hears of both.

        Raises:
            _Gone, RayError: it came to nothing.
        """
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._front = front
        self._closing = False
        gpus = placement.gpus if not placement.gpus_optional or ray.cluster_resources().get("GPU") else 0
        needs = {"CPU": placement.cpus} | ({"GPU": float(gpus)} if gpus else {})
        self._group = placement_group([needs], strategy="STRICT_PACK")
        if not self._group.wait(_ROOM_SECONDS):
            front.announce(WaitsForRoom(", ".join(f"{count:g} {kind}" for kind, count in needs.items())))
            while not self._group.wait(60):
                pass
        # A thread each for `watch`, `tell`, a call, and `close` beside a call that hangs.
        self._host = (
            ray.remote(CoreHost)
            .options(
                num_cpus=placement.cpus,
                num_gpus=gpus,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0),
            )
            .remote(body, config)
        )
        self._hosted: Hosted = ray.get(self._host.hosted.remote())
        ours = version("cinecat")
        if self._hosted.version != ours:
            raise _Gone(f"node {self._hosted.node} has cinecat {self._hosted.version}, this server is {ours}")
        self._translation = Translation(self._heard, Path(self._hosted.folder))
        front.announce(CorePlaced(self._hosted.node, self._hosted.pid))

    def load(self) -> bool:
        """Passes on what the core says until its model is loaded or refused; whether it is loaded."""
        said = self._heard("receive")
        while isinstance(said, Notice):
            self._front.announce(said)
            said = self._heard("receive")
        self._front.say(said)
        return not isinstance(said, Failure)

    def watch(self) -> None:
        """Ends this process when the core, its node or the cluster is gone, unless by `close`."""
        try:
            reason = self._heard("watch").message
        except Exception as error:
            reason = in_words(error)
        if not self._closing:
            self._front.leave(reason)

    def tell(self) -> None:
        """Writes the core's log to this machine's, as it comes."""
        with contextlib.suppress(Exception):  # `watch` has more to say of it
            while said := self._do("log"):
                os.write(2, said)

    def close(self) -> None:
        """Leaves nothing in the cluster. Where that takes too long, Ray does the rest when this process is gone."""
        import ray
        from ray.util.placement_group import remove_placement_group

        self._closing = True
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._host.close.remote(), timeout=_CLOSE_SECONDS)
        ray.kill(self._host)
        remove_placement_group(self._group)

    def answer(self, call: Call) -> Answer | Notice:
        """What the core says to a call. Raises _Gone where there is none any more."""
        return self._translation.answer(call)

    def _heard(self, method: str, *arguments: object) -> Any:
        """What the core says, with its place where that is its death."""
        said = self._do(method, *arguments)
        if isinstance(said, Failure) and said.kind == "died":
            return replace(said, message=f"{said.message} on node {self._hosted.node}")
        return said

    def _do(self, method: str, *arguments: object) -> Any:
        """What a method of the host returns. Raises _Gone where there is no host any more."""
        import ray

        try:
            return ray.get(getattr(self._host, method).remote(*arguments))
        except ray.exceptions.RayActorError as error:
            raise _Gone(f"the engine core's host on node {self._hosted.node} is gone: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Of an actor's death: Ray tells it last, at length."""
    return f"{error}".strip().splitlines()[-1].strip().partition(". ")[0]
