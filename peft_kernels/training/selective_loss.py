"""`--loss-ratio`: training on the tokens whose loss exceeds a reference model's most, as Rho-1 does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import peft_kernels as pk

from .errors import UserError
from .models import LoadedModel, load_model
from .settings import Settings


@dataclass(frozen=True)
class SelectiveLoss:
    """The loss of selected tokens.

    Attributes:
        ratio: share of a batch's tokens whose loss is taken.
        reference: the model that theirs is compared with, which stays as it is.
    """

    ratio: float
    reference: nn.Module

    def __call__(
        self, model: nn.Module, batch: Tensor, token_mask: Literal["computed", "selected"] | None = None
    ) -> Tensor:
        """The loss of `batch` int64 `[B, seq_len]`; `token_mask` as in `causal_lm_loss`."""
        reference_losses = pk.causal_lm_token_losses(self.reference, batch, batch)
        return pk.rho_loss(model, batch, batch, reference_losses, self.ratio, token_mask=token_mask)


def load_reference(settings: Settings, base: LoadedModel, device: torch.device) -> nn.Module | None:
    """The model that `--reference-model` names, None where it names none.

    Raises:
        UserError: it cannot be loaded, or its losses are not of the same tokens.
    """
    name = settings.reference_model
    if name is None:
        return None
    try:
        loaded = load_model(name, getattr(torch, settings.dtype), device)
    except UserError as error:
        raise UserError(f"--reference-model cannot be loaded as a model ({error})") from error
    if loaded.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise UserError(
            f"--reference-model {name}: its tokenizer has other tokens than that of --model {settings.model}"
        )
    model: Any = loaded.model
    model.config.use_cache = False
    return loaded.model


def selective_loss(model: nn.Module, reference: nn.Module, settings: Settings) -> SelectiveLoss | None:
    """What `--loss-ratio` has `model` train on; None without it.

    Raises:
        UserError: the loss of one of the models cannot be formed by token.
    """
    if settings.loss_ratio is None:
        return None
    from ..integrations.causal_lm import causal_lm_loss_obstacle

    for name, each in (("this model", model), ("the reference model", reference)):
        reason = causal_lm_loss_obstacle(each)
        if reason is not None:
            raise UserError(f"--loss-ratio does not fit {name}: {reason}")
    return SelectiveLoss(settings.loss_ratio, reference.eval())
