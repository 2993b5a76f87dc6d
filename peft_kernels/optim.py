"""Optimizers that update a sparse delta and write it into its weight in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .nn.sparse_delta import layer_of


class SparseAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW`, a kernel per parameter; deltas of a `SparseDeltaLinear` are written into its weight as well.

    Takes any parameters: those that are not deltas get the same step without the write-back. State and its names are
    torch's (`step`, `exp_avg`, `exp_avg_sq`), so a state_dict of either loads into the other; a state_dict with the
    options of torch's that this class lacks (amsgrad, maximize) is refused.

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled; of deltas it decays the change, not the weight.

    Raises:
        ValueError: a number is out of range.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    writes_deltas = True
    """Layers need not write after a step of this optimizer."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {beta!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure` returns, which is called first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updated = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(parameter.grad.is_sparse for parameter, _ in updated):
            raise RuntimeError("SparseAdamW takes dense gradients; a delta's gradient is one number per entry")
        for parameter, group in updated:
            self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        numbers = (int(state["step"]), float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
        tensors = [_local(tensor) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        layer = layer_of(parameter)
        if layer is not None and not layer.merged:
            _step(tensors, (layer.weight.detach(), layer.indices, layer.original), numbers)
            layer.written()
        elif all(tensor.is_contiguous() for tensor in tensors):
            _step([tensor.view(-1) for tensor in tensors], (None, None, None), numbers)
            torch.autograd.graph.increment_version(parameter)
        else:  # any strides, at the price of a copy there and back
            flat = [tensor.flatten().clone() for tensor in tensors]
            _step(flat, (None, None, None), numbers)
            for tensor, updated in zip(tensors, flat, strict=True):
                tensor.copy_(updated.view(tensor.shape))

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:  # before anything is taken over
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"SparseAdamW has no {option}, which the loaded state was made with")
            if group.get("weight_decay") and not group.get("decoupled_weight_decay", True):
                raise ValueError("SparseAdamW decays weights apart from gradients, the loaded state was made otherwise")
        super().__setstate__(state)


def _step(tensors: list[Tensor], target: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
    values = tensors[0].detach()
    kernel = backends.kernel("sparse_adamw_", values.device.type, values.dtype)
    kernel(values, *tensors[1:], *target, *numbers)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def _check_not_negative(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0.0:  # also refuses NaN
            raise ValueError(f"{name} must be at least 0, got {value!r}")
