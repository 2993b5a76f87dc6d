"""How many of the blocks that score="attention" would keep other ways of choosing find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.token_scores import norm_scores
from .observation import Batch, LayerObserver
from .predictor import Predictors, check_width


@dataclass(frozen=True)
class LayerRecall:
    """One decoder layer: shares, in [0, 1], of the blocks with the largest true scores that each way finds.

    Attributes:
        index: its number among the decoder layers.
        predicted: by its predictor.
        norm: by score="norm".
        first: by taking the first blocks of each sequence, which most queries come behind.
        random: by chance, as expected.
    """

    index: int
    predicted: float
    norm: float
    first: float
    random: float


@dataclass(frozen=True)
class RecallReport:
    """Recall of the blocks that a layer keeps; tokens behind the last whole block, always kept, are not in it.

    Attributes:
        layers: in order.
        keep: ratio of the blocks that are kept.
        block_size: tokens per block.
        sequences: that it was measured on.
    """

    layers: tuple[LayerRecall, ...]
    keep: float
    block_size: int
    sequences: int

    def mean(self, name: str = "predicted") -> float:
        """The mean over layers of one of `LayerRecall`'s shares."""
        return sum(getattr(layer, name) for layer in self.layers) / len(self.layers)

    def __str__(self) -> str:
        names = ("predicted", "norm", "first", "random")
        head = (
            f"RecallReport: keep {self.keep:g} of blocks of {self.block_size} tokens, {self.sequences} sequences; mean "
            + ", ".join(f"{name} {self.mean(name):.1%}" for name in names)
        )
        rows = (
            f"  layer {layer.index}: " + ", ".join(f"{name} {getattr(layer, name):.1%}" for name in names)
            for layer in self.layers
        )
        return "\n".join([head, *rows])


def _chosen(scores: Tensor, keep: float) -> Tensor:
    """Which blocks are kept, bool `[B, n]`, by the rule of `ops.select_tokens`."""
    positions, _ = ops.select_tokens(scores, keep, 1, tokens=scores.shape[1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, positions.long(), True)


@torch.no_grad()
def recall_report(
    predictors: Predictors, model: nn.Module, batches: Iterable[Batch], keep: float = 0.5
) -> RecallReport:
    """Measures predictors against the scores by the layers' own queries and keys; use text that none was trained on.

    Args:
        predictors: on their layers' devices or the CPU; they are moved to the former.
        model: the model; left as it was.
        batches: see `train_predictors`.
        keep: ratio of the blocks that are kept, in (0, 1).

    Raises:
        TypeError, ValueError: an argument is off, a predictor's layer is none of the model's, or sequences are shorter
            than two blocks.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0.0 < keep < 1.0:
        raise ValueError(f"keep must be in (0, 1), got {keep!r}")
    observer = LayerObserver(model, predictors)
    for layer in observer.layers.values():
        check_width(layer, predictors.hidden_size)
    size = predictors.block_size
    sums = {index: torch.zeros(4, dtype=torch.float64) for index in predictors}
    sequences = 0

    def visit(index: int, hidden: Tensor, inputs: Mapping[str, Any]) -> None:
        true = observer.true_scores(index, hidden, inputs, size).float()
        hidden_there = predictors[index].to(hidden.device)(hidden)
        blocks = torch.arange(true.shape[1], 0, -1, device=true.device).expand(true.shape)
        wanted = _chosen(true, keep)
        count = int(wanted.sum(1)[0])
        found = [
            (_chosen(scores.float().masked_fill(true == -torch.inf, -torch.inf), keep) & wanted).sum() / count
            for scores in (hidden_there, norm_scores(hidden, inputs, size), blocks)
        ]
        by_chance = torch.tensor(count / true.shape[1]) * true.shape[0]
        sums[index] += torch.stack([*(share.cpu() for share in found), by_chance]).double()

    for batch in batches:
        before = sequences

        def counted(index: int, hidden: Tensor, inputs: Mapping[str, Any]) -> None:
            nonlocal sequences
            sequences = before + hidden.shape[0]  # noqa: B023
            visit(index, hidden, inputs)

        observer.observe(batch, counted)
    if sequences == 0:
        raise ValueError("batches must hold at least one batch, got none")
    rows = tuple(LayerRecall(index, *(total / sequences).tolist()) for index, total in sums.items())
    return RecallReport(rows, float(keep), size, sequences)
