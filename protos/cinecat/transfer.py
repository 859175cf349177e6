"""Where a download stands: what has arrived, and whether it is what the job wrote. No network I/O."""

import hashlib
import io
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import grpc

from cinecat.clip import Artifact, artifact_from_proto, job_error
from cinecat.errors import DownloadCorrupted, FieldViolation, NotFound, ServerUnavailable, WrongState, refuse
from cinecat.retry import Backoff
from cinecat.states import JobState
from cinecat.v1 import generation_pb2, job_pb2


class Transfer:
    """Receives one artifact, over as many streams as it takes, into memory or into `output`.

    Use it as a context manager and call `finish` inside. A file is written beside `output` and takes its place only in
    `finish`, so that `output` never holds half a clip.
    """

    def __init__(self, job_id: str, artifact: Artifact, output: Path | None, *, patience_s: float) -> None:
        self._job_id = job_id
        self._artifact = artifact
        self._output = output
        self._backoff = Backoff(patience_s)
        self._digest = hashlib.sha256()
        self._offset = 0
        self._part = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part") if output else None
        self._sink: BinaryIO = self._part.open("xb") if self._part else io.BytesIO()

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sink.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        return self._offset >= self._artifact.size_bytes

    def next_request(self) -> generation_pb2.DownloadRequest:
        """What to send now: the rest from the first byte that is missing."""
        return generation_pb2.DownloadRequest(job_id=self._job_id, artifact=self._artifact.name, offset=self._offset)

    def accept(self, chunk: generation_pb2.DownloadChunk) -> None:
        """Takes in `chunk`. Raises DownloadCorrupted when it does not follow the bytes received, or is too long."""
        if chunk.offset != self._offset:
            raise self._corrupted(f"a chunk starts at byte {chunk.offset}, not {self._offset}")
        self._sink.write(chunk.data)
        self._digest.update(chunk.data)
        self._offset += len(chunk.data)
        if self._offset > self._artifact.size_bytes:
            raise self._corrupted(f"more than its {self._artifact.size_bytes} bytes arrived")
        self._backoff.progressed()

    def delay_after(self, error: grpc.RpcError | None) -> float:
        """Seconds to wait before `next_request`, after the stream broke off with `error`, or ended too early (None).
        Raises a CinecatError when going on makes no sense.
        """
        if error is not None:
            return self._backoff.delay_after(error, job_id=self._job_id)
        problem = ServerUnavailable("the server ended the download too early", job_id=self._job_id)
        return self._backoff.delay_after_end(problem)

    def finish(self) -> bytes | Path:
        """The artifact's bytes, or the path that it was saved at. Raises DownloadCorrupted on a wrong checksum."""
        if self._artifact.sha256 and self._digest.hexdigest() != self._artifact.sha256.lower():
            raise self._corrupted(f"its SHA-256 is {self._digest.hexdigest()}, not {self._artifact.sha256}")
        if isinstance(self._sink, io.BytesIO):
            return self._sink.getvalue()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        assert self._part is not None
        assert self._output is not None
        return self._part.replace(self._output)

    def _corrupted(self, problem: str) -> DownloadCorrupted:
        return DownloadCorrupted(f"{self._artifact.name} of job {self._job_id}: {problem}", job_id=self._job_id)


def check_output(output: str | os.PathLike[str] | None) -> Path | None:
    """`output` as a path. Raises InvalidRequest when no file can be written there, before any work is asked for."""
    if output is None:
        return None
    path = Path(output)
    problem = ""
    if path.is_dir():
        problem = f"{path} is a folder; give a file"
    elif path.exists() and not path.is_file():
        problem = f"{path} is not a regular file, and would be replaced by one"
    elif not path.parent.is_dir():
        problem = f"{path.parent} is not a folder; create it first"
    elif not os.access(path.parent, os.W_OK):
        problem = f"{path.parent} cannot be written to"
    if problem:
        raise refuse([FieldViolation("output", problem)])
    return path


def select_artifact(job: job_pb2.Job, name: str) -> Artifact:
    """The artifact `name` of `job`, or its first one when `name` is empty. Raises JobFailed, JobCancelled, WrongState
    (not finished) or NotFound.
    """
    state = JobState.from_proto(job.state)
    if state is not JobState.SUCCEEDED:
        if state.is_final:
            raise job_error(job)
        raise WrongState(f"job {job.job_id} is {state}; it has files once it has succeeded", job_id=job.job_id)
    artifacts = list(map(artifact_from_proto, job.result.artifacts))
    for artifact in artifacts:
        if name in ("", artifact.name):
            return artifact
    names = ", ".join(artifact.name for artifact in artifacts) or "none"
    raise NotFound(f"job {job.job_id} has no artifact {name!r}; it has: {names}", job_id=job.job_id)
