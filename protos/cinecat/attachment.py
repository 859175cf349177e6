"""Where a caller stands on the event stream of one job. No I/O: the two clients do that, and share this."""

import grpc

from cinecat.errors import ServerUnavailable
from cinecat.retry import Backoff
from cinecat.states import JobState
from cinecat.v1 import generation_pb2, job_pb2


class Attachment:
    """Follows a job from the first request to its final event, over as many streams as it takes.

    Start it with a `generate` request, or with the id of a job that exists. Set `cancel_wanted` at any time.
    """

    def __init__(
        self,
        *,
        patience_s: float,
        generate: generation_pb2.GenerateRequest | None = None,
        job_id: str = "",
        after_sequence: int = 0,
    ) -> None:
        self.generate = generate
        self._backoff = Backoff(patience_s)
        self.job_id = job_id
        self.sequence = after_sequence
        self._ended = False
        self.cancel_wanted = False

    def has_ended(self) -> bool:
        """True once the final event was accepted."""
        return self._ended

    def next_request(self) -> generation_pb2.GenerateRequest | generation_pb2.WatchRequest:
        """What to send now: the Generate again, under its request id, until the job has a name, then Watch."""
        if self.generate is not None and not self.job_id:
            return self.generate
        return generation_pb2.WatchRequest(job_id=self.job_id, after_sequence=self.sequence)

    def accept(self, event: job_pb2.JobEvent) -> bool:
        """Takes in `event`; False when it was seen before."""
        self.job_id = event.job.job_id
        if event.sequence <= self.sequence:
            return False
        self._backoff.progressed()
        self.sequence = event.sequence
        self._ended = JobState.from_proto(event.job.state).is_final
        return True

    def must_cancel(self) -> bool:
        """True once after a cancel was asked for: CancelJob is to be sent, now that the job has a name."""
        due = self.cancel_wanted and bool(self.job_id) and not self._ended
        if due:
            self.cancel_wanted = False
        return due

    def delay_after(self, error: grpc.RpcError | None) -> float:
        """Seconds to wait before `next_request`, after the stream broke off with `error`, or ended too early (None).
        Raises a CinecatError when going on makes no sense.
        """
        if error is not None:
            return self._backoff.delay_after(error, job_id=self.job_id)
        problem = ServerUnavailable("the server ended the stream before the job had ended", job_id=self.job_id)
        return self._backoff.delay_after_end(problem)
