"""How a layer selects tokens, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import token_scores

HALVES = ("both", "attention", "mlp")


@dataclass(frozen=True)
class EliminationOptions:
    """How one layer eliminates tokens; checked when made. See `TokenElimination` for what each is."""

    keep: float = 0.5
    block_size: int = 64
    score: str | Callable[[Tensor], Tensor] = "attention"
    apply_to: str = "both"
    train_only: bool = True
    threshold: float | Tensor | None = None
    keep_text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"keep must be in [0, 1], got {self.keep!r}")
        object.__setattr__(self, "keep_text", repr(float(self.keep)))
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size must be an integer of at least 1, got {self.block_size!r}")
        if not callable(self.score) and self.score not in token_scores.NAMED:
            raise ValueError(f"score must be one of {', '.join(token_scores.NAMED)} or a callable, got {self.score!r}")
        if self.apply_to not in HALVES:
            raise ValueError(f"apply_to must be one of {', '.join(HALVES)}, got {self.apply_to!r}")
        if not isinstance(self.train_only, bool):
            raise TypeError(f"train_only must be True or False, got {self.train_only!r}")
        _check_threshold(self.threshold)

    @property
    def ratio(self) -> float:
        """`keep`, for code that is compiled: a number that has changed becomes an input of the graph there, from which
        no shape can be made; a text is compared, and the graph made anew."""
        return float(self.keep_text)

    @property
    def bounds_scores(self) -> bool:
        """Whether a threshold may drop something, which -inf does not."""
        return isinstance(self.threshold, Tensor) or (self.threshold is not None and self.threshold != -math.inf)

    @property
    def score_name(self) -> str:
        """The score's name, or the callable's type."""
        return self.score if isinstance(self.score, str) else type(self.score).__name__


def _check_threshold(threshold: Any) -> None:
    if isinstance(threshold, Tensor):
        if threshold.dim() != 0 or not threshold.is_floating_point():
            found = f"{threshold.dtype} {list(threshold.shape)}"
            raise ValueError(f"threshold must be a number or a floating scalar tensor, got a tensor, {found}")
    elif threshold is not None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not threshold < math.inf:  # written so that NaN fails
            raise ValueError(f"threshold must be a finite number, or -inf to keep everything, got {threshold!r}")
