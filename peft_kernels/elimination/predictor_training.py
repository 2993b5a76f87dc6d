"""Training predictors of block scores on what a model's own queries and keys say."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..planning import base_name
from .observation import Batch, LayerObserver
from .predictor import BlockPredictor, Predictors, check_count

_WARMUP = 10  # steps
_SHARPNESS = 8.0  # of the positive part of products, which begin near 1
_LEAST = 1e-4  # of the mean score: below, differences do not matter


@dataclass(frozen=True)
class Example:
    """What one layer saw of one batch.

    Attributes:
        hidden: `[B, T, H]`, in the model's dtype.
        scores: `[B, T // block_size]`, float32, -inf for blocks of padding.
    """

    hidden: Tensor
    scores: Tensor


def examples_of(observer: LayerObserver, batch: Batch, block_size: int) -> dict[int, Example]:
    """What each layer that is watched sees of a batch.

    Raises:
        ValueError: sequences are shorter than two blocks.
    """
    found: dict[int, Example] = {}

    def visit(index: int, hidden: Tensor, inputs: Mapping[str, Any]) -> None:
        scores = observer.true_scores(index, hidden, inputs, block_size).float()
        found[index] = Example(hidden.clone(), scores)

    observer.observe(batch, visit)
    return found


def ranking_loss(predicted: Tensor, scores: Tensor) -> Tensor:
    """How far predicted scores are from true ones: in proportions, and as distributions over a sequence's blocks.

    Both are divided by their mean over a sequence. The mean square of the difference of their logarithms weighs all
    blocks alike, around the threshold too; the Kullback-Leibler divergence adds weight to those with large scores.

    Args:
        predicted: `[B, n]`, not negative.
        scores: `[B, n]`, not negative, -inf for blocks that do not count.
    """
    counted = scores.isfinite()
    scores, predicted = (tensor.masked_fill(~counted, 0.0) for tensor in (scores, predicted))
    blocks = counted.sum(1, keepdim=True).clamp(min=1)
    truth, guess = (
        (tensor / (tensor.sum(1, keepdim=True) / blocks).clamp(min=1e-20) + _LEAST) for tensor in (scores, predicted)
    )
    ratio = truth.log() - guess.log()
    both = (ratio.square() + truth * ratio).masked_fill(~counted, 0.0)
    return (both.sum(1, keepdim=True) / blocks).mean()


@dataclass
class _Learner:
    """One layer's predictor while it trains, on inputs centered and scaled by what the first batch was like."""

    predictor: BlockPredictor
    center: Tensor
    scale: Tensor

    def _features(self, example: Example) -> Tensor:
        return self.predictor.features((self.predictor.normalized(example.hidden) - self.center) * self.scale)

    def soft_guess(self, example: Example) -> Tensor:
        """Scores with a smooth positive part: of products that all are negative, relu has no gradient to leave by."""
        products = self.predictor.products(self._features(example), example.scores.shape[1])
        return F.softplus(products, beta=_SHARPNESS).tril().sum(1)

    def guess(self, example: Example) -> Tensor:
        """Scores as they will be."""
        return self.predictor.scores(self._features(example), example.scores.shape[1])

    def finish(self, examples: Iterable[Example]) -> bool:
        """Folds the scaling in, and a factor that gives predicted scores the size of true ones; False if all are 0."""
        gains = []
        for example in examples:
            counted = example.scores.isfinite()
            true, guess = example.scores[counted].mean(), self.guess(example)[counted].mean()
            if true > 0 and guess > 0:
                gains.append(float((true / guess).log()))
        gain = math.exp(sum(gains) / len(gains)) if gains else 1.0
        self.predictor.fold(self.center, self.scale, gain)
        return bool(gains)


