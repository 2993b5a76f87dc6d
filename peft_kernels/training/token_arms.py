"""Token elimination, TokenTune and the loss without all logits, for the arms of every adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import peft_kernels as pk

from ..elimination.model import config_of
from ..nn.selective_layer import SelectiveLayer
from . import token_options
from .arms import DENSE, OURS, Arm
from .errors import UserError
from .settings import Settings


def select_tokens(arm: Arm, settings: Settings) -> None:
    """Has the decoder layers of an arm compute for kept tokens alone in training, or differentiate by selected ones.

    Raises:
        ValueError, TypeError: the model has no such layers; see `elimination.eliminate` and `elimination.tune`.
    """
    if settings.token_tune is not None:
        tuning = pk.TokenTuneConfig(
            settings.token_tune,
            settings.token_layer_indices(),
            settings.token_score,  # type: ignore[arg-type]
        )
        pk.inject(arm.model, tuning)
        arm.token_mask = "selected"
        return
    pk.inject(arm.model, token_options.configuration(settings))
    if settings.token_loss == "computed":
        arm.token_mask = "computed"
    if settings.token_keep_steps is not None:
        arm.keep_schedule = pk.elimination.KeepSchedule(arm.model, steps=settings.token_keep_steps)


def configuration_of(arm: Arm) -> dict[str, Any] | None:
    """How an arm selects tokens, in plain values; None where it does not."""
    config = config_of(arm.model)
    return None if config is None else config.to_dict()


def choose_losses(arms: list[Arm], settings: Settings) -> None:
    """Has our arms form their loss without all logits, where that is asked for.

    Unasked it is done where tokens are selected, for layers or for the loss, and the model allows it;
    `Arm.whole_logits` says why it does not.

    Raises:
        UserError: it was asked for by name, and this model does not allow it.
    """
    wanted = settings.chunked_loss
    if wanted is None:
        wanted = settings.selects_tokens or settings.loss_ratio is not None
    if not wanted:
        return
    from ..integrations.causal_lm import causal_lm_loss_obstacle

    for arm in arms:
        if arm.name != OURS and (arm.name != DENSE or not settings.chunked_loss):
            continue
        arm.whole_logits = causal_lm_loss_obstacle(arm.model)
        arm.chunked_loss = arm.whole_logits is None
        if settings.chunked_loss and arm.whole_logits is not None:
            raise UserError(f"--chunked-loss does not fit this model: {arm.whole_logits}")


def _counted(arm: Arm) -> dict[str, SelectiveLayer]:
    return pk.elimination.selective_layers(arm.model)


def counts(arm: Arm) -> dict[str, dict[str, Any]]:
    """What the layers that select tokens have counted, by path, in plain values."""
    return {
        path: {
            "calls": layer.elimination.calls,
            "tokens": layer.elimination.tokens,
            "kept_tokens": int(layer.elimination.kept_tokens),
            "dense_calls": dict(layer.elimination.dense_calls),
        }
        for path, layer in _counted(arm).items()
    }


def restore_counts(arm: Arm, counted: Mapping[str, Mapping[str, Any]]) -> None:
    """Goes on counting from what `counts` gave."""
    for path, layer in _counted(arm).items():
        saved = counted[path]
        layer.elimination.calls = saved["calls"]
        layer.elimination.tokens = saved["tokens"]
        layer.elimination.kept_tokens = saved["kept_tokens"]
        layer.elimination.dense_calls = Counter(saved["dense_calls"])


def as_record(report: pk.EliminationReport | pk.TokenTuneReport) -> dict[str, Any]:
    """A report in plain values, for JSON; `kept_share` is of the tokens of the layers that select some."""
    return {
        "kept_share": kept_share(report),
        "layers": [asdict(layer) for layer in report.layers],
    }


def kept_share(report: pk.EliminationReport | pk.TokenTuneReport) -> float | None:
    """Of the tokens of the layers that select some, the share that was selected; None before any call."""
    tokens = sum(layer.tokens for layer in report.selecting)
    return sum(layer.kept_tokens for layer in report.selecting) / tokens if tokens else None
