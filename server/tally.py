"""What becomes of a rendering's measurements in the job's result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cinecat.engines.messages import StageTime
from cinecat.server.artifacts import ArtifactInfo
from cinecat.v1 import clip_pb2
from cinecat.v1 import job_pb2 as pb


@dataclass
class Tally:
    """Seconds, tokens and the engine of one job."""

    timings: list[StageTime] = field(default_factory=list)
    plan_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    step_tokens: list[int] = field(default_factory=list)
    engine: str = ""
    tokens_uniform: int = 0

    def complete(self, clip: clip_pb2.ClipSpec, mux_seconds: float) -> None:
        """Adds the stages that come after conditioning, once all of them are over."""
        if clip.tokenization.mode == clip_pb2.Tokenization.CAT:
            self.timings.append(StageTime("plan", self.plan_seconds))
        self.timings += [
            StageTime("denoise", self.denoise_seconds),
            StageTime("vae_decode", self.decode_seconds),
            StageTime("mux", mux_seconds),
        ]

    def result(self, clip: clip_pb2.ClipSpec, published: Sequence[ArtifactInfo]) -> pb.ClipResult:
        """Of a clip with these files, in the order of its formats."""
        mean = sum(self.step_tokens) / len(self.step_tokens)
        result = pb.ClipResult(
            tokens_used=round(mean),
            tokens_uniform=self.tokens_uniform,
            engine=self.engine,
            step_tokens=self.step_tokens,
            keep_ratio=mean / self.tokens_uniform,
            run_steps=sum(tokens > 0 for tokens in self.step_tokens),
        )
        for timing in self.timings:
            entry = result.timings.add(stage=pb.Stage.Value(f"STAGE_{timing.stage.upper()}"), cached=timing.cached)
            entry.duration.FromNanoseconds(int(timing.seconds * 1e9))
        for value, info in zip(clip.artifact_formats, published, strict=True):
            result.artifacts.add(
                name=info.name, format=value, mime_type=info.mime_type, size_bytes=info.size_bytes, sha256=info.sha256
            )
        return result