def _learner(example: Example, rank: int, size: int, block_size: int, generator: torch.Generator) -> _Learner:
    predictor = BlockPredictor(example.hidden.shape[2], rank, size, block_size, generator).to(example.hidden.device)
    tokens = predictor.normalized(example.hidden).flatten(0, 1)
    deviation = tokens.std(0, correction=0)
    return _Learner(predictor, tokens.mean(0), 1 / deviation.clamp(min=1e-3 * float(deviation.mean()) + 1e-12))


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step, relative: it rises at first, then falls as a cosine to nothing."""
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_predictors(
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int = 200,
    lr: float = 4e-3,
    rank: int = 64,
    size: int = 32,
    block_size: int = 64,
    layers: Iterable[int] | None = None,
    repeats: int = 4,
    held: int = 8,
    weight_decay: float = 0.01,
    seed: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> Predictors:
    """Trains a predictor for each decoder layer, all together, on the scores by the layers' own queries and keys.

    The model runs in evaluation, without a graph and for all tokens, and is left as it was. Each batch is put through
    it once and then trained on `repeats` times on average: every step draws from the last `held` batches. So
    `ceil(steps / repeats)` batches are read; where there are fewer, the last ones go on being drawn from. Of a batch
    that is held, every layer's hidden states stay in memory, `B T H` elements each.

    Args:
        model: a causal language model with Llama-like decoder layers.
        batches: token ids int64 `[B, T]`, or what the model is called with; text of the kind and length that training
            will see.
        steps: of AdamW.
        lr: of AdamW, at its peak.
        rank, size, block_size: see `BlockPredictor`.
        layers: indices of decoder layers; None takes all.
        repeats, held: see above.
        weight_decay: of AdamW.
        seed: of the initial weights and of what is drawn; the same seed gives the same bits.
        progress: called after every step with its number and the mean loss over layers.

    Returns:
        The predictors, on the layers' devices; their scores are as large as the true ones, on average.

    Raises:
        TypeError, ValueError: an argument is off, there are no batches, or sequences are shorter than two blocks.

    Source: Wang et al., "LeMo", 2025 (JENGA, USENIX ATC 2025), section 4.2.
    """
    counts = {"steps": steps, "rank": rank, "size": size, "block_size": block_size, "repeats": repeats, "held": held}
    for name, value in counts.items():
        check_count(name, value)
    check_count("seed", seed, 0)
    for name, number, least in (("lr", lr, math.ulp(0.0)), ("weight_decay", weight_decay, 0.0)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number < math.inf:
            raise ValueError(f"{name} must be a {'positive' if least else 'non-negative'} number, got {number!r}")
    observer = LayerObserver(model, layers)
    stream = iter(batches)
    first = _next(observer, stream, block_size)
    if first is None:
        raise ValueError("batches must hold at least one batch, got none")
    pool = [first]
    learners = _learners(first, rank, size, block_size, seed)
    parameters = [p for learner in learners.values() for p in learner.predictor.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    draws = random.Random(seed)
    for step in range(steps):
        if step and step % repeats == 0 and (found := _next(observer, stream, block_size)) is not None:
            pool = [*pool[-(held - 1) :], found] if held > 1 else [found]
        examples = pool[draws.randrange(len(pool))]
        optimizer.param_groups[0]["lr"] = lr * _rate(step, steps)
        loss = _step(learners, examples, optimizer)
        if progress is not None:
            progress(step + 1, loss)
    with torch.no_grad():
        dead = [i for i, learner in learners.items() if not learner.finish(examples[i] for examples in pool)]
    if dead:
        warnings.warn(f"predictors of the layers {dead} say 0 of every block; train with a smaller lr", stacklevel=2)
    trained = {index: learner.predictor.requires_grad_(False) for index, learner in learners.items()}
    return Predictors(trained, base_name(observer.model))


def _next(observer: LayerObserver, stream: Iterator[Batch], block_size: int) -> dict[int, Example] | None:
    batch = next(stream, None)
    return None if batch is None else examples_of(observer, batch, block_size)


def _learners(examples: Mapping[int, Example], rank: int, size: int, block_size: int, seed: int) -> dict[int, _Learner]:
    generator = torch.Generator().manual_seed(seed)
    return {i: _learner(example, rank, size, block_size, generator) for i, example in examples.items()}


@torch.enable_grad()  # type: ignore[untyped-decorator]
def _step(learners: dict[int, _Learner], examples: Mapping[int, Example], optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    total = 0.0
    for index, learner in learners.items():
        loss = ranking_loss(learner.soft_guess(examples[index]), examples[index].scores)
        loss.backward()  # layers have no parameters in common: a graph less in memory at a time
        total += float(loss.detach())
    optimizer.step()
    return total / len(learners)
