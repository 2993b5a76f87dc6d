"""How informative the blocks of a sequence are: the scores by which a layer chooses the tokens that it computes for.

A score is `[B, T // block_size]`, in float32 or float64; -inf is for a block of padding alone. Scores get no gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from .kept_tokens import padding_of, visible_from
from .llama_attention import AttentionPart, queries_and_keys

NAMED = ("attention", "norm", "gradient", "random", "predictor")


class Predictor(Protocol):
    """Says how informative blocks are from what goes into a layer.

    Called without gradients. With activation checkpointing it is called once more in backward, for what it may draw at
    random alone: its answer is not used there. It must not change the hidden states.
    """

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden `[B, T, H]` to `[B, T // block_size]`."""
        ...


class GivenScores:
    """Scores of tokens that were found before the call that uses them: for one call of the model each."""

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._used_by: Any = None

    def give(self, scores: Tensor) -> None:
        """scores `[B, T]` for the next call of the model."""
        self._scores, self._used_by = scores, None

    def take(self, call: Tensor | None, batch: int, tokens: int) -> Tensor:
        """The scores for a call, which is known by a tensor that it alone has.

        Raises:
            RuntimeError: none were given for this call.
            ValueError: they were given for another shape.
        """
        first = self._used_by is None
        if self._scores is None or not (first or (call is not None and self._used_by() is call)):
            raise RuntimeError(
                'score="gradient" needs elimination.score_by_gradient(model, **batch) before every call of the model '
                "in training, and it was not called before this one"
            )
        if self._scores.shape != (batch, tokens):
            raise ValueError(
                f"elimination.score_by_gradient must be called with the batch that follows, [{batch}, {tokens}] "
                f"tokens, and was called with {list(self._scores.shape)}"
            )
        if first and call is not None:
            self._used_by = weakref.ref(call)
        return self._scores

    def __getstate__(self) -> dict[str, Any]:
        return {"_scores": None, "_used_by": None}


def blocks_of(scores: Tensor, block_size: int) -> Tensor:
    """The largest score `[B, T // block_size]` of the tokens of each block, from `[B, T]`."""
    blocks = scores.shape[1] // block_size
    return scores[:, : blocks * block_size].unflatten(1, (blocks, block_size)).amax(2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_padding(scores: Tensor, padding: Tensor | None, block_size: int) -> Tensor:
    """Scores of blocks, -inf where all of a block is padding `[B, T]`."""
    if padding is None:
        return scores
    empty = blocks_of((~padding).to(torch.uint8), block_size) == 0
    return scores.masked_fill(empty, -torch.inf)


@torch.no_grad()
def attention_scores(
    attention: nn.Module, part: AttentionPart, h: Tensor, inputs: Mapping[str, Any], block_size: int
) -> Tensor:
    """The attention that blocks get, by this layer's own queries and keys of all tokens; see `ops.block_scores`.

    Args:
        attention: the module.
        part: what is known of it.
        h: `[B, T, H]`, normalized.
        inputs: what the decoder layer was called with.
        block_size: tokens per block.
    """
    starts, padding = visible_from(inputs, h.shape[0], h.shape[1])
    q, k = queries_and_keys(attention, part, h, *inputs["position_embeddings"])
    return without_padding(ops.block_scores(q, k, block_size, starts), padding, block_size)


@torch.no_grad()
def token_scores(tokens: Tensor, inputs: Mapping[str, Any], block_size: int) -> Tensor:
    """The largest score of each block's tokens `[B, T]`, padding left out."""
    padding = padding_of(inputs, tokens.shape[0])
    tokens = tokens.to(_wide(tokens.dtype))
    if padding is not None:
        tokens = tokens.masked_fill(padding, -torch.inf)
    return blocks_of(tokens, block_size)


@torch.no_grad()
def norm_scores(x: Tensor, inputs: Mapping[str, Any], block_size: int) -> Tensor:
    """The largest L2 norm of the hidden states x `[B, T, H]` in each block."""
    return token_scores(torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x.dtype)), inputs, block_size)


@torch.no_grad()
def random_scores(x: Tensor, inputs: Mapping[str, Any], block_size: int, generator: torch.Generator | None) -> Tensor:
    """A random number for each block of x `[B, T, H]`, of torch's generator on its device or the one given."""
    batch, tokens = x.shape[:2]
    if generator is None:  # the compiler takes no argument for it
        scores = torch.rand(batch, tokens // block_size, device=x.device)
    else:
        scores = torch.rand(batch, tokens // block_size, device=x.device, generator=generator)
    return without_padding(scores, padding_of(inputs, batch), block_size)


@torch.no_grad()
def predicted_scores(
    predictor: Callable[[Tensor], Tensor], x: Tensor, inputs: Mapping[str, Any], block_size: int
) -> Tensor:
    """What a predictor says of the blocks of x `[B, T, H]`.

    Raises:
        TypeError, ValueError: it is not what a predictor has to say.
    """
    batch, tokens = x.shape[:2]
    scores = predictor(x.detach())
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"a predictor of scores must return a floating tensor, got {type(scores).__name__}")
    if scores.shape != (batch, tokens // block_size):
        raise ValueError(
            f"a predictor of scores must return [{batch}, {tokens // block_size}], one for each whole block of "
            f"{block_size} tokens, got {list(scores.shape)}"
        )
    scores = scores.to(x.device, _wide(scores.dtype))
    return without_padding(scores, padding_of(inputs, batch), block_size)
