"""TokenTune on a whole model: gradients for selected tokens alone, and which labels these predict."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import TokenTuneConfig
from ..nn.selections import Selections
from ..nn.token_tune import SHARED, TokenTune, tuning_options
from ..reports import TokenTuneReport
from .model import report, take_layers


def tune(model: nn.Module, config: TokenTuneConfig) -> TokenTuneReport:
    """Has decoder layers of a Llama-like model keep activations of selected tokens alone while they train.

    `inject` calls it. Parameters, their names and what trains stay as they are; adapters may be injected before or
    after. The model computes what it computed; only gradients change.

    Args:
        model: as for `eliminate`, with attention by torch's `scaled_dot_product_attention` and without dropout in it.
        config: see there.

    Returns:
        Layer by layer what runs; layers that cannot, where `config.layers` is None, with the reason.

    Raises:
        TypeError, ValueError: the model has no such layers, a named layer is none, or it selects tokens already. The
            model is then as it was.
    """
    config = replace(config)  # a copy, checked anew: the caller's may have been edited since
    take_layers(
        model,
        TokenTune,
        config,
        lambda ratio: tuning_options(ratio, config.score),
        Selections(SHARED, config.seed),
        config.layers is not None,
    )
    found = report(model)
    assert isinstance(found, TokenTuneReport)
    return found


def selected_labels(model: nn.Module) -> Tensor | None:
    """Which labels count with TokenTune: those that the tokens predict that the model's latest call selected.

    The loss of TokenTune is over selected tokens. `causal_lm_loss(..., token_mask="selected")` asks for them itself;
    this is for a loss of your own, after the model was called:

        logits = model(input_ids=ids).logits
        counted = elimination.selected_labels(model)
        loss = model.loss_function(logits, labels.masked_fill(~counted, -100), model.config.vocab_size)

    A loss over all labels has the same gradient in the layers, but for the number that it is divided by.

    Args:
        model: one with layers of `nn.TokenTune`.

    Returns:
        bool `[B, T]`, true at labels of the tokens behind selected ones, for `[B, T]` labels as transformers takes
        them; never at the first, which nothing predicts. None where that call selected nothing, as in evaluation.

    Raises:
        ValueError: the model has no such layers.
    """
    kept = selections_of(model).latest
    if kept is None:
        return None
    counted = torch.zeros(kept.positions.shape[0], kept.tokens + 1, dtype=torch.bool, device=kept.positions.device)
    return counted.scatter_(1, kept.positions.long() + 1, True)[:, :-1]


def selections_of(model: nn.Module) -> Selections:
    """What the first TokenTune layer of a model shares with the others.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, TokenTune):
            return module.elimination.selections
    raise ValueError("model must have layers that differentiate by selected tokens, see TokenTuneConfig; it has none")
