"""Models with TokenTune layers, and the same in plain PyTorch beside them: unselected rows detached, all else dense."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels
from peft_kernels import TokenTuneConfig

from ..token_elimination.models import layers_of


def tuned(model: Any, **options: Any) -> Any:
    return peft_kernels.inject(model, TokenTuneConfig(**{"ratio": 0.3, "seed": 3, **options}))


def selected(model: nn.Module) -> Tensor:
    """Positions `[B, S]` that the latest call selected."""
    layers = peft_kernels.elimination.selective_layers(model)
    return next(iter(layers.values())).elimination.selections.latest.positions.long()


class PlainTokenTune(nn.Module):
    """A Llama-like decoder layer of which rows are constants that positions `[B, S]` do not name."""

    def __init__(self, layer: nn.Module, positions: Tensor):
        super().__init__()
        self.layer, self.positions = layer, positions

    def forward(self, x, attention_mask=None, position_embeddings=None, **_):
        layer, attention = self.layer, self.layer.self_attn
        batch, tokens, _ = x.shape
        is_selected = torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, self.positions, True)

        def only(values):
            return torch.where(is_selected[:, :, None], values, values.detach())

        x = only(x)
        h = layer.input_layernorm(x)
        q, k, v = (
            only(projection(h)).view(batch, tokens, -1, attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):  # which has a weight
            q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = (only(heads.flatten(2)).view(heads.shape) for heads in (q, k))
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.transpose(1, 2).repeat_interleave(groups, 1)
        if attention_mask is None:
            attention_mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        scores = q @ k.transpose(2, 3) * attention.scaling
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(v.dtype) * attention_mask  # where a token sees nothing, all are 0
        attended = (weights @ v).transpose(1, 2).flatten(2)
        y = only(x + attention.o_proj(attended))
        return only(y + layer.mlp(layer.post_attention_layernorm(y)))


def plainly(model: Any, positions: Tensor, batch: dict[str, Any], layers: list[int] | None = None) -> Tensor:
    """The loss of a model whose layers are plain, with gradients for tokens at positions `[B, S]`."""
    own = layers_of(model)
    before = list(own)
    try:
        for index in range(len(own)) if layers is None else layers:
            layer = before[index]
            own[index] = PlainTokenTune(layer.restored() if hasattr(layer, "restored") else layer, positions)
        return model(**batch).loss
    finally:
        for index, layer in enumerate(before):
            own[index] = layer
