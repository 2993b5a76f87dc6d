"""The arms of a run: our layers, and on request PEFT's over the same frozen weights, from the same initial adapter."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk

from .errors import UserError, require
from .settings import Settings

OURS = "peft-kernels"
PEFT = "PEFT"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of one arm.

    Attributes:
        loss: mean cross-entropy per token over the step's batches, in nats.
        seconds: wall time of forward, backward and optimizer.
        timed: False for the first steps after a start, which warm caches up and are left out of timings.
    """

    step: int
    loss: float
    seconds: float
    timed: bool


@dataclass
class Arm:
    """One model in training."""

    name: str
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    history: list[StepRecord] = field(default_factory=list)

    def losses(self) -> list[float]:
        """The loss of every step so far."""
        return [record.loss for record in self.history]

    def history_as_dicts(self) -> list[dict[str, Any]]:
        """The history in plain values, for JSON."""
        return [asdict(record) for record in self.history]


def build_arms(model: Any, settings: Settings) -> tuple[list[Arm], str]:
    """Turns the base model into the arms that `settings` ask for, ours first; the base weights are shared.

    Returns:
        The arms, and what `inject` reported about ours.

    Raises:
        UserError: target modules that match nothing, or peft missing for the comparison.
    """
    model.config.use_cache = False
    compare = settings.compare == "peft"
    if compare:
        require("peft")
    other = copy_sharing_parameters(model) if compare else None
    keep_float32 = settings.adapter_dtype == "float32"
    try:
        report = pk.inject(model, _our_config(settings), seed=settings.seed, autocast_adapter_dtype=keep_float32)
    except (ValueError, TypeError) as error:
        raise UserError(f"the adapter cannot be added to this model: {error}") from error
    arms = [_arm(OURS, model, settings)]
    if other is not None:
        arms.append(_arm(PEFT, _peft_model(other, model, settings), settings))
    return arms, str(report)


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """A second model of the same structure whose parameters and buffers are the very tensors of the first."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _our_config(settings: Settings) -> Any:
    return pk.LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=settings.modules(),
        task_type="CAUSAL_LM",
    )


def _peft_model(base: nn.Module, ours: nn.Module, settings: Settings) -> nn.Module:
    """PEFT's model with the configuration and the initial weights of ours, passed through an adapter directory."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory(prefix="peft-kernels-") as directory:
        pk.save_adapter(ours, directory)
        model = PeftModel.from_pretrained(
            base, directory, is_trainable=True, autocast_adapter_dtype=settings.adapter_dtype == "float32"
        )
    return model


def _arm(name: str, model: nn.Module, settings: Settings) -> Arm:
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )
    model.train()
    return Arm(name, model, parameters, optimizer)


def _checkpoint_activations(model: Any) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0; a function of the step alone."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.lr_schedule == "constant":
        return settings.lr * warmup
    done = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    decay = 1.0 - done if settings.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.lr * warmup * decay


def loss_of(arm: Arm, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy of `batch` int64 `[B, seq_len]`, as the model itself defines it."""
    return arm.model(input_ids=batch, labels=batch).loss


def held_out_loss(arm: Arm, blocks: Tensor, batch_size: int, device: torch.device) -> float | None:
    """Mean loss over held-out blocks, int32 `[n, seq_len]`, without dropout; None when there are none."""
    if len(blocks) == 0:
        return None
    arm.model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in blocks.split(batch_size):
            total += loss_of(arm, batch.to(device).long()).item() * len(batch)
    arm.model.train()
    return total / len(blocks)


def load_in_peft(peft_model: nn.Module, directory: Path) -> None:
    """Adds the adapter that was written to `directory` to a PEFT model as a user would, and makes it the active one."""
    peft_model.load_adapter(str(directory), adapter_name="written")  # type: ignore[operator]
    peft_model.set_adapter("written")  # type: ignore[operator]
