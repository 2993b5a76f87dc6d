"""Bytes that forward keeps for backward, by what keeps them; e is the size of a number.

| part | a layer that eliminates tokens | as transformers' layers keep it |
| --- | --- | --- |
| norm | its input e H, rstd 4 | its input in float32, rstd 4; where its weight trains what that scales, e H |
| its result | where plain linear layers train: e H | unless the layers behind are frozen (S2FT): e H |
| attention | q, k, v, output, 4 per head for its log-sum-exp | alike |
| MLP | gate and up, e I each; where plain linear layers train their product too | gate, up, silu(gate), product; with \
S2FT gate and up |
| adapter | LoRA 4 r per linear layer; S2FT its columns of attention's output and of the product | alike |

All per token that the half is computed for. Adapters form a norm's result and the product again in backward, where a
layer that eliminates tokens offers it; `nn.SwiGLUMLP` does for slices.
"""

from __future__ import annotations

from dataclasses import dataclass

from .settings import StepSettings
from .shape import ModelShape

_WIDE = 4  # bytes of what is kept in float32 whatever the activations are in


@dataclass(frozen=True)
class LayerBytes:
    """What one decoder layer keeps.

    Attributes:
        attention, mlp: the two halves.
        adapter: what is kept for the gradients of what trains.
        positions: which tokens are kept, and where they stand in their sequences.
    """

    attention: int
    mlp: int
    adapter: int
    positions: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.attention + self.mlp + self.adapter + self.positions


def layer_bytes(shape: ModelShape, step: StepSettings, eliminates: bool) -> LayerBytes:
    """What an `nn.TokenElimination` layer keeps, or one of transformers'."""
    in_attention = step.batch_size * (step.kept(step.keep_attention) if eliminates else step.seq_len)
    in_mlp = step.batch_size * (step.kept(step.keep_mlp) if eliminates else step.seq_len)
    norm = _norm_per_token(shape, step, eliminates)
    attention_adapter, mlp_adapter = _adapter_per_token(shape, step)
    return LayerBytes(
        attention=in_attention * (norm + _attention_per_token(shape, step)),
        mlp=in_mlp * (norm + _mlp_per_token(shape, step, eliminates)),
        adapter=in_attention * attention_adapter + in_mlp * mlp_adapter,
        positions=_positions(step, in_attention, max(in_attention, in_mlp)) if eliminates else 0,
    )


def _norm_per_token(shape: ModelShape, step: StepSettings, eliminates: bool) -> int:
    """Of a norm, and of what it hands to the linear layers behind it."""
    result = step.bytes * shape.hidden
    if eliminates:
        return step.bytes * shape.hidden + _WIDE + (result if step.method == "full" else 0)
    own = _WIDE * shape.hidden + _WIDE + (step.bytes * shape.hidden if step.method == "full" else 0)
    return own + (0 if step.method == "s2ft" else result)


def _attention_per_token(shape: ModelShape, step: StepSettings) -> int:
    keys = shape.heads if step.expanded_keys else shape.key_value_heads
    queries = 2 * shape.heads * shape.head_dim  # q, and the output, which o_proj is given
    return step.bytes * (queries + 2 * keys * shape.head_dim) + _WIDE * shape.heads


def _mlp_per_token(shape: ModelShape, step: StepSettings, eliminates: bool) -> int:
    kept = {"lora": 4, "s2ft": 2, "sparse_delta": 4, "full": 4}  # of gate, up, silu(gate) and the product
    lean = {**dict.fromkeys(kept, 2), "full": 3}
    return (lean if eliminates else kept)[step.method] * step.bytes * shape.intermediate


def _adapter_per_token(shape: ModelShape, step: StepSettings) -> tuple[int, int]:
    """For attention and for the MLP."""
    if step.method == "lora":
        hidden = _WIDE * step.r
        return 4 * hidden, 3 * hidden
    if step.method == "s2ft":
        attention = round(step.s2ft_o * shape.heads * shape.head_dim)
        return step.bytes * attention, step.bytes * round(step.s2ft_down * shape.intermediate)
    return 0, 0


def _positions(step: StepSettings, in_attention: int, most: int) -> int:
    """Which rows are kept; and of several sequences, whose rows are not their positions, those too."""
    own = _WIDE * in_attention if step.batch_size > 1 else 0
    return own + (_WIDE * most if min(step.keep_attention, step.keep_mlp) < 1.0 else 0)


def workspace_bytes(shape: ModelShape, step: StepSettings) -> int:
    """The most that backward of one layer holds beside what is kept: in the MLP, where it is widest, the product and
    its gradient, those of gate and up, and those of the residual stream before and behind."""
    tokens = step.batch_size * step.seq_len  # a layer that eliminates nothing needs most
    if step.eliminating(shape) == shape.layers:
        tokens = step.batch_size * max(step.kept(step.keep_mlp), step.kept(step.keep_attention))
    stream = 2 * step.batch_size * step.seq_len * shape.hidden
    return step.bytes * (tokens * 4 * shape.intermediate + stream)
