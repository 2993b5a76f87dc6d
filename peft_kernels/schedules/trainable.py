"""Starting and stopping the training of parameters, with the state that their optimizer holds for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..optim import torch_optimizer


class TrainableSet:
    """The parameters that a schedule may start and stop; no other is ever touched.

    A parameter that does not train has `requires_grad=False`, no gradient and no state in the optimizer, but stays in
    its parameter group: torch's optimizers pass over parameters without a gradient. One that starts has the state that
    a new optimizer would have for it. One that goes on keeps its state.

    Args:
        parameters: by name; all train.
        optimizer: holds all of them.

    Attributes:
        active: names of those that train.

    Raises:
        ValueError, TypeError: none, a sharded one, or one that the optimizer does not hold.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if not parameters:
            raise ValueError("model must have parameters that train, and has none")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in parameters.items():
            if hasattr(parameter, "to_local"):
                raise TypeError(
                    f"parameter {name!r} must be held in whole, got a {type(parameter).__name__}; sharded parameters "
                    "are not supported"
                )
            if id(parameter) not in held:
                raise ValueError(
                    f"optimizer must hold every parameter that may train, and does not hold {name!r}; give it that "
                    "one too, or freeze it with requires_grad_(False) before the schedule is made"
                )
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.active = frozenset(self.parameters)
        self._left_over = False

    def adopt(self, names: Collection[str]) -> None:
        """Lets exactly `names` train and leaves the optimizer's state as it is until `tidy`.

        For a beginning: the optimizer's state may be loaded before or after it.
        """
        self.active = frozenset(names)
        for name, parameter in self.parameters.items():
            if name in self.active:
                parameter.requires_grad_(True)
            else:
                _stop(parameter)
        self._left_over = True

    def tidy(self) -> None:
        """Drops the state of parameters that do not train, where `adopt` left any."""
        if self._left_over:
            for name, parameter in self.parameters.items():
                if name not in self.active:
                    self.optimizer.state.pop(parameter, None)
            self._left_over = False

    def switch(self, names: Collection[str]) -> None:
        """Lets exactly `names` train from now on."""
        before, self.active = self.active, frozenset(names)
        for name, parameter in self.parameters.items():
            if name not in self.active:
                _stop(parameter)
                self.optimizer.state.pop(parameter, None)
                continue
            if name not in before:
                self.optimizer.state.pop(parameter, None)
                state = initial_state(self.optimizer, parameter)
                if state:
                    self.optimizer.state[parameter] = state
            parameter.requires_grad_(True)

    def listen(self) -> None:
        """Has backward passes compute every gradient; what is active, and every state, stays as it is."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def release(self) -> None:
        """Lets all of them train, as before there was a schedule; those that start have no state yet."""
        self.switch(self.parameters)


def _stop(parameter: nn.Parameter) -> None:
    parameter.requires_grad_(False)
    parameter.grad = None


def initial_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What a new optimizer of that kind holds for `parameter` before its first step: nothing, but for Adagrad.

    Older versions of torch make Adagrad's state with the optimizer and never again.
    """
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    options = {name: value for name, value in group_of(optimizer, parameter).items() if name in optimizer.defaults}
    return torch.optim.Adagrad([parameter], **options).state[parameter]


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The parameter group that holds `parameter`; looked up anew, because loading a state replaces the groups."""
    return next(group for group in optimizer.param_groups if any(held is parameter for held in group["params"]))


def stateful_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that makes the steps; raises ValueError for one whose state is not the parameters' own."""
    inner = torch_optimizer(optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError("optimizer must keep a state per parameter; LBFGS keeps one for all of them")
    return inner
