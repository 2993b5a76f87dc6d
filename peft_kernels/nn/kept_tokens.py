"""The tokens that a layer computes for, and what attention is given when it sees these alone.

Kept tokens lie in the order of their positions, so attention over them is causal as it is over all. They are rotated
by the positions that they have in the whole sequence. Everything else that says where a token is counts kept tokens:
a kernel that is told of gaps takes what is behind one for another document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops

_OF_TOKENS = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


class Kept:
    """A selection.

    Attributes:
        positions: int32 `[B, S]` in each sequence, in order, then -1 for what only fills up.
        rows: int32 `[B * S]`, rows of the hidden states `[B * T, H]`.
        tokens: T.
        filled_up: whether there may be a -1.
        counts: int32 `[B]`, how many are not -1; None where none is.
    """

    def __init__(self, positions: Tensor, tokens: int, counts: Tensor | None = None) -> None:
        self.positions = positions
        self.rows = ops.flat_rows(positions, tokens)
        self.tokens = tokens
        self.counts = counts
        self._gathered: dict[Any, Any] = {}
        self._others: Kept | None = None

    @property
    def filled_up(self) -> bool:
        return self.counts is not None

    @property
    def others(self) -> Kept:
        """All other tokens; only where nothing fills up."""
        if self._others is None:
            is_other = torch.ones(self.positions.shape[0], self.tokens, dtype=torch.uint8, device=self.positions.device)
            is_other.scatter_(1, self.positions.long(), 0)
            order = is_other.argsort(dim=1, descending=True, stable=True)  # how many there are follows from the shape
            count = self.tokens - self.positions.shape[1]
            self._others = Kept(order[:, :count].to(torch.int32).contiguous(), self.tokens)
        return self._others

    @property
    def is_all(self) -> bool:
        """Whether these are all tokens, as far as the host knows."""
        return not self.filled_up and self.positions.shape[1] == self.tokens

    def attention_mask(self, inputs: Mapping[str, Any], shared: bool) -> Tensor | None:
        """The attention mask for kept tokens; arguments are those of `attention_inputs`."""
        mask = inputs.get("attention_mask")
        if not shared or mask is None or torch.compiler.is_compiling():
            return gathered_mask(self, mask)
        if id(mask) not in self._gathered:
            self._gathered[id(mask)] = gathered_mask(self, mask)
        return self._gathered[id(mask)]  # type: ignore[no-any-return]

    def attention_inputs(self, inputs: Mapping[str, Any], shared: bool) -> dict[str, Any]:
        """The keyword arguments of attention for kept tokens, from those for all.

        Args:
            inputs: what a decoder layer was called with.
            shared: whether other layers will ask for the same, so that it is kept as long as this selection is.
        """
        if not shared or torch.compiler.is_compiling():  # which finds what is gathered twice by itself
            return {**inputs, **gathered_inputs(self, inputs)}
        # By identity, without holding them: selections are kept by one of them, and would keep it in turn.
        tables = inputs.get("position_embeddings") or ()
        key = tuple(id(value) for value in (*tables, *(inputs.get(name) for name in _OF_TOKENS)))
        if key not in self._gathered:
            self._gathered[key] = gathered_inputs(self, inputs)
        return {**inputs, **self._gathered[key]}


def mask_obstacle(mask: Any, tokens: int) -> str | None:
    """Why kept tokens cannot be gathered of an attention mask, for this call; None when they can.

    Raises:
        TypeError: they never can be of such a mask.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor or None for token elimination, got a {type(mask).__name__}; load the "
            'model with attn_implementation="sdpa", "eager" or a flash attention'
        )
    if mask.dim() == 2 and mask.shape[1] == tokens:
        return None
    if mask.dim() == 4 and mask.shape[2:] == (tokens, tokens):
        return None
    return "its attention mask is not [B, T] or [B, heads, T, T] for the T tokens of the call"


