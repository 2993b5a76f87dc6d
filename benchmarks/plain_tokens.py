"""Token elimination as it is written in plain PyTorch: index_select, the layer's own modules, index_add.

The rule is that of `score="norm"`: of each sequence's blocks those with the largest norms are kept, and the tokens
behind the last whole block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import ops


def kept_positions(x: Tensor, keep: float, block_size: int) -> Tensor:
    """Positions int64 `[B, S]` of the kept tokens of x `[B, T, H]`, in order."""
    batch, tokens = x.shape[:2]
    blocks = tokens // block_size
    norms = torch.linalg.vector_norm(x.detach().float(), dim=-1)[:, : blocks * block_size]
    scores = norms.unflatten(1, (blocks, block_size)).amax(2)
    kept = ops.kept_tokens(tokens, keep, block_size) // block_size
    chosen = scores.topk(kept, dim=1).indices.sort(1).values
    within = torch.arange(block_size, device=x.device)
    positions = (chosen[:, :, None] * block_size + within).flatten(1)
    tail = torch.arange(blocks * block_size, tokens, device=x.device).expand(batch, -1)
    return torch.cat([positions, tail], 1)


class PlainElimination(nn.Module):
    """A decoder layer of Llama's that computes for kept tokens alone, in training and without padding.

    Args:
        layer: the decoder layer, whose modules are called as they are.
        keep: share of the blocks that is kept.
        block_size: tokens per block.
    """

    def __init__(self, layer: nn.Module, keep: float, block_size: int) -> None:
        super().__init__()
        self.layer = layer
        self.keep, self.block_size = keep, block_size

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **inputs: Any) -> Tensor:
        """hidden_states `[B, T, H]` to `[B, T, H]`."""
        if inputs.get("attention_mask") is not None:
            raise ValueError("PlainElimination is for batches without padding, whose attention_mask is None")
        layer: Any = self.layer
        x = hidden_states
        batch, tokens, width = x.shape
        positions = kept_positions(x, self.keep, self.block_size)
        rows = (positions + tokens * torch.arange(batch, device=x.device)[:, None]).flatten()
        flat = x.view(-1, width)
        kept = flat.index_select(0, rows).view(batch, -1, width)
        tables = tuple(table.expand(batch, -1, -1) for table in position_embeddings)
        indices = positions[:, :, None]
        tables = tuple(table.gather(1, indices.expand(-1, -1, table.shape[2])) for table in tables)
        attended, _ = layer.self_attn(layer.input_layernorm(kept), position_embeddings=tables, attention_mask=None)
        y = flat.clone().index_add_(0, rows, attended.reshape(-1, width))
        kept = y.index_select(0, rows).view(batch, -1, width)
        added = layer.mlp(layer.post_attention_layernorm(kept))
        return y.clone().index_add_(0, rows, added.reshape(-1, width)).view(x.shape)
