"""How long a clip takes on a layout of ranks.

Nothing is taken to happen at once: a rank computes, then sends, then computes. The ring does send while it computes, so
it can do better than this says. What is not counted: patch embedding, head and solver, planning of merged tokens, and
that cards get slower with shorter parts of a sequence, but for `Speeds.layer_seconds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cinecat.engines.capacity.speeds import Speeds
from cinecat.engines.capacity.work import ClipWork, Steps
from cinecat.engines.denoise import TOGETHER_TOKENS
from cinecat.engines.sharding.layout import Layout
from cinecat.engines.sharding.volume import ForwardShape, Sent, sent_bytes
from cinecat.engines.tokens.flops import forward_flops


@dataclass(frozen=True)
class StepSeconds:
    """A step, by what it is spent on; the slowest rank's, and the leader's where it has to send and receive for all.

    Attributes:
        linear, attention: computing.
        layers: of every block, whatever its length.
        all_to_all, ring: exchanges in every layer.
        scatter, gather: inputs to the other ranks, and their outputs back.
        weights: of blocks that are spread over ranks, which each gathers before it runs one.
    """

    linear: float
    attention: float
    layers: float
    all_to_all: float
    ring: float
    scatter: float
    gather: float
    weights: float

    @property
    def computing(self) -> float:
        return self.linear + self.attention + self.layers

    @property
    def communicating(self) -> float:
        return self.all_to_all + self.ring + self.scatter + self.gather + self.weights

    @property
    def total(self) -> float:
        return self.computing + self.communicating


@dataclass(frozen=True)
class ClipSeconds:
    """A clip, by its stages.

    Attributes:
        encoders: of text and image, on the leader.
        vae_encode: on the leader.
        context: sent to the other ranks before the first step.
        steps: all of them.
        vae_decode: shared by all ranks, and the frames sent to the leader; the rows that neighbours exchange are not
            counted.
    """

    encoders: float
    vae_encode: float
    context: float
    steps: float
    vae_decode: float

    @property
    def total(self) -> float:
        return self.encoders + self.vae_encode + self.context + self.steps + self.vae_decode


def forward_shape(work: ClipWork, steps: Steps) -> ForwardShape:
    """The forward of a step on several ranks, of rows that wear no style."""
    return ForwardShape(
        layers=work.model.layers,
        heads=work.heads,
        dim=work.model.dim,
        rows=work.rows,
        tokens=steps.tokens,
        text=work.model.text,
        image=work.model.image,
        value_bytes=work.value_bytes,
        biased=steps.merged,
    )


def most_sent(shape: ForwardShape, layout: Layout) -> Sent:
    """Of each kind of exchange, the bytes of the rank that sends the most; `gather` is what the leader receives."""
    every = [sent_bytes(shape, layout, rank, fresh=True) for rank in range(layout.ranks)]
    most = {kind: max(getattr(each, kind) for each in every) for kind in vars(every[0])}
    return replace(Sent(**most), gather=sum(each.gather for each in every))


def spread_bytes(work: ClipWork, layout: Layout) -> int:
    """Bytes of blocks that a rank sends in a forward where their weights are spread over the ranks of a sequence, for
    each to have them whole in turn.
    """
    return work.block_bytes * (layout.sequence - 1) // layout.sequence


def step_seconds(work: ClipWork, steps: Steps, layout: Layout, speeds: Speeds, spread: bool = False) -> StepSeconds:
    """One step of a kind.

    With n rows of the largest group, K tokens and K_s of them on a rank, padding included, a rank computes
    n x linear(K_s) and n x attention(K) x K_s / K FLOPs. Alone, it runs one long row after the other, so a guided step
    has two forwards; on several ranks a forward has all rows of the group.

    Args:
        spread: whether the weights of blocks are spread over the ranks of a sequence.
    """
    shape, layers = forward_shape(work, steps), work.model.layers
    rows, share = -(-work.rows // layout.cfg), layout.shard_tokens(steps.tokens)
    forwards = rows if layout.ranks == 1 and steps.tokens > TOGETHER_TOKENS else 1
    linear, _ = forward_flops(work.model, share)
    _, attention = forward_flops(work.model, steps.tokens)
    sent = most_sent(shape, layout)

    def exchange(nbytes: int, messages: int) -> float:
        return nbytes / speeds.link_bytes + messages * speeds.message_seconds if nbytes else 0.0

    return StepSeconds(
        linear=rows * linear / speeds.linear_flops,
        attention=rows * attention * share / steps.tokens / speeds.attention_flops,
        layers=forwards * layers * speeds.layer_seconds,
        all_to_all=exchange(sent.all_to_all, 2 * layers),
        ring=exchange(sent.ring, layers * (layout.ring - 1)),
        scatter=exchange(sent.scatter, 1),
        gather=exchange(sent.gather, 1),
        weights=exchange(spread_bytes(work, layout), layers) if spread else 0.0,
    )


def steps_seconds(
    work: ClipWork, layout: Layout, speeds: Speeds, spread: bool = False
) -> Iterator[tuple[Steps, StepSeconds]]:
    """A step of each kind that a clip has."""
    for steps in work.steps:
        yield steps, step_seconds(work, steps, layout, speeds, spread)


def clip_seconds(work: ClipWork, layout: Layout, speeds: Speeds, spread: bool = False) -> ClipSeconds:
    """A whole clip; arguments as of `step_seconds`."""
    bands = min(layout.ranks, work.latent_rows)
    band = -(-work.latent_rows // bands) / work.latent_rows
    context = sum(most_sent(forward_shape(work, each), layout).context for each in work.steps)
    return ClipSeconds(
        encoders=work.encoder_flops / speeds.linear_flops,
        vae_encode=work.encode_flops / speeds.vae_flops,
        context=context / speeds.link_bytes,
        steps=sum(steps.count * each.total for steps, each in steps_seconds(work, layout, speeds, spread)),
        vae_decode=work.decode_flops * band / speeds.vae_flops + work.video_bytes * (1 - band) / speeds.link_bytes,
    )
