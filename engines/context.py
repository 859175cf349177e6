"""What a request's blocks attend to beside the clip: its prompt and its image, as keys and values.

They are the same in every step, so they are projected once. A prompt is padded to 512 positions with zeros before its
projection, and attended without a mask: all padded positions have one key and one value. So a few of them stand for
all, with the logarithm of how many each stands for added to its logits, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cinecat.engines.backends.contract import TEXT_MULTIPLE
from cinecat.engines.slots import StyleSlots, Worn


@dataclass(frozen=True)
class ContextKeys:
    """Keys and values of one row, of all layers.

    Attributes:
        text_keys, text_values: [layers, 1, words + 1, dim], the last for the prompt's empty positions; without it where
            there are none.
        padding: empty positions.
        image_keys, image_values: [layers, 1, image tokens, dim].
    """

    text_keys: Tensor
    text_values: Tensor
    padding: int
    image_keys: Tensor
    image_values: Tensor

    @property
    def length(self) -> int:
        """Text keys that an engine is given for this row alone: a multiple of TEXT_MULTIPLE, all positions at most."""
        words = self.text_keys.shape[2] - (self.padding > 0)
        return min(words + self.padding, math.ceil((words + 1) / TEXT_MULTIPLE) * TEXT_MULTIPLE)

    def text(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [layers, 1, length, dim] and their bias float32 [1, length].

        Args:
            length: at least `self.length`, at most 512.
        """
        keys, values, padding = self.text_keys, self.text_values, self.padding
        words = keys.shape[2] - (padding > 0)
        bias = keys.new_zeros(1, length, dtype=torch.float32)
        if padding == 0:
            return keys, values, bias
        # The empty positions share what is left of the length.
        stand_ins = length - words
        bias[:, words:] = math.log(padding / stand_ins)
        index = torch.arange(length, device=keys.device).clamp(max=words)
        return keys[:, :, index], values[:, :, index], bias


@dataclass(frozen=True)
class Branch:
    """One side of guidance.

    Attributes:
        image: projected image tokens [1, n, dim].
        text: projected words of the prompt and, where there are empty positions, one of them: [1, words + 1, dim].
        padding: empty positions.
    """

    image: Tensor
    text: Tensor
    padding: int
    _keys: dict[Worn, ContextKeys] = field(default_factory=dict, repr=False)

    @classmethod
    def project(cls, embedder: Any, text: Tensor, image: Tensor) -> Branch:
        """Projects states as diffusers' condition embedder does.

        Args:
            text: [1, positions, text_dim], zero where the prompt is over.
            image: [1, n, image_dim].
        """
        positions = text.shape[1]
        filled = text[0].any(dim=-1).nonzero()
        words = int(filled[-1]) + 1 if len(filled) else 0
        shown = text[:, : min(words + 1, positions)]
        return cls(embedder.image_embedder(image), embedder.text_embedder(shown), positions - words)

    @property
    def size_bytes(self) -> int:
        """Of what was projected, without keys and values."""
        return self.image.nbytes + self.text.nbytes

    def key_bytes(self, layers: int) -> int:
        """Of the keys and values for one style, which are as wide as what they are made of."""
        return 2 * layers * self.size_bytes

    def keys(self, blocks: Any, slots: StyleSlots | None, worn: Worn) -> ContextKeys:
        """Keys and values for a row that wears a style, which must stay in its slot; computed once.

        Args:
            blocks: of a diffusers transformer.
        """
        keys = self._keys.get(worn)
        if keys is None:
            keys = self._keys[worn] = self._project_keys(blocks, slots, worn)
        return keys

    def _project_keys(self, blocks: Any, slots: StyleSlots | None, worn: Worn) -> ContextKeys:
        if slots is not None:
            slots.dress([worn])
        projected = []
        for block in blocks:
            attention = block.attn2
            projected.append(
                (
                    attention.norm_k(attention.to_k(self.text)),
                    attention.to_v(self.text),
                    attention.norm_added_k(attention.add_k_proj(self.image)),
                    attention.add_v_proj(self.image),
                )
            )
        text_keys, text_values, image_keys, image_values = (torch.stack(each) for each in zip(*projected, strict=True))
        return ContextKeys(text_keys, text_values, self.padding, image_keys, image_values)


@dataclass(frozen=True)
class RowContexts:
    """Contexts of a batch of rows, as `StackInputs` has them."""

    text_keys: Tensor
    text_values: Tensor
    text_bias: Tensor
    image_keys: Tensor
    image_values: Tensor

    @classmethod
    def of(cls, rows: Sequence[ContextKeys]) -> RowContexts:
        """Puts rows together; prompts of different lengths get as many text keys as the longest."""
        length = max(row.length for row in rows)
        texts = [row.text(length) for row in rows]
        keys, values, bias = (_rows([text[part] for text in texts], 0 if part == 2 else 1) for part in range(3))
        return cls(
            keys,
            values,
            bias.to(keys.dtype),
            _rows([row.image_keys for row in rows], 1),
            _rows([row.image_values for row in rows], 1),
        )


def _rows(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=dim)
