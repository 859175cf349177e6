"""Style slots: LoRA factors as inputs of the forward, chosen row by row.

Every linear that a style may change reads banks A [layers, slots + 1, rank, in] and B [layers, slots + 1, out, rank]:
y = W x + strength * B[slot] (A[slot] x), with slot and strength given per row. Slot 0 is "no style" and stays zero.
A style is made resident by copying it into a slot; the weights W are never written.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from cinecat.engines.backends.contract import STYLED_TARGETS, Banks, StyleRows
from cinecat.engines.backends.stack import add_styles
from cinecat.engines.errors import EngineError, NoFreeSlot
from cinecat.engines.messages import ResidentStyle, SlotUse

# LoRA factors by module path, e.g. "blocks.0.attn2.to_q" -> (A [rank, in], B [out, rank]), scaling folded in.
Factors = Mapping[str, tuple[Tensor, Tensor]]

_TARGETS = (
    *(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in ("to_q", "to_k", "to_v", "to_out.0")),
    "attn2.add_k_proj",
    "attn2.add_v_proj",
    "ffn.net.0.proj",
    "ffn.net.2",
)


# Fingerprints of the styles in a slot; with their strengths where several are stacked.
_Key = tuple[tuple[str, float | None], ...]

# What rows wear is the same in all steps of a clip: no copy to the device for each.
_KNOWN_ROWS = 64

# So much of a fingerprint is shown.
_NAME = 12


@dataclass
class _Rows:
    """Which slot each row of the running forward wears; None while no row wears any."""

    slots: Tensor | None = None  # int64 [rows]
    strengths: Tensor | None = None  # float32 [rows]


class SlottedLinear(nn.Linear):
    """A linear layer that adds each row's style. Input [rows, n, in], output [rows, n, out].

    It has the weight and the bias of the layer it replaces, rather than the layer: a call more for each linear of a
    forward is what small models would feel.
    """

    def __init__(self, base: nn.Linear, bank_a: Tensor, bank_b: Tensor, rows: _Rows) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self._bank_a = bank_a  # [slots + 1, rank, in]
        self._bank_b = bank_b  # [slots + 1, out, rank]
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        slots, strengths = self._rows.slots, self._rows.strengths
        if slots is None or strengths is None:
            return y
        return add_styles(x, y, self._bank_a, self._bank_b, slots, strengths)


@dataclass(frozen=True)
class Worn:
    """A styled request's place in the banks: the slot, and the strength that its rows give it."""

    slot: int
    strength: float


NO_STYLE = Worn(slot=0, strength=0.0)


