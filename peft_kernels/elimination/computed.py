"""Which tokens the layers computed in the latest call, and which labels these predict.

A token that most layers pass by is predicted from little more than its embedding. What the loss says of it is noise to
an adapter that is to work where all tokens are computed, so it had better not count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..planning import unwrapped
from .model import eliminating_layers


def _latest(model: nn.Module) -> list[tuple[tuple[int, int], Tensor | None] | None]:
    inner = unwrapped(model)
    layers = eliminating_layers(inner)
    if not layers:
        raise ValueError("model has no layers that eliminate tokens")
    if isinstance(model, torch._dynamo.OptimizedModule) or any(
        m._compiled_call_impl is not None for m in inner.modules()
    ):
        raise RuntimeError("model is compiled, and compiled layers do not remember which tokens they computed")
    return [layer.elimination.latest for layer in layers.values()]


def computed_share(model: nn.Module) -> Tensor:
    """How many of the layers that eliminate tokens computed each token in the latest call.

    Args:
        model: one that eliminates tokens, and has been called since.

    Returns:
        float32 `[B, T]` in [0, 1].

    Raises:
        ValueError: no layer eliminates tokens.
        RuntimeError: one was not called yet, their latest calls were of different shapes, or `torch.compile` has taken
            a part of the model.
    """
    calls = _latest(model)
    first = calls[0]
    if first is None or any(call is None or call[0] != first[0] for call in calls):
        raise RuntimeError(
            "model must have been called, with one batch for all its layers that eliminate tokens, before anybody can "
            "say which tokens they computed"
        )
    batch, tokens = first[0]
    device = next(model.parameters()).device
    counts = torch.zeros(batch * tokens + 1, device=device)  # the last one for rows that only fill up
    for call in calls:
        assert call is not None
        if call[1] is None:
            counts += 1
        else:
            rows = torch.where(call[1] < 0, batch * tokens, call[1]).to(device)
            counts.index_add_(0, rows, torch.ones_like(rows, dtype=counts.dtype))
    return counts[:-1].view(batch, tokens) / len(calls)


def computed_labels(model: nn.Module, least: float = 0.5) -> Tensor | None:
    """Which labels count if a token must have been computed to predict: `causal_lm_loss(token_mask="computed")`.

    A token counts when at least `least` times as many layers computed it as computed the token of its sequence that
    most of them did. Nothing leaves the device. For a loss of your own, after the model was called:

        logits = model(input_ids=ids).logits
        counted = elimination.computed_labels(model)
        loss = model.loss_function(logits, labels.masked_fill(~counted, -100), model.config.vocab_size)

    Args:
        model: as for `computed_share`.
        least: in [0, 1]; 0 leaves all labels.

    Returns:
        bool `[B, T]`, for labels of the tokens themselves, as transformers takes them: true at the tokens behind those
        that count, and at the first, which nothing predicts. None where that call computed all, as in evaluation.

    Raises:
        ValueError, RuntimeError: as `computed_share`; least is out of range.
    """
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0.0 <= least <= 1.0:
        raise ValueError(f"least must be in [0, 1], got {least!r}")
    share = computed_share(model)
    if all(call is None or call[1] is None for call in _latest(model)):
        return None
    counts = share >= least * share.amax(1, keepdim=True)
    return torch.nn.functional.pad(counts[:, :-1], (1, 0), value=True)
