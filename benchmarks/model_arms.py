"""One training step of a whole model, per arm: forward, loss, backward, optimizer step, gradients dropped.

What the arms of every family share. All carry the same adapter values and let gradients flow to the embeddings' output,
so that each forms dx in every layer; the arm without an adapter is the frozen model, whose backward carries dx from the
loss to the embeddings' output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.training.arms import copy_sharing_parameters

from .suites import AnyModelCase, ModelCase, S2FTModelCase, SparseModelCase, TokenModelCase

FROZEN = "frozen model"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Case = TypeVar("Case", ModelCase, SparseModelCase, S2FTModelCase, TokenModelCase)


@dataclass
class ModelArm:
    """A model in training mode with its optimizer (None when nothing trains).

    Attributes:
        chunked_loss: whether the loss is `pk.causal_lm_loss` instead of the model's own.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    chunked_loss: bool = False

    def loss(self, batch: Tensor) -> Tensor:
        """The loss with its graph. batch int64 `[batch_size, sequence_length]`."""
        if self.chunked_loss:
            return pk.causal_lm_loss(self.model, batch, batch)
        return self.model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]

    def forward_backward(self, batch: Tensor) -> Tensor:
        """The loss, detached; gradients are left in `.grad`. batch int64 `[batch_size, sequence_length]`."""
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def step(self, batch: Tensor) -> Tensor:
        """One whole training step; returns the loss."""
        loss = self.forward_backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def resident_tensors(self) -> Iterator[Tensor]:
        """Every tensor that stays alive between steps: parameters, buffers, what modules keep beside them, optimizer
        state."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for module in self.model.modules():
            for value in vars(module).values():
                # PEFT keeps SHiRA's positions in a plain dict by adapter.
                for item in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(item, Tensor):
                        yield item
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class ArmFamily(Generic[Case]):
    """The arms that one family of adapters is compared by.

    Attributes:
        names: the arms of a case, the frozen model first.
        build: one of them over the parameters of a base model, which itself stays as it is.
        ideal_ratio: operations with adapters over operations of the frozen model, linears alone (attention left out);
            of token elimination see there.
        peft: the arm that memory is compared with.
        same_loss: by arm, whose first loss its own must be, as they begin with the same weights; None where that
            cannot be said.
        optimizer: in words, for the result file.
        bases: further arms that times are taken relative to.
    """

    names: Callable[[Case], tuple[str, ...]]
    build: Callable[[str, nn.Module, Case], ModelArm]
    ideal_ratio: Callable[[nn.Module, Case], float]
    peft: Callable[[Case], str]
    same_loss: Callable[[Case, str], str | None]
    optimizer: str
    bases: tuple[str, ...] = ()


def bare_model(base: nn.Module) -> Any:
    """A frozen model over the parameters of `base`, through which gradients flow to the embeddings' output."""
    model: Any = copy_sharing_parameters(base)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that adapters go into, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in TARGETS
    }


def own_weights(linears: Iterable[nn.Linear]) -> None:
    """Gives layers frozen weights of their own, so that what is written into them shows in no other arm."""
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)


def batches(tokenizer: Any, case: AnyModelCase, count: int) -> list[Tensor]:
    """`count` batches int64 `[batch_size, sequence_length]` of real text: the source of a standard library module."""
    import argparse
    import inspect

    tokens = tokenizer(inspect.getsource(argparse), add_special_tokens=False, verbose=False)["input_ids"]
    size = case.batch_size * case.sequence_length
    if len(tokens) < count * size:
        raise ValueError(f"batches: the text has {len(tokens)} tokens, {count} batches need {count * size}")
    return [
        torch.tensor(tokens[i * size : (i + 1) * size]).view(case.batch_size, case.sequence_length)
        for i in range(count)
    ]
