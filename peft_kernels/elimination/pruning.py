"""Removing what never does anything from predictors: neurons of the first layer that no token activates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .observation import Batch, LayerObserver
from .predictor import Predictors, check_width
from .recall import RecallReport, recall_report


@dataclass(frozen=True)
class PruningReport:
    """What `prune_predictors` removed.

    Attributes:
        before, after: neurons of each layer's predictor, by index.
        recall_before, recall_after: on the same batches; None where it was not asked for.
    """

    before: dict[int, int]
    after: dict[int, int]
    recall_before: RecallReport | None = None
    recall_after: RecallReport | None = None

    @property
    def removed(self) -> int:
        """Neurons, of all layers."""
        return sum(self.before.values()) - sum(self.after.values())

    def __str__(self) -> str:
        text = f"PruningReport: {self.removed} of {sum(self.before.values())} neurons removed"
        if self.recall_before is not None and self.recall_after is not None:
            text += f"; mean recall {self.recall_before.mean():.2%} before, {self.recall_after.mean():.2%} after"
        rows = (
            f"  layer {index}: {self.before[index]} to {self.after[index]}"
            for index in self.before
            if self.before[index] != self.after[index]
        )
        return "\n".join([text, *rows])


@torch.no_grad()
def prune_predictors(
    predictors: Predictors, model: nn.Module, batches: Iterable[Batch], keep: float | None = None
) -> tuple[Predictors, PruningReport]:
    """Predictors without the neurons of the first layer that are inactive for every token of calibration data.

    On these data scores stay what they were, to rounding: what is removed was zero. One neuron is left in any case.

    Args:
        predictors: are left as they are, but for the device that they are on.
        model: the model; left as it was.
        batches: calibration data, see `train_predictors`.
        keep: where given, recall at this ratio is measured before and after, on the same batches, which stay in memory.

    Returns:
        New predictors, and what was removed.

    Raises:
        TypeError, ValueError: an argument is off, or there are no batches.
    """
    observer = LayerObserver(model, predictors)
    for layer in observer.layers.values():
        check_width(layer, predictors.hidden_size)
    active: dict[int, Tensor] = {}

    def visit(index: int, hidden: Tensor, _: Mapping[str, Any]) -> None:
        predictor = predictors[index].to(hidden.device)
        here = (predictor.neurons(hidden) > 0).flatten(0, 1).any(0)
        active[index] = active[index] | here if index in active else here

    batches = batches if keep is None else list(batches)
    for batch in batches:
        observer.observe(batch, visit)
    if not active:
        raise ValueError("batches must hold at least one batch, got none")
    pruned = {index: predictors[index].without(~active[index]) for index in predictors}
    smaller = Predictors(pruned, predictors.base_model)
    recalls = [] if keep is None else [recall_report(which, model, batches, keep) for which in (predictors, smaller)]
    report = PruningReport(
        {index: predictor.rank for index, predictor in predictors.items()},
        {index: predictor.rank for index, predictor in smaller.items()},
        *recalls,
    )
    return smaller, report