def gathered_inputs(kept: Kept, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those keyword arguments of attention that are of tokens, for kept ones; nothing of them goes to a cache."""
    gathered: dict[str, Any] = {"past_key_values": None, "use_cache": False}
    gathered["attention_mask"] = gathered_mask(kept, inputs.get("attention_mask"))
    tables = inputs.get("position_embeddings")
    if tables is not None:
        gathered["position_embeddings"] = tuple(_of_tokens(kept, table) for table in tables)
    if inputs.get("position_ids") is not None:
        gathered["position_ids"] = compacted_positions(kept, inputs["position_ids"])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if inputs.get(name) is not None:
            gathered[name] = compacted_lengths(kept, inputs[name])
    return gathered


def _indices(kept: Kept, batch: int) -> Tensor:
    """int64 `[batch, S]`; what fills up stands at position 0."""
    return kept.positions.clamp(min=0).long().expand(batch, -1)


def _of_tokens(kept: Kept, table: Tensor) -> Tensor:
    """Rows `[B, S, R]` of a table `[B or 1, T, R]`, for each kept token."""
    batch = kept.positions.shape[0]
    indices = _indices(kept, batch)
    return table.expand(batch, -1, -1).gather(1, indices[:, :, None].expand(-1, -1, table.shape[2]))


def gathered_mask(kept: Kept, mask: Tensor | None) -> Tensor | None:
    """A mask `[B, T]` or `[B or 1, heads or 1, T, T]` for kept tokens; no kept token sees what only fills up."""
    if mask is None:
        return None
    batch = kept.positions.shape[0]
    indices = _indices(kept, batch)
    if mask.dim() == 2:
        found = mask.expand(batch, -1).gather(1, indices)
        return torch.where(kept.positions >= 0, found, torch.zeros_like(found)) if kept.filled_up else found
    sequences = torch.arange(batch, device=mask.device)[:, None, None, None]
    heads = torch.arange(mask.shape[1], device=mask.device)[None, :, None, None]
    found = mask.expand(batch, -1, -1, -1)[sequences, heads, indices[:, None, :, None], indices[:, None, None, :]]
    if not kept.filled_up:
        return found
    # Rows of what fills up see the first kept token, so that no softmax is over nothing.
    real = kept.positions >= 0
    first = torch.arange(real.shape[1], device=mask.device) == 0
    allowed = real[:, None, None, :] & real[:, None, :, None]
    either = first[None, None, None, :] & ~real[:, None, :, None]
    if mask.dtype == torch.bool:
        return (found & allowed) | either
    hidden = torch.full((), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=mask.device)
    nothing = torch.zeros((), dtype=mask.dtype, device=mask.device)
    return torch.where(either, nothing, torch.where(allowed, found, hidden))


def documents(position_ids: Tensor) -> Tensor:
    """Which document each token is of, int64 like position_ids `[B or 1, T]`: one ends where positions do not go on."""
    goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
    return torch.nn.functional.pad((~goes_on).long().cumsum(1), (1, 0))


def _first_of_each(groups: Tensor) -> Tensor:
    """For each token the position at which its group begins, int64 `[B, T]`."""
    positions = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    begins = torch.nn.functional.pad(groups[:, 1:] != groups[:, :-1], (1, 0), value=True)
    return torch.where(begins, positions, 0).cummax(1).values


def compacted_positions(kept: Kept, position_ids: Tensor) -> Tensor:
    """The rank of each kept token among those of its document, int64 `[B, S]`, without gaps."""
    batch = kept.positions.shape[0]
    of_kept = documents(position_ids).expand(batch, -1).gather(1, _indices(kept, batch))
    if kept.filled_up:  # at the end: with the last document
        of_kept = torch.where(kept.positions >= 0, of_kept, of_kept.amax(1, keepdim=True))
    return torch.arange(of_kept.shape[1], device=of_kept.device) - _first_of_each(of_kept)


def compacted_lengths(kept: Kept, cu_seq_lens: Tensor) -> Tensor:
    """Where documents of kept tokens end in the flattened batch, from where those of all tokens do.

    What fills up goes with the document before it: behind all of its tokens, where causal attention does not see it.
    """
    order = kept.rows
    if kept.filled_up:
        ends = torch.arange(1, kept.positions.shape[0] + 1, device=order.device, dtype=order.dtype) * kept.tokens - 1
        order = torch.where(kept.positions < 0, ends[:, None], order.view(kept.positions.shape)).flatten()
    return torch.searchsorted(order, cu_seq_lens.to(order.dtype)).to(cu_seq_lens.dtype)


def padding_of(inputs: Mapping[str, Any], batch: int) -> Tensor | None:
    """Which tokens are padding, bool `[B, T]`; None where the mask does not say.

    Args:
        inputs: what a decoder layer was called with.
        batch: B.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if mask.dim() == 4:  # padding does not see itself
        mask = mask[:, 0].diagonal(dim1=1, dim2=2)
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    else:
        seen = mask != 0
    return (~seen).expand(batch, -1)


def visible_from(inputs: Mapping[str, Any], batch: int, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """From where on each token sees those before it, and which tokens are padding.

    Args:
        inputs: what a decoder layer was called with.
        batch: B.
        tokens: T.

    Returns:
        int32 `[B, T]`, T for padding, which sees nothing; None where every token sees all before it. Then bool
        `[B, T]`; None where there is no padding.
    """
    mask, starts, padding = inputs.get("attention_mask"), None, padding_of(inputs, batch)
    if mask is not None and mask.dim() == 4:
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
        starts = seen.to(torch.uint8).argmax(2)
    elif padding is not None:
        starts = (~padding).to(torch.uint8).argmax(1, keepdim=True).expand(-1, tokens)
    if starts is None and inputs.get("cu_seq_lens_k") is not None:
        ends = inputs["cu_seq_lens_k"]
        flat = torch.arange(batch * tokens, device=ends.device)
        document = torch.searchsorted(ends.long(), flat, right=True) - 1
        starts = ends.long().gather(0, document.clamp(max=ends.numel() - 1)).view(batch, tokens)
        starts = (starts - torch.arange(batch, device=ends.device)[:, None] * tokens).clamp(min=0)
    elif starts is None and batch == 1 and inputs.get("position_ids") is not None:
        starts = _first_of_each(documents(inputs["position_ids"]))
    if starts is None:
        return None, None
    if padding is not None:
        starts = torch.where(padding, tokens, starts)
    return starts.expand(batch, -1).int().contiguous(), padding
