"""What thresholds cost: the loss when layers drop what is below them, and the share of the tokens that they keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..nn.token_elimination import TokenElimination
from ..planning import unwrapped
from .gradient import _in_evaluation
from .observation import Batch, all_tokens, arguments
from .thresholds import layers_by_leader, set_threshold


@dataclass(frozen=True)
class LayerCost:
    """One layer that selects tokens, and those that share its selection.

    Attributes:
        index: of the layer.
        threshold: -inf keeps everything.
        kept: share of the tokens that it keeps while all layers eliminate tokens.
        loss_change: what the loss grows by when this layer eliminates tokens and no other one does.
    """

    index: int
    threshold: float
    kept: float
    loss_change: float


@dataclass(frozen=True)
class ThresholdCosts:
    """What `threshold_costs` found.

    Attributes:
        loss_dense: mean loss of the batches when every layer computes for all tokens.
        loss: when all layers eliminate tokens.
        layers: one by one.
    """

    loss_dense: float
    loss: float
    layers: tuple[LayerCost, ...]

    @property
    def mean_kept(self) -> float:
        """The mean share that layers keep."""
        return sum(layer.kept for layer in self.layers) / len(self.layers)


def threshold_costs(model: nn.Module, thresholds: Mapping[int, float], batches: Iterable[Batch]) -> ThresholdCosts:
    """What thresholds cost and save, all together and layer by layer; the model is left as it was.

    Args:
        model: a causal language model that eliminates tokens with keep ratio 1.
        thresholds: of every layer that selects tokens, by index.
        batches: see `refine_thresholds`; best others than the thresholds were found on. They go through the model once
            per layer and twice more.

    Raises:
        ValueError, TypeError: an argument is off, or layers do not eliminate tokens of these batches.
    """
    model = unwrapped(model)
    groups, given = layers_by_leader(model), list(batches)
    if not given:
        raise ValueError("batches must hold at least one batch, got none")
    if thresholds.keys() != groups.keys():
        raise ValueError(f"thresholds must be for layers {sorted(groups)}, which select tokens, got {list(thresholds)}")
    dense = dense_loss(model, given)
    loss, kept = eliminating_loss(model, groups, thresholds, given)
    rows = []
    for index, threshold in thresholds.items():
        alone, _ = eliminating_loss(model, groups, {**dict.fromkeys(groups, -math.inf), index: threshold}, given)
        rows.append(LayerCost(index, threshold, kept[index], alone - dense))
    return ThresholdCosts(dense, loss, tuple(rows))


def dense_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean loss of batches in evaluation, of all tokens in all layers."""
    with all_tokens(model):
        return _mean_loss(model, batches)


def eliminating_loss(
    model: nn.Module,
    groups: Mapping[int, list[TokenElimination]],
    thresholds: Mapping[int, float],
    batches: Iterable[Batch],
) -> tuple[float, dict[int, float]]:
    """The mean loss of batches in evaluation with tokens eliminated all the same, and the share that each layer keeps.

    Args:
        model: not wrapped; it is left as it was.
        groups: its layers, by the one that selects for them.
        thresholds: for each of these.
        batches: at least one.

    Raises:
        ValueError: a layer computes for all tokens, or a loss is not finite.
    """
    kept = {}
    with _eliminating(groups):
        for index, layers in groups.items():
            set_threshold(layers, thresholds[index])
        with _in_evaluation(model), torch.no_grad():
            loss = _mean_loss(model, batches)
        for index, layers in groups.items():
            own = layers[0].elimination
            if own.dense_calls:
                raise ValueError(f"layer {own.index} computes for all tokens: {next(iter(own.dense_calls))}")
            kept[index] = int(own.kept_tokens) / own.tokens
    return loss, kept


def _mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    losses = []
    for batch in batches:
        call = arguments(batch)
        call.setdefault("labels", call.get("input_ids"))
        loss = getattr(model(**call), "loss", None)
        if loss is None or not torch.isfinite(loss):
            raise ValueError(f"batches must give a finite loss, got {loss}")
        losses.append(float(loss))
    return sum(losses) / len(losses)


@contextmanager
def _eliminating(groups: Mapping[int, list[TokenElimination]]) -> Iterator[None]:
    """With these layers eliminating tokens in evaluation, and counting anew; then everything as it was."""
    states = [layer.elimination for layers in groups.values() for layer in layers]
    names = ("options", "calls", "tokens", "kept_tokens", "dense_calls")
    before = [{name: getattr(state, name) for name in names} for state in states]
    try:
        for state in states:
            state.options = replace(state.options, train_only=False)
            state.calls = state.tokens = state.kept_tokens = 0
            state.dense_calls = type(state.dense_calls)()
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            for name, value in values.items():
                setattr(state, name, value)
