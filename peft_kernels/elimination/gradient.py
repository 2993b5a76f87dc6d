"""Scores for score="gradient": how strongly the loss depends on each token's last hidden state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..planning import unwrapped
from .model import selective_layers


def score_by_gradient(model: nn.Module, **batch: Any) -> Tensor:
    """Scores the tokens of a batch, for the call of the model with this batch that follows.

    One forward of all layers for all tokens, in evaluation and without a graph; then the loss is differentiated by the
    last hidden states, which costs a pass through the output layer.

    Args:
        model: a causal language model of transformers' that selects tokens with score="gradient".
        batch: what it is called with next, labels among it.

    Returns:
        `[B, T]`, float32: the L2 norm of the gradient by each token's last hidden state.

    Raises:
        ValueError: the model has no layers with this score or no output layer, or batch has no labels.
    """
    inner = unwrapped(model)
    states = [layer.elimination for layer in selective_layers(inner).values()]
    if not any(state.options.score == "gradient" for state in states):
        raise ValueError('model must have layers that select tokens with score="gradient", and has none')
    getter = getattr(inner, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        raise ValueError("model must have an output layer, and get_output_embeddings gives none")
    shared = {id(state.selections): state.selections for state in states}.values()
    seen: list[Tensor] = []

    def differentiate_from_here(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        torch.set_grad_enabled(True)  # until the context below ends
        seen.append(args[0].detach().requires_grad_())
        return (seen[-1], *args[1:])

    handle = head.register_forward_pre_hook(differentiate_from_here)
    try:
        with _in_evaluation(inner), torch.no_grad():
            for selections in shared:
                selections.suspended = True
            loss = getattr(inner(**{**batch, "use_cache": False}), "loss", None)
            if loss is None or not seen:
                raise ValueError("batch must hold labels, and the model's output has no loss")
            (gradient,) = torch.autograd.grad(loss, seen[0])
    finally:
        handle.remove()
        for selections in shared:
            selections.suspended = False
    scores = torch.linalg.vector_norm(gradient.float(), dim=-1)
    for selections in shared:
        selections.given.give(scores)
    return scores


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
