"""What `cinecat plan-capacity` finds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cinecat.engines.capacity.calibration import Announce, Calibration, measure
from cinecat.engines.capacity.memory import MemoryModel
from cinecat.engines.capacity.plans import Plan, Planner, Stop
from cinecat.engines.capacity.speeds import ASSUMED, Speeds
from cinecat.engines.capacity.work import clip_work
from cinecat.engines.doctor import sizes_of
from cinecat.engines.errors import SettingError
from cinecat.engines.memory_plan import Clip
from cinecat.engines.messages import Offload, ShardWeights
from cinecat.engines.model import find_device, find_dtype
from cinecat.engines.sharding.layout import Layout, check_layout, choose_layout, parse_layout

PRESETS = {"14B": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"}
"""Models whose sizes are known without their files, by short names."""


@dataclass(frozen=True)
class Asked:
    """What is to be reckoned; settings as in `messages.CoreConfig`.

    Attributes:
        model: or one of PRESETS.
        keep_ratio: tokens over those of the uniform path, mean over all steps; 1 is the uniform path.
        cards: GPUs at hand.
        card_bytes: memory of each.
        shard: one layout, or empty for all that share out the cards.
        device: to measure on; empty where speeds are only given or assumed.
        dtype: "auto" is that of the device that is measured, or else bfloat16.
        given: speeds by the names of `Speeds`' attributes, for those that are not to be measured or assumed.
    """

    model: str
    clip: Clip
    steps: int
    keep_ratio: float
    cards: int
    card_bytes: int
    shard: str
    shard_weights: ShardWeights
    offload: Offload
    style_slots: int
    max_rank: int
    dtype: str
    device: str
    given: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Projection:
    """What was reckoned.

    Attributes:
        dtype: of the transformer.
        plans: of all layouts that share out the cards, or of that which was asked for.
        auto: what the setting shard = auto chooses for the cards, if they reach each other's memory.
        stops: where families of layouts stop scaling; none where one layout was asked for.
        notes: on the model's sizes.
    """

    asked: Asked
    dtype: str
    speeds: Speeds
    plans: tuple[Plan, ...]
    auto: Layout
    stops: tuple[Stop, ...]
    calibration: Calibration | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data: seconds, bytes, FLOP/s and shares."""
        speeds = self.speeds
        return {
            "projection": True,
            **asdict(self.asked),
            "dtype": self.dtype,
            "tokens": self.asked.clip.tokens,
            "speeds": {
                name: {"value": value, "source": speeds.sources[name]} for name, value in speeds.named().items()
            },
            "plans": [plan.as_json() for plan in self.plans],
            "auto": str(self.auto),
            "stops": [stop.as_json() for stop in self.stops],
            "calibration": None if self.calibration is None else self.calibration.as_json(),
            "notes": list(self.notes),
        }


def project(asked: Asked, announce: Announce) -> Projection:
    """Reckons, after measuring where that is asked for; reads no weights and downloads nothing.

    Raises:
        SettingError: something that is asked for is impossible.
        ModelError: the model's sizes are not known, or the device is not there.
    """
    if not 0.0 < asked.keep_ratio <= 1.0:
        raise SettingError(f"keep-ratio: {asked.keep_ratio:g} is not above 0 and at most 1; 1 is the uniform path")
    notes: list[str] = []
    device = find_device(asked.device) if asked.device else None
    if asked.dtype == "auto" and device is None:
        dtype = torch.bfloat16
    else:
        dtype = find_dtype(asked.dtype, device or torch.device("cpu"))
    sizes = sizes_of(PRESETS.get(asked.model, asked.model), notes)
    layout = _layout(asked, int(sizes.transformer["num_attention_heads"]))
    work = clip_work(sizes, asked.clip, asked.steps, asked.keep_ratio, dtype)
    speeds, calibration = ASSUMED, None
    if device is not None:
        calibration = measure(sizes, work, speeds, device, dtype, announce)
        speeds = calibration.speeds
    speeds = speeds.changed("given", **asked.given)
    memory = MemoryModel(sizes, asked.clip, work, dtype, asked.style_slots, asked.max_rank, asked.offload)
    planner = Planner(work, memory, speeds, asked.cards, asked.card_bytes, asked.shard_weights == "fsdp")
    auto = choose_layout(asked.cards, work.heads, asked.clip.tokens)
    return Projection(
        asked=asked,
        dtype=str(dtype).removeprefix("torch."),
        speeds=speeds,
        plans=tuple(planner.plans()) if layout is None else (planner.plan(layout),),
        auto=auto,
        stops=tuple(planner.stops()) if layout is None else (),
        calibration=calibration,
        notes=tuple(notes),
    )


def _layout(asked: Asked, heads: int) -> Layout | None:
    """The layout that is asked for; None for all. Raises SettingError, naming the option."""
    if not asked.shard:
        return None
    try:
        layout = parse_layout(asked.shard)
    except ValueError as error:
        raise SettingError(f"shard: {error}") from error
    if layout is None:
        layout = choose_layout(asked.cards, heads, asked.clip.tokens)
    check_layout(layout, heads, asked.cards)
    if layout.cfg > asked.clip.rows:
        raise SettingError(f"shard: cfg={layout.cfg} needs two rows, and there is no guidance; leave cfg out")
    if asked.shard_weights != "none" and layout.sequence == 1:
        raise SettingError(
            f"shard-weights: {asked.shard_weights} spreads weights over ulysses x ring ranks, and shard is {layout}; "
            "give it ulysses or ring, or set shard-weights to none"
        )
    return layout
