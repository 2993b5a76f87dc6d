"""Which tokens the layers computed in the latest call, and labels of these alone.

A token that most layers pass by is predicted from little more than its embedding. What the loss says of it is noise to
an adapter that is to work where all tokens are computed, so it had better not count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..planning import unwrapped
from .model import eliminating_layers


def computed_share(model: nn.Module) -> Tensor:
    """How many of the layers that eliminate tokens computed each token in the latest call in training.

    Args:
        model: one that eliminates tokens, and has been called since.

    Returns:
        float32 `[B, T]` in [0, 1].

    Raises:
        ValueError: no layer eliminates tokens.
        RuntimeError: one was not called in training yet, or their latest calls were of different shapes.
    """
    layers = eliminating_layers(unwrapped(model))
    if not layers:
        raise ValueError("model has no layers that eliminate tokens")
    calls = [layer.elimination.latest for layer in layers.values()]
    first = calls[0]
    if first is None or any(call is None or call[0] != first[0] for call in calls):
        raise RuntimeError(
            "model must have been called in training, with one batch for all its layers that eliminate tokens, before "
            "anybody can say which tokens they computed"
        )
    batch, tokens = first[0]
    device = next(next(iter(layers.values())).parameters()).device
    counts = torch.zeros(batch * tokens + 1, device=device)  # the last one for rows that only fill up
    for call in calls:
        assert call is not None
        if call[1] is None:
            counts += 1
        else:
            rows = torch.where(call[1] < 0, batch * tokens, call[1]).to(device)
            counts.index_add_(0, rows, torch.ones_like(rows, dtype=counts.dtype))
    return counts[:-1].view(batch, tokens) / len(calls)


def computed_labels(model: nn.Module, labels: Tensor, least: float = 0.5, ignore_index: int = -100) -> Tensor:
    """Labels without those that are predicted by tokens which the layers passed by.

    A token counts when at least `least` times as many layers computed it as computed the token of its sequence that
    most of them did. Nothing leaves the device.

    Args:
        model: as for `computed_share`; call it between the decoder and the loss.
        labels: int64 `[B, T]`, those of the tokens themselves: each is predicted by the token before it.
        least: in [0, 1]; 0 leaves all labels.
        ignore_index: put in place of the others.

    Returns:
        int64 `[B, T]`, a new tensor.

    Raises:
        ValueError, RuntimeError: as `computed_share`; least is out of range, labels are not of the latest call's shape.
    """
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0.0 <= least <= 1.0:
        raise ValueError(f"least must be in [0, 1], got {least!r}")
    share = computed_share(model)
    if labels.shape != share.shape:
        raise ValueError(f"labels must be {list(share.shape)}, as the model's latest call, got {list(labels.shape)}")
    counts = share >= least * share.amax(1, keepdim=True)
    predicted = torch.nn.functional.pad(counts[:, :-1], (1, 0), value=True)  # the first label is predicted by none
    return labels.masked_fill(~predicted.to(labels.device), ignore_index)
