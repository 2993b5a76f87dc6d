"""Attention as Llama's: asked whether it is, its queries and keys, and itself over kept tokens in few passes.

    o(softmax(rope(q) rope(k)^T scaling) v)

Over kept tokens nothing is kept for backward but q, k, v, the output and a sum per row. What is left out of a module's
own forward: tables of cosines and sines for kept tokens (whole tables are read at their positions), and the passes in
which a rotation is put together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .asking import TOKENS, random_like, still_is
from .kept_tokens import Kept
from .linear import type_name


@dataclass(frozen=True)
class AttentionPart:
    """Attention that is `o(softmax(rope(q) rope(k)^T scaling) v)`, with norms of q and k per head or without.

    Attributes:
        kind: its class.
        head_dim: channels of a head.
        scaling: of the products.
        norms: whether q and k are normalized by `q_norm` and `k_norm` before they are rotated.
    """

    kind: type[nn.Module]
    head_dim: int
    scaling: float
    norms: bool


def rotary_channels(attention: nn.Module) -> int:
    """How many channels of a head are rotated, by what the attention or its configuration says."""
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    config = getattr(attention, "config", None)
    rope = getattr(config, "rope_parameters", None)
    share = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(getattr(attention, "rotary_ndims", None) or head_dim * share)


def rotations(attention: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[1, tokens, R]` of angles as positions have them."""
    half = rotary_channels(attention) // 2
    angles = torch.arange(TOKENS)[:, None] * 0.7 ** torch.arange(half)
    both = torch.cat((angles, angles), -1)[None].to(like.device)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def causal_mask(attention: nn.Module, like: Tensor) -> Tensor | None:
    """`[1, 1, tokens, tokens]` to be added, for attention that takes one; None where it is causal by itself."""
    if "flash" in str(getattr(getattr(attention, "config", None), "_attn_implementation", "")):
        return None
    hidden = torch.full((TOKENS, TOKENS), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    return hidden.triu(1)[None, None]


def call_attention(attention: nn.Module, h: Tensor, **inputs: Any) -> Tensor:
    """What an attention module of transformers' makes of h `[B, T, H]`, without its weights."""
    result = attention(hidden_states=h, **inputs)
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def attention_part(attention: Any) -> AttentionPart | str:
    """What is known of an attention module in evaluation, which is asked; or why it is not like Llama's."""
    missing = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if attention._modules.get(name) is None]
    if missing:
        return f"a {type_name(attention)} has no {' and no '.join(missing)}"
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int):
        return f"a {type_name(attention)} has no head_dim"
    scaling = getattr(attention, "scaling", None)
    scaling = float(scaling) if isinstance(scaling, float) else head_dim**-0.5
    norms = all(name in attention._modules for name in ("q_norm", "k_norm"))
    part = AttentionPart(type(attention), head_dim, scaling, norms)
    if not _is_like(attention, part):
        return f"a {type_name(attention)} does not compute o(softmax(rope(q) rope(k)^T) v) as Llama does"
    return part


def _is_like(attention: Any, part: AttentionPart) -> bool:
    """Whether the module computes what `AttentionPart` says.

    Large scores make much of how q and k are rounded, so one in bfloat16 or float16 is asked through a copy in float32
    where it can be copied.
    """
    if next(attention.q_proj.parameters()).dtype in (torch.bfloat16, torch.float16):
        try:
            return _agrees(copy.deepcopy(attention).float(), part, 1e-3)
        except Exception:  # a flash kernel, or a quantized layer: as it is, then
            return _agrees(attention, part, 5e-2)
    return _agrees(attention, part, 1e-4)


def _agrees(attention: Any, part: AttentionPart, tolerance: float) -> bool:
    like = next(parameter for parameter in attention.q_proj.parameters() if parameter.is_floating_point())
    h = random_like((1, TOKENS, int(attention.q_proj.in_features)), like)
    tables = rotations(attention, like)
    answer = call_attention(attention, h, position_embeddings=tables, attention_mask=causal_mask(attention, like))
    q, k = queries_and_keys(attention, part, h, *tables)
    v = heads_of(attention.v_proj(h), part.head_dim).transpose(1, 2)
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=part.scaling)
    expected = attention.o_proj(attended.transpose(1, 2).flatten(2))
    if answer.shape != expected.shape or not expected.any():
        return False
    difference = torch.linalg.vector_norm(answer.double() - expected.double())
    return bool(difference <= tolerance * torch.linalg.vector_norm(expected.double()))


def heads_of(projected: Tensor, head_dim: int) -> Tensor:
    """`[B, T, heads * D]` as `[B, T, heads, D]`."""
    return projected.unflatten(-1, (-1, head_dim))


def queries_and_keys(attention: Any, part: AttentionPart, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys of h, `[B, heads, T, D]` each.

    Args:
        attention: the module.
        part: what is known of it.
        h: `[B, T, H]`, normalized.
        cos, sin: `[B or 1, T, R]`.
    """
    batch, tokens = h.shape[:2]
    rotations = [table.expand(batch, -1, -1).reshape(batch * tokens, -1) for table in (cos, sin)]
    turned = []
    for name in ("q", "k"):
        heads = heads_of(getattr(attention, f"{name}_proj")(h), part.head_dim)
        if part.norms:
            heads = getattr(attention, f"{name}_norm")(heads)
        rotated = ops.rope_rows(heads.flatten(0, 1), *rotations)
        turned.append(rotated.view(batch, tokens, -1, part.head_dim).transpose(1, 2))
    return turned[0], turned[1]


def runs_lean(attention: Any, part: AttentionPart | str, inputs: dict[str, Any]) -> bool:
    """Whether `lean_attention` computes what the module would, in this call."""
    mask = inputs.get("attention_mask")
    return (
        isinstance(part, AttentionPart)
        and still_is(attention, part.kind)
        and getattr(getattr(attention, "config", None), "_attn_implementation", None) == "sdpa"
        and inputs.get("position_embeddings") is not None
        and inputs.get("past_key_values") is None
        and inputs.get("is_causal") is None
        and not inputs.get("output_attentions")
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4))
    )


def lean_attention(
    attention: Any,
    part: AttentionPart,
    h: Tensor,
    tables: tuple[Tensor, Tensor],
    mask: Tensor | None,
    kept: Kept | None,
) -> Tensor:
    """`o(softmax(rope(q) rope(k)^T scaling) v)` of kept tokens.

    Args:
        attention: the module, for its layers.
        part: what is known of it.
        h: `[B, S, H]`, normalized, of kept tokens.
        tables: cos and sin `[B or 1, T, R]` of all tokens.
        mask: `[B or 1, heads or 1, S, S]` of kept tokens, or None for causal attention.
        kept: which they are; None for all.

    Returns:
        `[B, S, H]`.
    """
    rows = _table_rows(h, tables, kept)
    q = _rotated(attention, "q", part, h, tables, rows)
    k = _rotated(attention, "k", part, h, tables, rows)
    v = heads_of(attention.v_proj(h), part.head_dim).transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    if mask is not None and groups > 1:  # there kernels for grouped heads take no mask
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    attended = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        is_causal=mask is None,
        scale=part.scaling,
        enable_gqa=mask is None and groups > 1,
    )
    return attention.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _table_rows(h: Tensor, tables: tuple[Tensor, Tensor], kept: Kept | None) -> Tensor | None:
    """int32 `[B * S]`, which row of the tables each token takes; None where it is its own."""
    batch, tokens = h.shape[:2]
    shared = tables[0].shape[0] == 1 and batch > 1
    if kept is not None:
        return kept.positions.flatten() if shared else kept.rows
    return torch.arange(tokens, dtype=torch.int32, device=h.device).repeat(batch) if shared else None


def _rotated(
    attention: nn.Module,
    name: str,
    part: AttentionPart,
    h: Tensor,
    tables: tuple[Tensor, Tensor],
    rows: Tensor | None,
) -> Tensor:
    """Queries or keys `[B, heads, S, D]`, rotated at the positions that they have among all tokens."""
    batch, tokens = h.shape[:2]
    heads = heads_of(getattr(attention, f"{name}_proj")(h), part.head_dim)
    if part.norms:
        heads = getattr(attention, f"{name}_norm")(heads)
    rotated = ops.rope_rows(heads.flatten(0, 1), tables[0].flatten(0, 1), tables[1].flatten(0, 1), rows)
    return rotated.view(batch, tokens, -1, part.head_dim).transpose(1, 2)
