"""Pieces of a sparse delta for layers that compute with the weight in their own way, or order values in their own way.

`attach_delta` gives values their gradient behind any product with a weight that holds them; `reordered` brings values
into the order of sorted indices. Formulas and names are those of `peft_kernels/reference/sparse_delta.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference import sparse_delta as reference
from ..reference.lora import as_rows
from . import recompute
from ._autocast import autocast_dtype
from ._checks import dtype_and_shape, transforms_active
from .sparse_delta import Observer, _observe, _transposed


class AttachDeltaFunction(torch.autograd.Function):
    """`y` unchanged; backward adds the gradient of values.

    Saved for backward, all by reference: x (where it is on offer, what it is formed from, see `recompute`), values and
    indices.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, y: Tensor, x: Tensor, values: Tensor, indices: Tensor, observer: Observer | None, backend: str | None
    ) -> Tensor:
        inputs = recompute.to_save(ctx, x if ctx.needs_input_grad[2] else None)
        ctx.save_for_backward(values, indices, *inputs)
        ctx.observer, ctx.backend = observer, backend
        # Nobody else has y. Torch would forbid changes in place of a view that a Function returns.
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def, override]
        if autocast_dtype(grad_out.device.type) is not None:  # dtypes were settled in forward
            with torch.autocast(grad_out.device.type, enabled=False):
                return AttachDeltaFunction.backward(ctx, grad_out)
        values, indices, *inputs = ctx.saved_tensors  # which checkpointing lets out once
        x = recompute.saved(ctx, inputs, argument=1)
        if torch.is_grad_enabled():  # create_graph=True: the formulas in differentiable PyTorch
            return _differentiable_backward(ctx, (x, values, indices), grad_out)
        if not ctx.needs_input_grad[2]:
            return grad_out, None, None, None, None, None
        dy, rows = as_rows(grad_out), as_rows(x)
        sampled_product = backends.kernel("sampled_product", dy.device.type, dy.dtype, ctx.backend)
        grad_values = sampled_product(dy, rows, indices, values.dtype)
        _observe(ctx, dy, rows)
        return grad_out, None, grad_values, None, None, None


def _differentiable_backward(ctx, saved: tuple[Tensor, ...], grad_out: Tensor):  # type: ignore[no-untyped-def]
    """dx is zero here, and carries the derivative of dy weight to the values that weight holds."""
    x, values, indices = saved
    if x is None:
        return grad_out, None, None, None, None, None
    shape = torch.Size((grad_out.shape[-1], x.shape[-1]))
    dx = None
    if ctx.needs_input_grad[1]:
        nothing = grad_out.new_zeros((shape[1], shape[0]))
        dx = reference.sparse_delta_linear(grad_out, nothing, None, values, _transposed(indices, shape))
    grad_values = reference.sampled_product(as_rows(grad_out), as_rows(x), indices, values.dtype)
    _observe(ctx, as_rows(grad_out), as_rows(x))
    return grad_out, dx, grad_values, None, None, None


def attach_delta(y: Tensor, x: Tensor, values: Tensor, indices: Tensor, *, observer: Observer | None = None) -> Tensor:
    """`y`, bit for bit, made by a product `x weight^T` with values in weight, with gradient `(dy^T x)[indices]`.

    For layers that do more with weight than `sparse_delta_linear` does. What made y from x also gives x its gradient.

    Args:
        y: `[..., N]`, float32, bfloat16, float16 or float64.
        x: `[..., K]`, what was multiplied with weight, as many rows as y. Cast to y's dtype where it has another one
            (autocast), and that copy is what is saved.
        values: `[nnz]`, float32, bfloat16 or float16 (float64 if and only if y is), what was added to `weight [N, K]`.
        indices: `[nnz]`, int32 or int64 positions `n K + k`, sorted and unique. What `check_indices` checks is trusted.
        observer: called in backward with dy `[M, N]` and x `[M, K]`, while values get a gradient.

    Saved for backward: x, values and indices by reference. Nothing of size `[N, K]` is made, except by a second
    differentiation.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
        BackendUnavailable: inside `use_backend`, when that backend has no `sampled_product` for the call (in backward).
    """
    _check(y, x, values, indices)
    if x.dtype != y.dtype:
        x = recompute.cast(x, y.dtype)
    if torch.compiler.is_compiling():
        apply = AttachDeltaFunction.apply
    elif transforms_active():
        nothing = y.new_zeros((y.shape[-1], x.shape[-1]))
        return y + reference.sparse_delta_linear(x, nothing, None, values, indices)
    else:
        apply = _attach
    return apply(y, x, values, indices, observer, backends.forced_backend())  # type: ignore[no-any-return]


def _check(y: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> None:
    if y.dim() < 1 or x.dim() < 1 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"attach_delta: x must be [..., K] with y's rows, {list(y.shape[:-1])}, got {dtype_and_shape(x)}"
        )
    if not y.is_floating_point() or not x.is_floating_point():
        raise TypeError(
            f"attach_delta: y and x must be floating point, got {dtype_and_shape(y)} and {dtype_and_shape(x)}"
        )
    if not values.is_floating_point() or (values.dtype == torch.float64) != (y.dtype == torch.float64):
        raise TypeError(
            "attach_delta: values must be float32, bfloat16 or float16 (float64 if and only if y is), "
            f"got {dtype_and_shape(values)} with y {dtype_and_shape(y)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attach_delta: indices must be int32 or int64, got {dtype_and_shape(indices)}")
    if indices.dim() != 1 or values.shape != indices.shape:
        raise ValueError(
            "attach_delta: values and indices must be 1-D and of the same length, "
            f"got {dtype_and_shape(values)} and {dtype_and_shape(indices)}"
        )
    for name, tensor in (("x", x), ("values", values), ("indices", indices)):
        if tensor.device != y.device:
            raise ValueError(f"attach_delta: {name} must be on y's device, {y.device}, got {tensor.device}")


class ReorderFunction(torch.autograd.Function):
    """`values[order]`; backward gathers by the inverse permutation, so that no two gradients meet in one place."""

    @staticmethod
    def forward(ctx, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(order, inverse)
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        order, inverse = ctx.saved_tensors
        return ReorderFunction.apply(grad, inverse, order), None, None


def reordered(values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`values[order]`, a new tensor `[nnz]`; deterministic both ways, differentiable any number of times.

    Args:
        values: `[nnz]`.
        order: `[nnz]`, int32 or int64, a permutation.
        inverse: `[nnz]`, the inverse of `order`. That it is one is trusted.

    Saved for backward: order and inverse by reference.
    """
    if torch.compiler.is_compiling():
        return ReorderFunction.apply(values, order, inverse)  # type: ignore[no-any-return, no-untyped-call]
    if transforms_active():
        return values.index_select(0, order)
    return _reorder(values, order, inverse)  # type: ignore[no-any-return]


# The base class's apply spares a small layer the price of Function.apply, as for sparse_delta_linear.
_attach = super(torch.autograd.Function, AttachDeltaFunction).apply
_reorder = super(torch.autograd.Function, ReorderFunction).apply
