"""What a training step is planned for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .. import ops
from .shape import ModelShape

METHODS = ("lora", "s2ft", "sparse_delta", "full")
LOGITS = ("chunked", "full")
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class StepSettings:
    """One training step.

    Attributes:
        batch_size, seq_len: sequences, and tokens of each.
        method: what trains, one of `METHODS`: LoRA of rank `r` in all linear layers of the decoder, S2FT with the share
            `s2ft_down` of the channels of down_proj and `s2ft_o` of those of o_proj, sparse deltas of `density` in all
            of them, or every parameter.
        keep_attention, keep_mlp: shares of the tokens that attention and MLP are computed for in the layers that
            eliminate; where both are 1 no layer does, and all are as transformers has them.
        block_size: tokens are kept by blocks of so many.
        dense_layers: how many layers eliminate nothing.
        checkpointing: activations are formed again layer by layer in backward.
        logits: "full" holds all logits, "chunked" a chunk of them at a time.
        dtype: of weights and activations.
        adapter_dtype: of what trains beside the weights, its gradients and its moments; with method "full" all are in
            `dtype`.
        expanded_keys: attention keeps keys and values once per head and not once per key-value head, as transformers'
            does where it is given a mask.
    """

    batch_size: int
    seq_len: int
    method: str = "lora"
    r: int = 16
    s2ft_down: float = 0.03
    s2ft_o: float = 0.05
    density: float = 0.01
    keep_attention: float = 1.0
    keep_mlp: float = 1.0
    block_size: int = 64
    dense_layers: int = 3
    checkpointing: bool = False
    logits: str = "chunked"
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    expanded_keys: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "r", "block_size"):
            _check_count(name, getattr(self, name), 1)
        _check_count("dense_layers", self.dense_layers, 0)
        for name in ("keep_attention", "keep_mlp", "s2ft_down", "s2ft_o", "density"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        choices: dict[str, Any] = {
            "method": METHODS,
            "logits": LOGITS,
            "dtype": tuple(DTYPE_BYTES),
            "adapter_dtype": tuple(DTYPE_BYTES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def bytes(self) -> int:
        """Of one number of the activations."""
        return DTYPE_BYTES[self.dtype]

    def eliminating(self, shape: ModelShape) -> int:
        """How many layers eliminate tokens."""
        return 0 if min(self.keep_attention, self.keep_mlp) == 1.0 else max(0, shape.layers - self.dense_layers)

    def kept(self, ratio: float) -> int:
        """Tokens of a sequence that are kept."""
        return ops.kept_tokens(self.seq_len, ratio, self.block_size)

    def trained(self, shape: ModelShape) -> int:
        """How many numbers train."""
        linears = shape.linears
        if self.method == "lora":
            per_layer: float = sum(self.r * (rows + columns) for rows, columns in linears.values())
        elif self.method == "s2ft":
            per_layer = sum(
                round(share * linears[name][1]) * linears[name][0]
                for name, share in (("down_proj", self.s2ft_down), ("o_proj", self.s2ft_o))
            )
        elif self.method == "sparse_delta":
            per_layer = sum(round(self.density * rows * columns) for rows, columns in linears.values())
        else:
            return shape.parameters
        return int(per_layer) * shape.layers


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
