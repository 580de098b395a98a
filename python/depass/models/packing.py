"""How the prompts of a pass lie in the model's tensors: one after the other in one row, or padded to one length.

In one row no token is padding. The model takes the positions of each prompt from ``position_ids``; only the attention
function, which is ours, spreads the row over padded prompts and gathers its output again. The mask of a padded prompt is
that of the row's positions up to its length, because causal and sliding masks depend on the distance of two positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def takes_positions(backbone: nn.Module) -> bool:
    """Whether a model takes ``position_ids``, without which its prompts cannot lie in one row."""
    return "position_ids" in inspect.signature(backbone.forward).parameters


def counts_positions(attention: nn.Module) -> bool:
    """Whether an attention counts the positions of its row by itself, as Llama 4's that scales queries by them."""
    is_scaled = bool(getattr(attention, "attn_temperature_tuning", False))
    return is_scaled and not getattr(attention, "use_rope", True)


def padded(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Prompts as ids ``[B, T]``, padded on the right, where causal attention ignores the padding."""
    longest = max(map(len, prompts))
    return torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in prompts], device="cpu")


class Packing:
    """The prompts of a pass.

    Args:
        prompts: the token ids of ``B`` prompts, ``P`` tokens together and ``T`` in the longest.
        in_one_row: whether the model takes them in one row, where their lengths differ.

    Attributes:
        lengths: the prompts' numbers of tokens.
        packed: whether they lie in one row ``[1, P]``; otherwise they are padded, ``[B, T]``.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], in_one_row: bool) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self.longest = max(self.lengths)
        self.packed = in_one_row and min(self.lengths) < self.longest
        ranges = [torch.arange(length, device="cpu") for length in self.lengths]
        if self.packed:
            self.ids = torch.tensor([[token for prompt in prompts for token in prompt]], device="cpu")
            self.positions = torch.cat(ranges)[None]
            begins = torch.tensor([0, *self.lengths[:-1]], device="cpu").cumsum(0)
            last = torch.tensor(self.lengths, device="cpu") - 1
            steps = torch.arange(self.longest, device="cpu")
            self._spread = (begins[:, None] + torch.minimum(steps, last[:, None])).flatten()  # [B·T], of the row
        else:
            self.ids = padded(prompts)
        self._gather = torch.cat([b * self.longest + each for b, each in enumerate(ranges)])  # [P], of [B·T]
        self._moved: dict[tuple[str, torch.device], Tensor] = {}

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The model's inputs."""
        if not self.packed:
            return {"input_ids": self.ids.to(device)}
        ids = self.ids.to(device)
        # a mask keeps transformers from looking for the prompts in the row
        return {"input_ids": ids, "position_ids": self.positions.to(device), "attention_mask": torch.ones_like(ids)}

    def flat(self, tensor: Tensor) -> Tensor:
        """``[P, ...]`` of a tensor ``[B, T, ...]``, ``[B·T, ...]`` or ``[1, P, ...]`` of the model."""
        flat = tensor if tensor.dim() == 2 else tensor.flatten(0, 1)
        return flat if self.packed else self._picked(flat)

    def row_of(self, prompt: int, position: int) -> int:
        """The index of a prompt's position in ``[B·T, ...]`` or ``[P, ...]`` of the model's tensors."""
        return position + (sum(self.lengths[:prompt]) if self.packed else prompt * self.longest)

    def position_of_row(self, rows: int, device: torch.device) -> Tensor:
        """``[B·T or P]`` int64, the position among ``P`` of each row of the model's tensors; ``P`` stands for padding."""
        count = len(self._gather)
        if self.packed or rows == count:
            return torch.arange(rows, device=device)
        found = torch.full((rows,), count, dtype=torch.int64, device=device)
        found[self._index("_gather", device)] = torch.arange(count, device=device)
        return found

    def spread(self, tensor: Tensor) -> Tensor:
        """``[B, H, T, d]`` of a tensor ``[1, H, P, d]``, whose prompts end with copies of their last row."""
        rows = tensor[0].index_select(1, self._index("_spread", tensor.device))  # [H, B·T, d]
        return rows.view(len(rows), len(self.lengths), self.longest, -1).transpose(0, 1)

    def of_padded(self, tensor: Tensor) -> Tensor:
        """``[P, ...]`` of a tensor ``[B, T, ...]`` of padded prompts."""
        return self._picked(tensor.flatten(0, 1))

    def gather(self, output: Tensor) -> Tensor:
        """``[1, P, H, d]`` of the attention's output ``[B, T, H, d]``."""
        return self.of_padded(output)[None]

    def mask(self, mask: Tensor) -> Tensor:
        """The masks ``[1 or B, 1, T, T]`` of the padded prompts, from that of the row or of its first ``T`` positions."""
        if mask.shape[-1] == self.longest:
            return mask
        begins = [0]
        for length in self.lengths:
            begins.append(begins[-1] + length)
        hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
        masks = mask.new_full((len(self.lengths), *mask.shape[1:-2], self.longest, self.longest), hidden)
        for index, (begin, length) in enumerate(zip(begins, self.lengths, strict=False)):
            rows = slice(begin, begin + length)
            masks[index, ..., :length, :length] = mask[0, ..., rows, rows]
        return masks

    def by_position(self, of_prompts: Tensor) -> Tensor:
        """``[1, P, ...]`` of values ``[B, ...]``, one per prompt of the row."""
        lengths = torch.tensor(self.lengths, device=of_prompts.device)
        return of_prompts.repeat_interleave(lengths, 0)[None]

    def _picked(self, flat: Tensor) -> Tensor:
        return flat if len(flat) == len(self._gather) else flat.index_select(0, self._index("_gather", flat.device))

    def _index(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._moved:
            self._moved[name, device] = getattr(self, name).to(device)
        return self._moved[name, device]


def first_positions(packing: Packing, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' mask function, for the first ``T`` positions of the row and without its mask."""
    changed = {**arguments, "kv_length": packing.longest, "attention_mask": None}
    if "cache_position" in arguments:
        changed["cache_position"] = arguments["cache_position"][: packing.longest]
    if "q_length" in arguments:
        changed["q_length"] = packing.longest
    return changed
