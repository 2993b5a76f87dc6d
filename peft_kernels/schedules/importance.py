"""What a tensor's update is worth: the loss that it takes away, to first order."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .trainable import group_of, initial_state


@torch.no_grad()
def importances(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`-sum(change of the weight * gradient)` of each parameter, with the gradients that are there.

    The change is the one that `optimizer` would make of a copy with new state, so that tensors that train and tensors
    that were frozen compare; it is computed in float32 at least, because in bfloat16 most changes round away. Nothing
    of the optimizer, the parameters or their gradients is changed. A parameter without a gradient has 0.
    """
    sums: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            change, gradient = change_by(optimizer, parameter)
            sums[name] = change.mul_(gradient).sum(dtype=torch.float64).neg_()
    if not sums:
        return dict.fromkeys(parameters, 0.0)
    # One transfer for all of them.
    device = next(iter(sums.values())).device
    values = dict(zip(sums, torch.stack([total.to(device) for total in sums.values()]).tolist(), strict=True))
    return {name: values.get(name, 0.0) for name in parameters}


def change_by(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """By how much a new optimizer like `optimizer` changes `parameter` in its first step, and the gradient.

    At the learning rate before any schedule (`initial_lr`), where there is one: in a warm-up the present one may be 0.
    """
    assert parameter.grad is not None
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    gradient = parameter.grad.to(dtype)
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    before = parameter.detach().to(dtype)
    copy = nn.Parameter(before.clone())
    copy.grad = gradient.clone()  # some optimizers change gradients
    group = {name: value for name, value in group_of(optimizer, parameter).items() if name != "params"}
    _step(optimizer, copy, {**group, "lr": group.get("initial_lr", group["lr"])})
    return copy.detach() - before, gradient


def _step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, group: dict[str, object]) -> None:
    """A step of an optimizer that is like `optimizer` but for holding `parameter` only, without any state or hooks."""
    kind = type(optimizer)
    single = object.__new__(kind)
    single.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    single.__dict__["_optimizer_step_pre_hooks"] = OrderedDict()
    single.__dict__["_optimizer_step_post_hooks"] = OrderedDict()
    single.param_groups = [{**group, "params": [parameter]}]
    single.state = defaultdict(dict)
    if state := initial_state(single, parameter):
        single.state[parameter] = state
    # Unwrapped: the wrapper that torch puts around every step runs hooks, those of all optimizers included.
    inspect.unwrap(kind.step)(single)
