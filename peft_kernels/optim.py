"""Optimizers that update what trains in a weight and write it there in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .nn.merged import delta_layer_of, layer_of


class SparseAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW`, a kernel per parameter; deltas and slices are written into their weight as well.

    Those are the values of a `SparseDeltaLinear` or a `RoSALinear`, those of PEFT's SHiRA layers after `accelerate`,
    and the trainable slices of an `S2FTLinear` or `S2FTConv1D`.

    Takes any parameters: those that are not deltas get the same step without the write-back. State and its names are
    torch's (`step`, `exp_avg`, `exp_avg_sq`), so a state_dict of either loads into the other; a state_dict with the
    options of torch's that this class lacks (amsgrad, maximize) is refused.

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled; of deltas it decays the change, of slices the weight itself.

    Raises:
        ValueError: a number is out of range.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    writes_deltas = True
    """Deltas and slices are in their weight when a step is done."""

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
            trained, grad, *moments = tensors
            layer.update_adamw(trained, grad.contiguous(), *moments, *numbers)  # a gradient set by hand may be a view
            layer.written()
        elif all(tensor.is_contiguous() for tensor in tensors):
            _step([tensor.view(-1) for tensor in tensors], numbers)
            torch.autograd.graph.increment_version(parameter)
        else:  # any strides, at the price of a copy there and back
            flat = [tensor.flatten().clone() for tensor in tensors]
            _step(flat, numbers)
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


class SparseSM3(torch.optim.Optimizer):
    """SM3 for the deltas of `SparseDeltaLinear` layers, written into the weight in the same pass.

    An entry's second moment is the smaller of two maxima, of its row and of its column, so a layer's state is
    `row_max [N]` and `column_max [K]` however many entries train, in values' dtype. They are also what
    `Reselector(selection="sm3")` grows entries by. With `beta` above 0, `exp_avg [nnz]` holds the averaged step.

        u = min(row_max[n], column_max[k]) + g^2,    step = g / (sqrt(u) + eps),    the maxima take u in

    Args:
        params: values of `SparseDeltaLinear` layers, or parameter groups of them.
        lr: learning rate.
        beta: share of the previous steps in the averaged one, in [0, 1); 0 averages nothing.
        eps: added to the root of u.
        weight_decay: decoupled; it decays the change, not the weight.

    Raises:
        ValueError: a number is out of range, or a parameter is not a layer's values.

    Source: Anil et al., "Memory-Efficient Adaptive Optimization", NeurIPS 2019, SM3-II.
    """

    writes_deltas = True

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.0, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta must be in [0, 1), got {beta!r}")
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every torch optimizer; refuses parameters that are not a layer's values."""
        params = param_group["params"]
        given = [params] if isinstance(params, Tensor) else list(params)
        for number, entry in enumerate(given):
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, Tensor) and delta_layer_of(parameter) is None:
                raise ValueError(
                    "params must be values of SparseDeltaLinear layers, whose rows and columns SM3 goes by; got a "
                    f"parameter {list(parameter.shape)} as number {number} of group {len(self.param_groups)}"
                )
        super().add_param_group({**param_group, "params": given})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure` returns, which is called first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self._update(values, group)
        return loss

    def _update(self, values: Tensor, group: dict[str, Any]) -> None:
        layer = delta_layer_of(values)
        if layer is None:
            raise RuntimeError(f"the layer of values {list(values.shape)} is gone; make a new SparseSM3 without them")
        state = self.state[values]
        if not state:
            rows, columns = layer.weight.shape
            state["row_max"], state["column_max"] = values.new_zeros(rows), values.new_zeros(columns)
        if group["beta"] > 0.0 and "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(values)
        target = (None, layer.indices, None)
        if not layer.merged:
            target = (layer.weight.detach(), layer.indices, layer.original)
        kernel = backends.kernel("sparse_sm3_", values.device.type, values.dtype)
        kernel(
            values.detach(),
            values.grad,
            state["row_max"],
            state["column_max"],
            state.get("exp_avg"),
            *target,
            *(float(group[name]) for name in ("lr", "beta", "eps", "weight_decay")),
        )
        if layer.merged:
            torch.autograd.graph.increment_version(values)
        else:
            layer.written()


def _step(tensors: list[Tensor], numbers: tuple[Any, ...]) -> None:
    """Of a parameter that is in no weight: values, gradient and moments, 1-D."""
    kernel = backends.kernel("sparse_adamw_", tensors[0].device.type, tensors[0].dtype)
    kernel(*tensors, None, None, None, *numbers)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that makes the steps, inside a wrapper like accelerate's; raises TypeError where there is none."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return torch_optimizer(inner)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _check_not_negative(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0.0:  # also refuses NaN
            raise ValueError(f"{name} must be at least 0, got {value!r}")
