"""The sizes of a Llama-like model that memory depends on, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NEEDED = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "intermediate",
    "vocab_size": "vocabulary",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with gated MLPs.

    Attributes:
        hidden: H, width of the residual stream.
        layers: decoder layers.
        heads, key_value_heads, head_dim: of attention.
        intermediate: I, channels of an MLP.
        vocabulary: V.
        tied: whether the output layer shares the embeddings' weight.
    """

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the contents of a `config.json` of transformers; of a model for text and images, its text part.

        Raises:
            ValueError: a size is missing, or the model has experts, of which a plan would know too little.
        """
        config = config.get("text_config") or config
        missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
        if missing:
            raise ValueError(f"the configuration must hold {', '.join(_NEEDED)} as integers; {missing[0]} is missing")
        experts = [name for name in _EXPERTS if (config.get(name) or 0) not in (0, 1)]
        if experts:
            raise ValueError(f"a model with experts ({experts[0]}={config[experts[0]]}) cannot be planned")
        sizes = {ours: int(config[theirs]) for theirs, ours in _NEEDED.items()}
        heads = sizes["heads"]
        return cls(
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or sizes["hidden"] // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
            **sizes,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """`(N, K)` of the linear layers of one decoder layer, by their names in transformers."""
        query, key = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def parameters(self) -> int:
        """Of the whole model, biases left out."""
        layer = sum(rows * columns for rows, columns in self.linears.values()) + 2 * self.hidden
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden
