"""Finding thresholds of scores: how much each layer can drop is found by asking the loss, by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..nn.token_elimination import TokenElimination
from ..planning import base_name, unwrapped
from .observation import Batch, observe
from .predictor import check_count
from .threshold_losses import dense_loss, eliminating_loss
from .thresholds import Thresholds, layers_by_leader

Progress: TypeAlias = Callable[[int, float], None]

_UNFIT = {"random": "are random", "gradient": "are found outside of the layer"}


@dataclass(frozen=True)
class ThresholdReport:
    """What `refine_thresholds` found.

    Attributes:
        loss_dense: mean loss of the batches when every layer computes for all tokens.
        loss: with the thresholds.
        tolerance: `loss <= (1 + tolerance) * loss_dense`.
        kept: share of the tokens that each layer keeps, by index.
        evaluations: how often the batches were put through the model.
        stopped: why it ended.
    """

    loss_dense: float
    loss: float
    tolerance: float
    kept: dict[int, float]
    evaluations: int
    stopped: str

    @property
    def mean_kept(self) -> float:
        """The mean of `kept`."""
        return sum(self.kept.values()) / len(self.kept)

    def __str__(self) -> str:
        head = (
            f"ThresholdReport: loss {self.loss:.4f} (dense {self.loss_dense:.4f}, at most "
            f"{(1 + self.tolerance) * self.loss_dense:.4f}), {self.mean_kept:.1%} of tokens kept, {self.evaluations} "
            f"evaluations; {self.stopped}"
        )
        return "\n".join([head, *(f"  layer {index}: {share:.1%} kept" for index, share in self.kept.items())])


@dataclass
class _State:
    """Thresholds that were tried: blocks that each layer drops of the calibration's, what that cost, what it kept."""

    dropped: dict[int, int]
    loss: float
    kept: dict[int, float] = field(default_factory=dict)

    def tokens(self) -> float:
        """Shares that are dropped, summed over layers."""
        return sum(1 - share for share in self.kept.values())


class _Evaluation:
    """Losses of a model by the blocks that its layers drop, each once."""

    def __init__(self, model: nn.Module, batches: list[Batch], most: int, progress: Progress | None) -> None:
        self.model, self.batches, self.most, self.progress = model, batches, most, progress
        self.groups = layers_by_leader(model)
        self.used = 0
        self._known: dict[tuple[int, ...], _State] = {}
        self.scores = self._all_scores()

    def _all_scores(self) -> dict[int, list[float]]:
        """The scores of all calibration blocks in order, by layer, of the dense model."""
        leaders = {index: layers[0] for index, layers in self.groups.items()}
        found: dict[int, list[Tensor]] = {index: [] for index in leaders}

        def visit(index: int, hidden: Tensor, inputs: Mapping[str, Any]) -> None:
            tables = inputs.get("position_embeddings")
            layer = leaders[index]
            scores = layer.elimination.scores(layer, hidden, inputs, tables[0] if tables else None)
            found[index].append(scores[scores.isfinite()].double().cpu())

        for batch in self.batches:
            observe(self.model, leaders, batch, visit)
        ordered = {index: torch.cat(scores).sort().values.tolist() for index, scores in found.items()}
        for index, scores in ordered.items():
            if not scores:
                size = leaders[index].elimination.options.block_size
                raise ValueError(f"batches must hold whole blocks of {size} tokens, and layer {index} saw none")
        return ordered

    def threshold(self, index: int, dropped: int) -> float:
        """The smallest threshold that drops so many of a layer's calibration blocks, fewer where scores are equal."""
        return -math.inf if dropped == 0 else self.scores[index][dropped]

    @property
    def left(self) -> int:
        return self.most - self.used

    def _done(self, loss: float) -> None:
        self.used += 1
        if self.progress is not None:
            self.progress(self.used, loss)

    def dense(self) -> _State:
        """Every token in every layer."""
        loss = dense_loss(self.model, self.batches)
        self._done(loss)
        state = _State(dict.fromkeys(self.groups, 0), loss, dict.fromkeys(self.groups, 1.0))
        self._known[tuple(state.dropped.values())] = state
        return state

    def __call__(self, dropped: Mapping[int, int]) -> _State:
        key = tuple(dropped[index] for index in self.groups)
        if key not in self._known:
            thresholds = {index: self.threshold(index, dropped[index]) for index in self.groups}
            loss, kept = eliminating_loss(self.model, self.groups, thresholds, self.batches)
            self._done(loss)
            self._known[key] = _State(dict(dropped), loss, kept)
        return self._known[key]


def refine_thresholds(
    model: nn.Module,
    batches: Iterable[Batch],
    keep: float = 0.5,
    tolerance: float = 0.01,
    step: float = 0.1,
    max_evaluations: int = 200,
    progress: Progress | None = None,
) -> tuple[Thresholds, ThresholdReport]:
    """Thresholds by layer that drop as much as a tolerance of the loss allows, by finite differences.

    Each layer begins at the quantile of its scores that keeps `keep` of the blocks; while that costs more than the
    tolerance, all layers drop half as many. Then each layer's threshold is moved up and down by `step` of its blocks,
    which gives what a dropped token costs in loss; layers go up by a step in the order of that, cheapest first, those
    for which the loss stays below `(1 + tolerance)` of the dense one; and so on from there. A layer that was refused
    once stays. Nothing is drawn at random. The model is left as it was: see `set_thresholds`.

    Args:
        model: a causal language model that eliminates tokens with keep ratio 1, as a configuration with `threshold` and
            without `keep_ratio` makes it.
        batches: calibration data, token ids `[B, T]` or what the model is called with; without labels, the token ids
            are. All stay in memory.
        keep: share of the blocks that every layer keeps to begin with, in (0, 1]; in the end it can be more or less.
        tolerance: of the loss, relative; at least 0.
        step: share of a layer's blocks by which its threshold moves, in (0, 1).
        max_evaluations: how often the batches go through the model, at least 2; it ends there.
        progress: called after each time with how often that was, and the loss.

    Returns:
        The thresholds, and what they cost and save on these batches.

    Raises:
        ValueError, TypeError: an argument is off, layers have a keep ratio below 1 or random scores, or do not
            eliminate tokens of these batches.
    """
    model = unwrapped(model)
    _check_share("keep", keep, 1.0)
    _check_share("step", step, math.nextafter(1.0, 0.0))
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a number of at least 0, got {tolerance!r}")
    check_count("max_evaluations", max_evaluations, 2)
    score, block_size = _score_of(layers_by_leader(model))
    given = list(batches)
    if not given:
        raise ValueError("batches must hold at least one batch, got none")
    evaluation = _Evaluation(model, given, max_evaluations, progress)
    dense = evaluation.dense()
    limit = (1 + tolerance) * dense.loss
    state, stopped = _refined(evaluation, _start(evaluation, dense, keep, limit), limit, step)
    values = {index: evaluation.threshold(index, count) for index, count in state.dropped.items()}
    report = ThresholdReport(dense.loss, state.loss, float(tolerance), dict(state.kept), evaluation.used, stopped)
    return Thresholds(values, score, block_size, base_name(model)), report


def _check_share(name: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= most:
        raise ValueError(f"{name} must be in (0, 1{']' if most == 1.0 else ')'}, got {value!r}")


def _score_of(groups: Mapping[int, list[TokenElimination]]) -> tuple[str, int]:
    """Score and block size of the model's layers; raises ValueError where no thresholds can be found for them."""
    for layers in groups.values():
        options = layers[0].elimination.options
        if options.score in _UNFIT:
            raise ValueError(f"thresholds cannot be of score={options.score!r}: its scores {_UNFIT[options.score]}")  # type: ignore[index]
        for layer in layers:
            keep = layer.elimination.options.keep
            if keep != 1:
                raise ValueError(
                    f"layer {layer.elimination.index} must have keep ratio 1 for its threshold to decide alone, got "
                    f"{keep}; inject with threshold and without keep_ratio"
                )
    found = {(o.score_name, o.block_size) for o in (layers[0].elimination.options for layers in groups.values())}
    if len(found) > 1:
        raise ValueError(f"layers must have one score and one block size, got {sorted(found)}")
    return found.pop()


def _start(evaluation: _Evaluation, dense: _State, keep: float, limit: float) -> _State:
    """All layers at the quantile of `keep`, or of half as many dropped blocks until the loss is within the limit."""
    dropped = {index: round((1 - keep) * (len(scores) - 1)) for index, scores in evaluation.scores.items()}
    while any(dropped.values()) and evaluation.left > 0:
        state = evaluation(dropped)
        if state.loss <= limit:
            return state
        dropped = {index: count // 2 for index, count in dropped.items()}
    return dense


def _moved(evaluation: _Evaluation, state: _State, index: int, step: float, sign: int) -> dict[int, int]:
    blocks = len(evaluation.scores[index])
    count = state.dropped[index] + sign * max(1, round(step * blocks))
    return {**state.dropped, index: min(max(count, 0), blocks - 1)}


def _refined(evaluation: _Evaluation, state: _State, limit: float, step: float) -> tuple[_State, str]:
    """Raises thresholds from a state within the limit; returns the last such state and why it ended."""
    open_layers = set(evaluation.groups)
    while True:
        slopes: dict[int, float] = {}
        for index in sorted(open_layers):
            if evaluation.left < 2:
                return state, "max_evaluations was reached"
            up = evaluation(_moved(evaluation, state, index, step, 1))
            down = evaluation(_moved(evaluation, state, index, step, -1))
            if up.dropped == state.dropped or up.tokens() <= down.tokens():  # it drops nothing more
                open_layers.discard(index)
            else:
                slopes[index] = (up.loss - down.loss) / (up.tokens() - down.tokens())
        for index in sorted(slopes, key=lambda i: (slopes[i], i)):
            candidate = _moved(evaluation, state, index, step, 1)
            if evaluation.left < 1:
                return state, "max_evaluations was reached"
            tried = evaluation(candidate)
            if tried.loss <= limit:
                state = tried
            else:
                open_layers.discard(index)
        if not open_layers:
            return state, "no layer can drop more"
