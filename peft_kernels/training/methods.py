"""The methods of `peft-kernels finetune`: from a base model to the arms of a run."""

from __future__ import annotations

from typing import Any

from . import lora_arms, sparse_delta_arms
from .arms import Arm
from .errors import UserError
from .settings import Settings

_BUILDERS = {"lora": lora_arms.build, "sparse_delta": sparse_delta_arms.build}


def build_arms(model: Any, settings: Settings) -> tuple[list[Arm], str]:
    """Turns the base model into the arms that `settings` ask for, ours first; the frozen weights are shared.

    Returns:
        The arms, and what `inject` reported about ours.

    Raises:
        UserError: target modules that match nothing, or peft missing for the comparison.
    """
    model.config.use_cache = False
    try:
        return _BUILDERS[settings.method](model, settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"the adapter cannot be added to this model: {error}") from error
