"""The arm of methods that choose which of the model's own parameters train: LISA, HFT, GreenTrainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import schedules
from .arms import OURS, Arm, fused_adamw, make_arm, train_everything
from .settings import Settings


def build(model: Any, settings: Settings, batches: Callable[[int], Iterable[Tensor]]) -> tuple[list[Arm], str]:
    """The arm, and what its schedule lets train at first; arguments and errors are those of `build_arms`."""
    train_everything(model)
    arm = make_arm(OURS, model, settings, lambda p: fused_adamw(p, settings))
    arm.schedule = _schedule(model, arm.optimizer, settings, batches)
    return [arm], str(arm.schedule.report())


def _schedule(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    batches: Callable[[int], Iterable[Tensor]],
) -> schedules.Schedule:
    if settings.method == "hft":
        norms: Any = settings.norms
        embeddings: Any = settings.embeddings
        return schedules.HFT(model, optimizer, settings.interval, norms, embeddings, seed=settings.seed)
    assert settings.interval is not None
    if settings.method == "lisa":
        return schedules.LISA(model, optimizer, settings.active_layers, settings.interval, seed=settings.seed)
    (batch,) = batches(1)
    return schedules.GreenTrainer(model, optimizer, {"input_ids": batch}, settings.rho, settings.interval)
