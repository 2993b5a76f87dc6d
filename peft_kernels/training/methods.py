"""The methods of `peft-kernels finetune`: from a base model to the arms of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

import peft_kernels as pk

from ..channels import Slice
from . import lora_arms, s2ft_arms, schedule_arms, sparse_delta_arms, token_arms
from .arms import DENSE, Arm, copy_sharing_parameters, full_arm
from .errors import UserError
from .selective_loss import selective_loss
from .settings import Settings


def build_arms(
    model: Any,
    settings: Settings,
    batches: Callable[[int], Iterable[Tensor]],
    channels: Mapping[str, Slice] | None = None,
    reference: nn.Module | None = None,
) -> tuple[list[Arm], str]:
    """Turns the base model into the arms that `settings` ask for, ours first; weights that stay frozen are shared.

    Args:
        batches: the first batches of the training data, int64 `[B, seq_len]`, as many as it is called with.
        channels: of a run that is continued, which channels train by path; None chooses them.
        reference: the model that `--loss-ratio` compares losses with; None without that option.

    Returns:
        The arms, and a report of what trains in ours.

    Raises:
        UserError: target modules that match nothing, a model that the method does not fit, or peft missing for the
            comparison.
    """
    model.config.use_cache = False
    whole = copy.deepcopy(model) if settings.compare == "full" else None
    twin = _twin(model, settings) if settings.compare == "dense" else None
    try:
        arms, report = _build(model, settings, batches, channels)
        if twin is not None:
            (dense,), _ = _build(twin, settings, batches, channels)
            dense.name = DENSE
            arms.append(dense)
        if settings.selects_tokens:
            token_arms.select_tokens(arms[0], settings)
        if settings.sampled_gradient is not None:
            pk.inject(arms[0].model, pk.WTACRSConfig(settings.sampled_gradient))
    except (ValueError, TypeError) as error:
        if settings.trains_whole_model:
            raise UserError(f"--method {settings.method} does not fit this model: {error}") from error
        raise UserError(f"the adapter cannot be added to this model: {error}") from error
    if whole is not None:
        arms.append(full_arm(whole, settings))
    if reference is not None:
        arms[0].selective_loss = selective_loss(arms[0].model, reference, settings)
    token_arms.choose_losses(arms, settings)
    return arms, report


def _twin(model: Any, settings: Settings) -> Any:
    """A second base model, which shares what the method does not write into."""
    return copy_sharing_parameters(model) if settings.method == "lora" else copy.deepcopy(model)


def _build(
    model: Any,
    settings: Settings,
    batches: Callable[[int], Iterable[Tensor]],
    channels: Mapping[str, Slice] | None,
) -> tuple[list[Arm], str]:
    if settings.method == "lora":
        return lora_arms.build(model, settings)
    if settings.method == "sparse_delta":
        return sparse_delta_arms.build(model, settings)
    if settings.method == "s2ft":
        return s2ft_arms.build(model, settings, batches, channels)
    return schedule_arms.build(model, settings, batches)
