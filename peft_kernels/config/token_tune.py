"""The configuration of TokenTune: for which share of the tokens decoder layers have gradients, and how it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .token_layers import TokenConfig, check_integer, check_ratio, checked_layers, in_order

SCORES = ("random", "norm", "attention", "gradient")


@dataclass
class TokenTuneConfig(TokenConfig):
    """Decoder layers that compute for all tokens, and have gradients and keep activations for selected ones alone.

    Attributes:
        ratio: share of the tokens of each sequence that are selected, rounded up, in (0, 1].
        layers: indices of the decoder layers, negative ones from the end; None takes all. Layers that are left out
            have gradients, and keep activations, for all tokens.
        score: by which the first of these layers selects for all of them, the largest: "random" is a random number,
            "norm" the norm of the token's hidden state, "attention" the attention that it gets in this layer,
            "gradient" what `elimination.score_by_gradient` found for the batch. Padding is selected last.
        seed: of score="random"; None draws from torch's generator of the device.

    Raises:
        ValueError, TypeError: a field's value is out of range or of a wrong type.

    Source: Simoulin et al., "Memory-Efficient Fine-Tuning of Transformers via Token Selection", EMNLP 2024.
    """

    ratio: float = 0.3
    layers: list[int] | None = None
    score: Literal["random", "norm", "attention", "gradient"] = "random"
    seed: int | None = None

    file_name: ClassVar[str] = "token_tune.json"
    kind: ClassVar[str] = "TOKEN_TUNE"

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio)
        if self.ratio == 0:
            raise ValueError("ratio must be in (0, 1], got 0: no token would have a gradient")
        if self.layers is not None:
            self.layers = checked_layers(self.layers)
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")
        if self.seed is not None:
            check_integer("seed", self.seed, 0)

    def ratios(self, count: int) -> dict[int, float]:
        """The ratio of each layer that selects tokens, by its index, for a model of `count` layers.

        Raises:
            ValueError: a layer is named that such a model does not have.
        """
        indices = range(count) if self.layers is None else self.layers
        return in_order("layers", dict.fromkeys(indices, float(self.ratio)), count)
