"""Attention as Llama's: asked whether it is, its queries and keys, and itself over kept tokens in few passes.

    o(softmax(rope(q) rope(k)^T scaling) v)

Over kept tokens nothing is kept for backward but q, k, v, the output and a sum per row. What is left out of a module's
own forward: tables of cosines and sines for kept tokens (whole tables are read at their positions), and the passes in
which a rotation is put together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..reference.token_tune import attention as grouped_attention
from ..reference.token_tune import heads_first
from .asking import TOKENS, in_evaluation, random_like
from .kept_tokens import Kept
from .linear import replaced_call, type_name

_RECORDS = "transformers.utils.output_capturing"

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")


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
    """What is known of an attention module, which is asked; or why it is not like Llama's."""
    missing = [name for name in _PROJECTIONS if attention._modules.get(name) is None]
    if missing:
        return f"a {type_name(attention)} has no {' and no '.join(missing)}"
    if not is_causal(attention):
        return f"a {type_name(attention)} is not causal"
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int):
        return f"a {type_name(attention)} has no head_dim"
    scaling = getattr(attention, "scaling", None)
    scaling = float(scaling) if isinstance(scaling, float) else head_dim**-0.5
    norms = all(name in attention._modules for name in _NORMS)
    part = AttentionPart(type(attention), head_dim, scaling, norms)
    layers = [attention.get_submodule(name) for name in (*_PROJECTIONS, *(_NORMS if norms else ()))]
    with in_evaluation(layers), _without_dropout(attention):  # which `lean_attention` leaves as they are
        like = _is_like(attention, part)
    if not like:
        return f"a {type_name(attention)} does not compute o(softmax(rope(q) rope(k)^T) v) as Llama does"
    return part


def is_causal(attention: nn.Module) -> bool:
    """Whether a module of transformers' lets tokens see only those before them where it gets no mask."""
    return bool(getattr(attention, "is_causal", True))


@contextmanager
def _without_dropout(attention: Any) -> Iterator[None]:
    share = getattr(attention, "attention_dropout", None)
    if share is not None:
        attention.attention_dropout = 0.0
    try:
        yield
    finally:
        if share is not None:
            attention.attention_dropout = share


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
    return lean_obstacle(attention, part, inputs) is None


def lean_obstacle(attention: Any, part: AttentionPart | str, inputs: dict[str, Any]) -> str | None:
    """Why only the module itself can compute what it does, in this call; None when `lean_attention` can."""
    if isinstance(part, str):
        return part
    if type(attention) is not part.kind or _is_watched(attention) or replaced_call(attention) is not None:
        return "its self_attn has hooks or was replaced"
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation != "sdpa":
        return f'its attention implementation is {implementation!r}; load the model with attn_implementation="sdpa"'
    if inputs.get("position_embeddings") is None:
        return "it gets no position_embeddings"
    for name in ("past_key_values", "is_causal"):
        if inputs.get(name) is not None:
            return f"it gets {name}"
    if not is_causal(attention):
        return "it is not causal"
    if inputs.get("output_attentions"):
        return "it is to return its attention weights"
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        return "its attention mask is not [B, heads, T, T]"
    return None


def _is_watched(attention: nn.Module) -> bool:
    """Whether something sees the module's calls, other than what transformers records attention weights with.

    Its hooks stay when outputs were asked for once, and find no weights here: the kernels that run lean give none.
    """
    hooks = [hook for hook in attention._forward_hooks.values() if getattr(hook, "__module__", None) != _RECORDS]
    return bool(hooks or attention._forward_pre_hooks or attention._backward_hooks or attention._backward_pre_hooks)


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
    batch = h.shape[0]
    q, k, v = (heads_first(rows, batch) for rows in _heads(attention, part, h, tables, kept))
    dropout_p = getattr(attention, "attention_dropout", 0.0) if attention.training else 0.0
    attended = grouped_attention(q, k, v, mask, part.scaling, dropout_p)
    return attention.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def selective_attention(
    attention: Any,
    part: AttentionPart,
    h: Tensor,
    other_h: Tensor,
    tables: tuple[Tensor, Tensor],
    mask: Tensor | None,
    kept: Kept,
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens over all tokens, with gradients for kept ones alone; see `ops.selected_attention`.

    Args:
        attention, part, tables: as in `lean_attention`.
        h: `[B, S, H]`, normalized, of kept tokens.
        other_h: `[B, T - S, H]`, of the others.
        mask: `[B or 1, heads or 1, T, T]` of all tokens, or None for causal attention.
        kept: which they are.

    Returns:
        `[B, S, H]` of kept tokens, `[B, T - S, H]` of the others, which has no gradient.
    """
    batch, others = h.shape[0], kept.others
    heads = _heads(attention, part, h, tables, kept)
    with torch.no_grad():
        other_heads = _heads(attention, part, other_h, tables, others)
    attended, other = ops.selected_attention(heads, other_heads, kept.rows, others.rows, batch, mask, part.scaling)
    with torch.no_grad():
        other = attention.o_proj(other.unflatten(0, (batch, -1)))
    return attention.o_proj(attended.unflatten(0, (batch, -1))), other


def _heads(
    attention: Any, part: AttentionPart, h: Tensor, tables: tuple[Tensor, Tensor], kept: Kept | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B * S, heads, D]` of h, rotated."""
    rows = _table_rows(h, tables, kept)
    q, k = (_rotated(attention, name, part, h, tables, rows) for name in ("q", "k"))
    return q, k, heads_of(attention.v_proj(h), part.head_dim).flatten(0, 1)


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
    """Queries or keys `[B * S, heads, D]`, rotated at the positions that they have among all tokens."""
    heads = heads_of(getattr(attention, f"{name}_proj")(h), part.head_dim)
    if part.norms:
        heads = getattr(attention, f"{name}_norm")(heads)
    return ops.rope_rows(heads.flatten(0, 1), tables[0].flatten(0, 1), tables[1].flatten(0, 1), rows)
