"""A linear layer of the kept tokens between a gather and a scatter: `y = residual`, `y[rows] += x[rows] W^T + bias`.

Formulas, shapes and names are those of `peft_kernels/reference/token_elimination.py`, which the operator
`gather_linear_scatter` is registered with in `token_elimination.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference import token_elimination as reference
from ..reference.lora import as_rows
from . import recompute
from ._autocast import autocast_dtype
from ._checks import describe
from ._views import no_view
from .token_elimination import (
    _check_floating,
    _check_like,
    _check_owned,
    _check_rows,
    _kernel,
    _taken_apart,
    gather_rows,
    scatter_add_rows,
)


class GatherLinearScatterFunction(torch.autograd.Function):
    """Forward and backward of `gather_linear_scatter`.

    Saved for backward: rows, weight by reference, and where gradients are recorded and weight trains the kept rows of x
    `[S, K]` (x itself, by reference, where it holds them already; where it is on offer, what it is formed from, see
    `recompute`).
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        residual: Tensor | None,  # the first, as autograd expects of what is changed in place where that is a view
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        onto_x: bool,
        gathered: bool,
        in_place: bool,
        recording: bool,  # whether gradients are: needs_input_grad says under no_grad, too, what requires one
        backend: str | None,
    ) -> Tensor:
        matrix = inputs = as_rows(x)
        kept: tuple[Tensor | None, ...] = (None,)
        ctx.recipe, gather = None, not gathered
        if recording and ctx.needs_input_grad[2]:
            if gather:  # the product takes the rows from here, too
                inputs, gather = _kernel("gather_rows", x, backend)(matrix, rows), False
                kept = (inputs,)
            else:
                kept = recompute.to_save(ctx, x)
        ctx.save_for_backward(weight, rows, *kept)
        ctx.shape, ctx.onto_x, ctx.scattered = x.shape, onto_x, onto_x or residual is not None
        ctx.gathered, ctx.backend = gathered, backend
        if in_place:
            assert residual is not None  # checked before
            ctx.mark_dirty(residual)
            product = _kernel("gather_linear_scatter_", x, backend)
            product(as_rows(residual), inputs, weight, bias, rows, gather, False)
            return residual
        onto = matrix if onto_x else None if residual is None else as_rows(residual)
        y = _kernel("gather_linear_scatter", x, backend)(inputs, weight, bias, rows, onto, gather, False)
        return no_view(y, x.shape if onto_x else y.shape if residual is None else residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        if autocast_dtype(grad.device.type) is not None:  # dtypes were settled in forward
            with torch.autocast(grad.device.type, enabled=False):
                return GatherLinearScatterFunction.backward(ctx, grad)
        weight, rows, *kept = ctx.saved_tensors
        need_residual, need_x, need_weight, need_bias = ctx.needs_input_grad[:4]
        dy = as_rows(grad)
        dx = grad_weight = grad_bias = None
        if need_x:
            dx = _grad_x(ctx, dy, weight, rows)
        if need_weight or need_bias:
            kept_dy = _kept_gradient(ctx, dy, rows)
            if need_weight:
                grad_weight = kept_dy.t() @ as_rows(recompute.saved(ctx, kept))
            if need_bias:
                grad_bias = kept_dy.sum(0)
        return grad if need_residual else None, dx, grad_weight, grad_bias, None, None, None, None, None, None


def _grad_x(ctx, dy: Tensor, weight: Tensor, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """`dy[rows] W`: where x was, added at rows of dy itself where x was the residual, else of zeros."""
    product = _kernel("gather_linear_scatter", dy, ctx.backend)
    dx = product(dy, weight, None, rows, dy if ctx.onto_x else None, ctx.scattered, True)
    if ctx.onto_x or ctx.gathered:
        return no_view(dx, ctx.shape)
    scattered = dy.new_zeros(ctx.shape)
    _kernel("scatter_add_rows_", dy, ctx.backend)(as_rows(scattered), dx, rows)
    return scattered


def _kept_gradient(ctx, dy: Tensor, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """`dy[rows] [S, N]`, with zeros where there is no row."""
    if ctx.scattered:
        return _kernel("gather_rows", dy, ctx.backend)(dy, rows)  # type: ignore[no-any-return]
    return torch.where((rows >= 0)[:, None], dy, torch.zeros((), dtype=dy.dtype, device=dy.device))


def _check_dtype(name: str, tensor: Tensor, x: Tensor, cast: bool) -> None:
    """Whether tensor can be used beside x; of a tensor that is cast any floating dtype will do."""
    op = "gather_linear_scatter"
    _check_floating(op, name, tensor, 1)
    if not cast:
        _check_like(op, name, tensor, "x", x)
    elif tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device, {x.device}, got {describe(tensor)}")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    residual: Tensor | None,
    gathered: bool,
    in_place: bool,
    autocast: bool,
) -> None:
    op = "gather_linear_scatter"
    _check_floating(op, "x", x, 2)
    _check_rows(op, rows, x, "indices")
    cast = autocast and x.dtype != torch.float64
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must be [N, {x.shape[-1]}] to match x, got {describe(weight)}")
    _check_dtype("weight", weight, x, cast)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be [{weight.shape[0]}] to match weight, got {describe(bias)}")
        _check_dtype("bias", bias, x, cast)
    count = as_rows(x).shape[0]
    if gathered and count != rows.shape[0]:
        raise ValueError(f"{op}: x must have a row for each of indices {list(rows.shape)}, got {describe(x)}")
    if residual is None:
        if in_place:
            raise ValueError(f"{op}: residual must be given to be changed in place, got None")
        return
    _check_floating(op, "residual", residual, 2)
    _check_dtype("residual", residual, x, autocast)
    expected = residual.shape[:-1] if gathered else x.shape[:-1]
    if residual.shape != (*expected, weight.shape[0]):
        raise ValueError(
            f"{op}: residual must be {[*expected, weight.shape[0]]} to match x and weight, got {describe(residual)}"
        )
    if in_place:
        _check_owned(op, residual, x, weight, *([] if bias is None else [bias]))


def gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    residual: Tensor | None = None,
    *,
    gathered: bool = False,
    in_place: bool = False,
) -> Tensor:
    """residual with `x[indices] weight^T + bias` added at the rows of the kept tokens.

    Where x is the residual (the same tensor), its gradient is formed by the same operator: `dy[indices] weight` is
    added at rows of dy.

    For a plain weight. A layer with an adapter takes the kept rows from `split_rms_norm` or `gather_rows` and adds what
    it makes of them by `scatter_add_rows`, as the layers of `nn.TokenElimination` do; none of them calls this.

    Args:
        x: `[..., K]`, seen as M rows, float32, bfloat16, float16 or float64; any strides. With `gathered`, `[..., K]`
            of S rows, those of the kept tokens already.
        weight: `[N, K]` in x's dtype. Usually frozen; gets a gradient, from the kept rows, if it asks for one.
        bias: `[N]` in x's dtype, or None.
        indices: `[S]`, int32 rows, sorted and unique; a negative entry stands for no row. That they are in range is
            trusted.
        residual: `[..., N]` in x's dtype, with x's leading dimensions (any that make M rows, with `gathered`); None
            asks for the product alone.
        gathered: x holds the kept rows, as `gather_rows` returns them.
        in_place: changes residual itself and returns it, so that dropped rows are neither read nor written; only for a
            contiguous one that nobody else keeps, that shares no memory with x, weight and bias and, where gradients
            are recorded, is no leaf that gets one. Under `torch.compile`, which plans memory itself, this does nothing.

    Returns:
        residual's shape, or `[S, N]` without residual, zero where there is no row; in x's dtype, a new tensor unless
        in place. Rows that are not kept are residual's bit for bit. Under autocast the kept rows of x, weight and bias
        are cast to the autocast dtype first, from any of the four, and the product is added in residual's, which may
        be another one; float64 x is not cast.

    Saved for backward: indices, weight by reference, and only where weight gets a gradient the kept rows of x.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off, or residual cannot be changed in place;
            nothing has run.
        RuntimeError: residual is to be changed in place and shares memory with what the kernel reads, which is x, or
            its kept rows where those are copied first; it has not changed.
        BackendUnavailable: inside `use_backend`, when that backend has no kernel for the call.

    Source: Wang et al., "LeMo", 2025 (JENGA, USENIX ATC 2025), section 5.1, "permutation-free".
    """
    if in_place and residual is x:
        raise ValueError(
            "gather_linear_scatter: residual must not be x to be changed in place, as the product reads x meanwhile"
        )
    dtype = autocast_dtype(x.device.type)
    _check(x, weight, bias, indices, residual, gathered, in_place, dtype is not None)
    if dtype is None:
        return _checked(x, weight, bias, indices, residual, gathered, in_place)
    with torch.autocast(x.device.type, enabled=False):
        return _under_autocast(dtype, x, weight, bias, indices, residual, gathered, in_place)


def _under_autocast(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    residual: Tensor | None,
    gathered: bool,
    in_place: bool,
) -> Tensor:
    if x.dtype != torch.float64:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if gathered:
            x = recompute.cast(x, dtype)
        elif x.dtype != dtype:  # only the kept rows are worth a cast
            x, gathered = gather_rows(x, indices).to(dtype), True
    if residual is None or residual.dtype == x.dtype:
        return _checked(x, weight, bias, indices, residual, gathered, in_place)
    y = _checked(x, weight, bias, indices, None, gathered, False)
    return scatter_add_rows(residual, y.to(residual.dtype), indices, in_place=in_place)


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    residual: Tensor | None,
    gathered: bool,
    in_place: bool,
) -> Tensor:
    """`gather_linear_scatter` of arguments that were checked, without autocast."""
    if _taken_apart():
        onto = None if residual is None else as_rows(residual)
        y = reference.gather_linear_scatter(as_rows(x), weight, bias, indices, onto, not gathered, False)
        return y if residual is None else y.view(residual.shape)
    onto_x = residual is x and not gathered
    in_place = in_place and not torch.compiler.is_compiling()
    onto = None if onto_x else residual
    recording = torch.is_grad_enabled()  # which a Function's own forward cannot tell
    return GatherLinearScatterFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        onto, x, weight, bias, indices, onto_x, gathered, in_place, recording, backends.forced_backend()
    )
