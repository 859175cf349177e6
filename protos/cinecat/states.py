"""The states of a job."""

from enum import StrEnum

from cinecat.v1 import job_pb2


class JobState(StrEnum):
    """Where a job stands. The last three are final."""

    UNKNOWN = "unknown"
    QUEUED = "queued"
    CONDITIONING = "conditioning"
    DENOISING = "denoising"
    DECODING = "decoding"
    ENCODING = "encoding"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

    @classmethod
    def from_proto(cls, state: "job_pb2.JobState.ValueType") -> "JobState":
        """UNKNOWN for a state that this client is too old to know."""
        return _STATES.get(state, cls.UNKNOWN)

    def to_proto(self) -> "job_pb2.JobState.ValueType":
        return next((number for number, state in _STATES.items() if state is self), job_pb2.JOB_STATE_UNSPECIFIED)


_STATES = {
    job_pb2.JOB_STATE_QUEUED: JobState.QUEUED,
    job_pb2.JOB_STATE_CONDITIONING: JobState.CONDITIONING,
    job_pb2.JOB_STATE_DENOISING: JobState.DENOISING,
    job_pb2.JOB_STATE_DECODING: JobState.DECODING,
    job_pb2.JOB_STATE_ENCODING: JobState.ENCODING,
    job_pb2.JOB_STATE_SUCCEEDED: JobState.SUCCEEDED,
    job_pb2.JOB_STATE_FAILED: JobState.FAILED,
    job_pb2.JOB_STATE_CANCELLED: JobState.CANCELLED,
}