class StyleSlots:
    """The banks of a transformer and what is resident in them.

    One style takes a slot as it is, its strength given per row. Several styles worn together are stacked along the
    rank with their strengths folded in, which is exact: B1 A1 + B2 A2 = [B1 B2] [A1; A2].

    Attributes:
        count: of the slots, without that for "no style".
        targets: (in, out) features of every linear that a style may change, by module path.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        ignored: Container[str] = frozenset(),
        device: torch.device | None = None,
        written: Callable[[int], None] = lambda slot: None,
    ) -> None:
        """Replaces the target linears of `blocks` and allocates the banks.

        Args:
            blocks: diffusers' WanTransformerBlocks, all alike.
            slots: styles resident at once.
            max_rank: rank of a slot.
            ignored: modules that a style's file may change without effect, as in `other_targets`.
            device: of the banks; None is that of the weights.
            written: hears which slot has got another style.
        """
        self._written = written
        self.count = slots
        self._max_rank = max_rank
        self._ignored = ignored
        # Strengths reach 4; of the dtypes that banks have, only float16 is narrow enough to care.
        self._largest = torch.finfo(dtype).max / 4 if dtype == torch.float16 else math.inf
        self._rows = _Rows()
        self._banks: dict[str, tuple[Tensor, Tensor]] = {}
        self._resident: OrderedDict[_Key, int] = OrderedDict()
        self._users = [0] * (slots + 1)
        self._known_rows: dict[tuple[Worn, ...], StyleRows] = {}
        self._use = SlotUse()
        self.targets: dict[str, tuple[int, int]] = {}
        for target in _TARGETS:
            layers = [_linear(block, target) for block in blocks]
            first = layers[0]
            where = device or first.weight.device
            bank_a, bank_b = self._banks[target] = empty_bank(blocks, target, slots, max_rank, dtype, where)
            for index, block in enumerate(blocks):
                block.set_submodule(target, SlottedLinear(layers[index], bank_a[index], bank_b[index], self._rows))
                self.targets[f"blocks.{index}.{target}"] = (first.in_features, first.out_features)

    def wear(self, styles: Mapping[str, float], load: Callable[[str], Factors]) -> Worn:
        """Makes a combination of styles resident and pins its slot until `take_off`.

        Args:
            styles: strength by content fingerprint; those at strength 0 do nothing and take no slot.
            load: reads a style's factors; called only when the combination is not resident.

        Raises:
            NoFreeSlot: every slot is in use. Nothing was read.
            EngineError: the ranks do not fit a slot, or a style does not fit the model. Nothing was changed.
        """
        active = {fingerprint: strength for fingerprint, strength in sorted(styles.items()) if strength != 0.0}
        if not active:
            return NO_STYLE
        alone = len(active) == 1
        key = tuple((name, None if alone else strength) for name, strength in active.items())
        strength = next(iter(active.values())) if alone else 1.0
        slot = self._resident.get(key)
        if slot is None:
            started = time.perf_counter()
            slot, evicted = self._next_slot()
            factors = {name: self._reachable(name, load(name)) for name in active}
            self._check_ranks(factors)
            if evicted is not None:
                del self._resident[evicted]
            self._write(slot, [(factors[name], 1.0 if alone else weight) for name, weight in active.items()])
            self._written(slot)
            self._resident[key] = slot
            self._count(evictions=evicted is not None, swap_seconds=(time.perf_counter() - started,))
        else:
            self._count(hits=1)
        self._resident.move_to_end(key)
        self._users[slot] += 1
        return Worn(slot, strength)

    def _count(self, hits: int = 0, evictions: int = 0, swap_seconds: tuple[float, ...] = ()) -> None:
        use = self._use
        self._use = SlotUse(use.hits + hits, use.evictions + evictions, use.swap_seconds + swap_seconds)

    def take_use(self) -> SlotUse:
        """What `wear` has done since the last call."""
        use, self._use = self._use, SlotUse()
        return use

    def take_off(self, worn: Worn) -> None:
        """Ends one use of a slot; the style stays resident until its slot is needed."""
        if worn.slot:
            self._users[worn.slot] -= 1

    def residency(self) -> tuple[ResidentStyle, ...]:
        """What is in the slots, least recently used first."""
        banks = [bank for pair in self._banks.values() for bank in pair]
        size = sum(bank.nbytes for bank in banks) // (self.count + 1)
        return tuple(ResidentStyle(slot, tuple(name for name, _ in key), size) for key, slot in self._resident.items())

    def dress(self, rows: list[Worn]) -> None:
        """Says what each row of the coming forwards wears."""
        if not any(worn.slot for worn in rows):
            self._rows.slots = self._rows.strengths = None
            return
        bank = next(iter(self._banks.values()))[0]
        self._rows.slots = torch.tensor([worn.slot for worn in rows], device=bank.device)
        self._rows.strengths = torch.tensor([worn.strength for worn in rows], device=bank.device, dtype=torch.float32)

    def rows(self, rows: list[Worn]) -> StyleRows | None:
        """What engines are told of the rows of the coming forward; None where none wears a style."""
        if not any(worn.slot for worn in rows):
            return None
        device = self._banks[STYLED_TARGETS[0]][0].device
        key = tuple(rows)
        known = self._known_rows.get(key)
        if known is None:
            if len(self._known_rows) >= _KNOWN_ROWS:
                self._known_rows.clear()
            known = self._known_rows[key] = StyleRows(
                torch.tensor([worn.slot for worn in rows], device=device),
                torch.tensor([worn.strength for worn in rows], device=device, dtype=torch.float32),
                self.engine_banks,
            )
        return known

    @cached_property
    def engine_banks(self) -> Banks:
        """The banks that engines read, which `wear` writes."""
        pairs = [self._banks[target] for target in STYLED_TARGETS]
        return Banks(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))

    def _next_slot(self) -> tuple[int, _Key | None]:
        """The slot to write next, and what is resident there."""
        taken = set(self._resident.values())
        for slot in range(1, self.count + 1):
            if slot not in taken:
                return slot, None
        for key, slot in self._resident.items():  # least recently used first
            if not self._users[slot]:
                return slot, key
        raise NoFreeSlot(f"no style slot is free: {self.count} of {self.count} are worn by running clips")

    def _reachable(self, name: str, factors: Factors) -> Factors:
        """Those factors of a style that the slots serve, checked against the layers they are for."""
        reachable = {target: pair for target, pair in factors.items() if target in self.targets}
        for target in factors:
            if target not in reachable and target not in self._ignored:
                raise EngineError(f"styles: the model has no layer {target!r} that a style can change")
        if not reachable:
            raise EngineError(f"styles: {name[:_NAME]} changes only layers outside the blocks, where no style reaches")
        for target, (a, b) in reachable.items():
            expected = self.targets[target]
            if (a.shape[1], b.shape[0]) != expected or a.shape[0] != b.shape[1]:
                raise EngineError(
                    f"styles: {target}: factors {tuple(a.shape)} and {tuple(b.shape)} do not fit a "
                    f"{expected[0]} -> {expected[1]} layer"
                )
            if self._largest < math.inf and max(float(a.abs().max()), float(b.abs().max())) > self._largest:
                raise EngineError(f"styles: {target}: values beyond {self._largest:g}; serve in bfloat16 to wear it")
        return reachable

    def _check_ranks(self, styles: Mapping[str, Factors]) -> None:
        ranks: dict[str, dict[str, int]] = {}
        for name, factors in styles.items():
            for target, (a, _) in factors.items():
                ranks.setdefault(target, {})[name] = a.shape[0]
        highest = max(ranks, key=lambda target: sum(ranks[target].values()))
        total = sum(ranks[highest].values())
        if total > self._max_rank:
            each = " and ".join(f"{name[:_NAME]} (rank {rank})" for name, rank in ranks[highest].items())
            raise EngineError(
                f"styles: {each} add up to rank {total} at {highest}, a slot holds {self._max_rank}; "
                f"wear fewer, or raise the setting max_rank to {total}"
            )

    def _write(self, slot: int, styles: list[tuple[Factors, float]]) -> None:
        """Overwrites the whole slot, so that nothing of its last style stays in layers the new one leaves out."""
        for bank_a, bank_b in self._banks.values():
            bank_a[:, slot].zero_()
            bank_b[:, slot].zero_()
        used: dict[str, int] = {}
        for factors, weight in styles:
            for path, (a, b) in factors.items():
                _, layer, target = path.split(".", 2)
                bank_a, bank_b = self._banks[target]
                start = used.get(path, 0)
                end = start + a.shape[0]
                bank_a[int(layer), slot, start:end].copy_(a)
                bank_b[int(layer), slot, :, start:end].copy_(b * weight)
                used[path] = end


def empty_bank(
    blocks: nn.ModuleList, target: str, slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Banks A and B of a target over all layers, with no style in any slot."""
    first = _linear(blocks[0], target)
    layers = len(blocks)
    return (
        torch.zeros(layers, slots + 1, max_rank, first.in_features, dtype=dtype, device=device),
        torch.zeros(layers, slots + 1, first.out_features, max_rank, dtype=dtype, device=device),
    )


def bank_bytes(blocks: nn.ModuleList, slots: int, max_rank: int, dtype: torch.dtype) -> int:
    """What the banks of such StyleSlots take: (slots + 1) x rank x (in + out), over all targets of all layers."""
    linears = [_linear(block, target) for block in blocks for target in _TARGETS]
    return sum(each.in_features + each.out_features for each in linears) * (slots + 1) * max_rank * dtype.itemsize


def other_targets(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Sizes of the linears and convolutions outside the blocks, by module path: (in, out) features, where a
    convolution's count channels times the sizes of its kernel as what goes in.
    """
    return {
        path: (math.prod(module.weight.shape[1:]), module.weight.shape[0])
        for path, module in transformer.named_modules()
        if not path.startswith("blocks.") and isinstance(module, nn.Linear | nn.Conv3d)
    }


def _linear(block: nn.Module, target: str) -> nn.Linear:
    module = block.get_submodule(target)
    assert isinstance(module, nn.Linear), target
    return module
