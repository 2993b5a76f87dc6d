"""`GreenTrainer`: the tensors that are worth most for the backward FLOPs they cost."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.merged import layer_of
from .base import Schedule, check_at_least, trainable_parameters
from .flops import BackwardFlops, profile_backward_flops
from .importance import importances
from .selection import select_tensors


class GreenTrainer(Schedule):
    """The parameters with the largest importance whose backward pass costs at most `rho` of the full one.

    A period begins with an evaluation: in its first step all gradients are computed, once. When the optimizer is about
    to make that step, the importance of each tensor, `-sum(change of the weight * gradient)`, is taken (see
    `importance`), the tensors are selected (see `select_tensors`), and the others are frozen and left out of the step
    already. The following `interval - 1` steps cost what the selection costs. One that is selected again keeps its
    state in the optimizer. See `Schedule` for the loop; `optimizer.step` is called without a closure.

    The first step of a period needs the memory of every gradient, but of no state beyond the selection's, and one
    tensor's update at a time. Gradients as they are then count: clipping is part of them. If an importance is not
    finite, or none is above 0, nothing is selected: the tensors selected last go on, at first none, and the next step
    evaluates anew.

    Args:
        model: of nn.Linear, nn.Embedding, norms and transformers' Conv1D; what else it has must be frozen.
        optimizer: any torch optimizer that holds all parameters to be trained, with a learning rate `lr` per group.
        sample_batch: a batch to count FLOPs with, or those that were counted before; see `profile_backward_flops`.
        rho: the share of the full backward pass that training may cost, in (0, 1]. The first step of a period costs 1.
        interval: length of a period in steps of the optimizer.

    Attributes:
        flops: the costs.
        importance: of the last evaluation, by name; empty before.

    Raises:
        ValueError, TypeError: the message says what is missing or out of range; nothing has been changed.

    Source: Huang et al., "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation", ICLR
    2024. There `rho` is a share of forward and backward pass together, and the gradient is taken after a trial update;
    here no second pass is made. There costs are rounded down, so a selection may exceed its budget a little;
    here it cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sample_batch: Any,
        rho: float = 0.5,
        interval: int = 100,
    ) -> None:
        check_arguments(rho, interval)
        self.rho = float(rho)
        parameters = trainable_parameters(model)
        super().__init__(model, optimizer, parameters, interval, seed=None)
        _check_optimizer(self._optimizer)
        for name, parameter in parameters.items():
            if layer_of(parameter) is not None:
                raise ValueError(f"parameter {name!r} must be a weight, and is a delta that is written into one")
        self.flops = _flops(model, sample_batch, parameters)
        self._check_budget(self.flops)
        self.importance: dict[str, float] = {}
        self._evaluating = True
        self._start(tuple(parameters))

    @property
    def budget(self) -> int:
        """FLOPs that the backward passes of a selection may cost."""
        return math.floor(self.rho * self.flops.full)

    @property
    def backward_share(self) -> float:
        """What the backward passes of the present selection cost, as a share of the full one."""
        return self.flops.of(self.training) / self.flops.full

    def _check_budget(self, flops: BackwardFlops) -> None:
        if flops.full < 1:
            raise ValueError("sample_batch must have rows: the backward pass of an empty one costs nothing")
        name, least = min(((name, flops.of([name])) for name in flops.tensors), key=lambda item: item[1])
        if least > math.floor(self.rho * flops.full):
            raise ValueError(
                f"rho must be at least {least / flops.full:.3g}, what the cheapest tensor {name!r} costs, "
                f"got {self.rho}"
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        super()._before_step(optimizer, args, kwargs)
        if not self._evaluating:
            return
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise ValueError("GreenTrainer needs gradients before optimizer.step: call it without a closure")
        found = importances(self._trainable.parameters, self._optimizer)
        selection: frozenset[str] = frozenset()
        if all(math.isfinite(value) for value in found.values()):
            selection = select_tensors(found, self.flops, self.budget)
        if selection:
            self.importance = found
            self._evaluating = False
            self._trainable.switch(selection)
        else:
            self._leave_out()

    def _leave_out(self) -> None:
        """Keeps tensors that are not selected out of a step whose evaluation came to nothing."""
        selected = self._trainable.active if self.importance else frozenset()
        for name, parameter in self._trainable.parameters.items():
            if name not in selected:
                parameter.grad = None

    def _begin_period(self, number: int) -> None:
        self._evaluating = True
        self._trainable.listen()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "rho": self.rho}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "evaluating": self._evaluating,
            "importance": dict(self.importance),
            "flops": self.flops.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Schedule`; continues with the saved FLOPs, whatever the sample batch was."""
        self._check_state(state)
        importance, flops = dict(state["importance"]), BackwardFlops.from_dict(state["flops"])
        super().load_state_dict(state)
        self._evaluating, self.importance, self.flops = bool(state["evaluating"]), importance, flops
        if self._evaluating:
            self._trainable.listen()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if state["flops"]["tensors"].keys() != self._trainable.parameters.keys():
            raise ValueError("state must hold the FLOPs of this schedule's parameters, and holds those of others")
        if not isinstance(state["importance"], Mapping):
            raise ValueError(f"importance of the state must be numbers by name, got {state['importance']!r}")

    def _notes(self) -> tuple[str, ...]:
        notes = [f"backward pass: {100 * self.backward_share:.1f}% of the full one's {self.flops.full:,} FLOPs"]
        if self._evaluating:
            notes.append("the next step computes all gradients and selects anew")
        if self.flops.uncounted:
            notes.append(f"not counted: {', '.join(self.flops.uncounted)}")
        return tuple(notes)


def check_arguments(rho: float, interval: int) -> None:
    """Raises ValueError for arguments of `GreenTrainer` that no model could use."""
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0.0 < rho <= 1.0:
        raise ValueError(f"rho must be in (0, 1], got {rho!r}")
    check_at_least("interval", interval, 1)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"optimizer must make a step without a closure, and {type(optimizer).__name__} needs one")
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError("optimizer must have a learning rate lr in each parameter group")


def _flops(model: nn.Module, sample_batch: Any, parameters: Mapping[str, nn.Parameter]) -> BackwardFlops:
    if not isinstance(sample_batch, BackwardFlops):
        return profile_backward_flops(model, sample_batch, parameters.keys())
    if sample_batch.tensors.keys() != parameters.keys():
        differing = sorted(sample_batch.tensors.keys() ^ parameters.keys())[0]
        raise ValueError(f"sample_batch must hold the FLOPs of the parameters that train; {differing!r} differs")
    return sample_batch
