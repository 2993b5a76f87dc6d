"""A model's state while something is measured with it: kept, and put back whatever happens."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def borrowed(model: nn.Module, trainable: Collection[str] = ()) -> Iterator[None]:
    """The model in evaluation mode, where only the parameters named in `trainable` require gradients and none has one.

    Afterwards, and after an error, every module's training flag, every parameter's `requires_grad` and its gradient
    are what they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(model.get_parameter(name)) for name in trainable}
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _, _ in parameters:
            parameter.grad = None
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
