"""The arms of a run: our layers or schedule, and on request another implementation from the same weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import peft_kernels as pk

from ..channels import Slice
from ..elimination import KeepSchedule
from ..nn import SparseDeltaLinear
from ..nn.s2ft_layer import S2FTLayer
from ..reselection import Reselector
from ..schedules import Schedule
from .selective_loss import SelectiveLoss
from .settings import Settings

OURS = "peft-kernels"
PEFT = "PEFT"
SHIRA = "PEFT SHiRA"
PEFT_LORA = "PEFT LoRA"
PACA = "plain PaCA"
DENSE = "peft-kernels dense"
FULL = "full fine-tuning"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of one arm.

    Attributes:
        loss: mean cross-entropy per token over the step's batches, in nats.
        seconds: wall time of forward, backward and optimizer.
        timed: False for the first steps after a start, which warm caches up and are left out of timings.
        optimizer_bytes: what the optimizer's state took after the step.
    """

    step: int
    loss: float
    seconds: float
    timed: bool
    optimizer_bytes: int = 0


@dataclass
class Arm:
    """One model in training.

    Attributes:
        parameters: what trains, or may train under the schedule, by name.
        history: the steps so far.
        reselector: what moves the entries of a sparse delta, or None.
        schedule: what decides which parameters train when, or None.
        keep_schedule: what decides how many tokens its layers keep when, or None.
        chunked_loss: whether the loss is formed without all logits, by `causal_lm_loss`.
        whole_logits: why it is not, where it was to be.
        token_mask: which tokens count in the training loss, those that layers "computed" or that were "selected" for
            gradients; None counts all.
        selective_loss: what it trains on in place of the loss of all tokens, or None.
    """

    name: str
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    history: list[StepRecord] = field(default_factory=list)
    reselector: Reselector | None = None
    schedule: Schedule | None = None
    keep_schedule: KeepSchedule | None = None
    chunked_loss: bool = False
    whole_logits: str | None = None
    token_mask: Literal["computed", "selected"] | None = None
    selective_loss: SelectiveLoss | None = None

    def losses(self) -> list[float]:
        """The loss of every step so far."""
        return [record.loss for record in self.history]

    def history_as_dicts(self) -> list[dict[str, Any]]:
        """The history in plain values, for JSON."""
        return [asdict(record) for record in self.history]

    def tensors(self) -> dict[str, Tensor]:
        """What training has changed, by name: the parameters, and the positions of sparse deltas."""
        positions = {f"{path}.indices": layer.indices for path, layer in self._sparse_layers().items()}
        return {**{name: parameter.detach() for name, parameter in self.parameters.items()}, **positions}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts what `tensors` gave back in place."""
        for path, layer in self._sparse_layers().items():
            layer.set_delta(tensors[f"{path}.indices"].to(layer.indices.device))
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def optimizer_bytes(self) -> int:
        """What the optimizer's state takes at present."""
        slots = self.optimizer.state.values()
        return sum(value.nbytes for slot in slots for value in slot.values() if isinstance(value, Tensor))

    def channels(self) -> dict[str, Slice]:
        """Which channels train in layers of S2FT, by path, numbered as in the model that was loaded."""
        found = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, S2FTLayer):
                indices = layer.indices.cpu()
                original = indices if layer.order is None else layer.order[indices].sort().values
                found[path] = Slice(original, layer.dim)
        return found

    def _sparse_layers(self) -> dict[str, SparseDeltaLinear]:
        return {path: module for path, module in self.model.named_modules() if isinstance(module, SparseDeltaLinear)}


def make_arm(name: str, model: nn.Module, settings: Settings, optimizer: Any) -> Arm:
    """An arm in training mode; `optimizer` makes its optimizer from the parameters that train."""
    parameters = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    model.train()
    return Arm(name, model, parameters, optimizer(list(parameters.values())))


def fused_adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Torch's AdamW, one kernel per parameter or for all of them."""
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def full_arm(model: nn.Module, settings: Settings) -> Arm:
    """Every parameter of `model` trains."""
    train_everything(model)
    return make_arm(FULL, model, settings, lambda p: fused_adamw(p, settings))


def train_everything(model: nn.Module) -> None:
    """Lets all parameters of `model` train that can."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def own_weights(model: nn.Module, paths: Iterable[str]) -> None:
    """Gives layers copies of weights that another arm writes into; what else is shared stays shared."""
    for path in paths:
        linear: Any = model.get_submodule(path)
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)


def copy_sharing_parameters(model: nn.Module) -> nn.Module:
    """A second model of the same structure whose parameters and buffers are the very tensors of the first."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


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
    """The loss of `batch` int64 `[B, seq_len]` that the arm trains on; in evaluation that of all its tokens."""
    if arm.selective_loss is not None:
        return arm.selective_loss(arm.model, batch, arm.token_mask)
    return cross_entropy(arm, batch)


def cross_entropy(arm: Arm, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy of `batch` int64 `[B, seq_len]`, as the model itself defines it.

    In training it is over the labels that `Arm.token_mask` leaves in.
    """
    if arm.chunked_loss:
        return pk.causal_lm_loss(arm.model, batch, batch, token_mask=arm.token_mask)
    if arm.token_mask is None:
        return arm.model(input_ids=batch, labels=batch).loss
    model: Any = arm.model
    logits = model(input_ids=batch).logits
    of = pk.elimination.computed_labels if arm.token_mask == "computed" else pk.elimination.selected_labels
    counted = of(model)
    labels = batch if counted is None else batch.masked_fill(~counted, -100)
    return model.loss_function(logits, labels, model.config.vocab_size)  # type: ignore[no-any-return]


def held_out_loss(arm: Arm, blocks: Tensor, batch_size: int, device: torch.device) -> float | None:
    """Mean loss over held-out blocks, int32 `[n, seq_len]`, without dropout; None when there are none."""
    if len(blocks) == 0:
        return None
    arm.model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in blocks.split(batch_size):
            total += cross_entropy(arm, batch.to(device).long()).item() * len(batch)
    arm.model.train()
    return total / len(blocks)
