"""Rows of kept tokens: gathered, normalized, rotated, and added back; each with its gradient.

Formulas, shapes and names are those of `peft_kernels/reference/token_elimination.py`. This file holds the checks, the
fake kernels, the autograd Functions and the registration; no arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta as _CreationMeta
from torch._C._autograd import _get_creation_meta as _creation_of
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference import token_elimination as reference
from ..reference.lora import accumulation_dtype, as_rows
from ._checks import FLOATING, describe, transforms_active
from ._register import fake_in_place, register_operator, triton_launchers
from ._views import no_view


def _fake_gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[1])


def _fake_scatter_add_rows(residual: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def _fake_gather_rms_norm(
    x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.shape[0] if rows is None else rows.shape[0]
    rstd = x.new_empty(count, dtype=accumulation_dtype(x.dtype))
    return x.new_empty(count, x.shape[1]), x.new_empty(0 if rows is None else count, x.shape[1]), rstd


def _fake_rms_norm_rows(kept: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    return kept.new_empty(kept.shape)


def _fake_gather_rms_norm_backward(
    grad_residual: Tensor | None,
    grad_h: Tensor,
    kept: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
    rows: Tensor | None,
    total: int,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return kept.new_empty(total, kept.shape[1]), weight.new_empty(weight.shape[0] if weight_grad else 0)


def _fake_rope_rows(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    residual: Tensor | None,
    gather: bool,
    transposed: bool,
) -> Tensor:
    return x.new_empty(rows.shape[0] if residual is None else residual.shape[0], weight.shape[1 if transposed else 0])


def _register() -> None:
    triton = triton_launchers("token_elimination")
    for name, definition, fake, cuda in (
        ("gather_rows", reference.gather_rows, _fake_gather_rows, True),
        ("scatter_add_rows", reference.scatter_add_rows, _fake_scatter_add_rows, True),
        ("scatter_add_rows_", reference.scatter_add_rows_, fake_in_place, True),
        ("gather_rms_norm", reference.gather_rms_norm, _fake_gather_rms_norm, True),
        ("rms_norm_rows", reference.rms_norm_rows, _fake_rms_norm_rows, True),
        ("gather_rms_norm_backward", reference.gather_rms_norm_backward, _fake_gather_rms_norm_backward, True),
        ("rope_rows", reference.rope_rows, _fake_rope_rows, True),
        ("gather_linear_scatter", reference.gather_linear_scatter, _fake_gather_linear_scatter, False),  # Triton's
        ("gather_linear_scatter_", reference.gather_linear_scatter_, fake_in_place, False),
    ):
        register_operator(name, reference=definition, fake=fake, cuda=cuda, triton=triton)


_register()


def _kernel(name: str, tensor: Tensor, backend: str | None) -> Any:
    return backends.kernel(name, tensor.device.type, tensor.dtype, backend)


class GatherRowsFunction(torch.autograd.Function):
    """Forward and backward of `gather_rows`. Saved for backward: rows."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, backend: str | None):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(rows)
        ctx.shape, ctx.backend = x.shape, backend
        return _kernel("gather_rows", x, backend)(as_rows(x), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        (rows,) = ctx.saved_tensors
        dx = grad.new_zeros(ctx.shape)
        _kernel("scatter_add_rows_", grad, ctx.backend)(as_rows(dx), grad, rows)
        return dx, None, None


class ScatterAddRowsFunction(torch.autograd.Function):
    """Forward and backward of `scatter_add_rows`. Saved for backward: rows."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, residual: Tensor, values: Tensor, rows: Tensor, in_place: bool, backend: str | None
    ):
        ctx.save_for_backward(rows)
        ctx.shape, ctx.backend = values.shape, backend
        if in_place:
            ctx.mark_dirty(residual)
            _kernel("scatter_add_rows_", residual, backend)(as_rows(residual), as_rows(values), rows)
            return residual
        y = _kernel("scatter_add_rows", residual, backend)(as_rows(residual), as_rows(values), rows)
        return no_view(y, residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        (rows,) = ctx.saved_tensors
        grad_values = None
        if ctx.needs_input_grad[1]:
            grad_values = _kernel("gather_rows", grad, ctx.backend)(as_rows(grad), rows)
            grad_values = no_view(grad_values, ctx.shape)
        return grad, grad_values, None, None, None


class SplitRMSNormFunction(torch.autograd.Function):
    """Forward and backward of `split_rms_norm`.

    Saved for backward: kept `[S, H]` (x itself, by reference, where all rows are taken), rstd `[S]`, weight and rows.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        x: Tensor,
        rows: Tensor | None,
        weight: Tensor,
        eps: float,
        offset: float,
        owned: bool,
        backend: str | None,
    ):
        matrix = as_rows(x)
        h, kept, rstd = _kernel("gather_rms_norm", x, backend)(matrix, rows, weight, eps, offset)
        ctx.save_for_backward(x if rows is None else kept, rstd, weight, rows)
        ctx.shape, ctx.offset, ctx.backend = x.shape, offset, backend
        if rows is None:
            kept = x.detach()  # what is x itself would get its gradient
        ctx.mark_non_differentiable(kept, rstd)
        if not torch.compiler.is_compiling():  # there zeros stand for what gets no gradient
            ctx.set_materialize_grads(False)
        if owned:  # of a view, one of several results, torch would forbid changes in place
            ctx.mark_dirty(x)
        return x if owned else x.view_as(x), h, kept, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_residual, grad_h, _kept, _rstd):  # type: ignore[no-untyped-def, override]
        kept, rstd, weight, rows = ctx.saved_tensors
        if grad_h is None:
            return grad_residual, None, None, None, None, None, None
        residual, total = None if grad_residual is None else as_rows(grad_residual), ctx.shape[:-1].numel()
        dx, dweight = _kernel("gather_rms_norm_backward", grad_h, ctx.backend)(
            residual, grad_h, as_rows(kept), rstd, weight, ctx.offset, rows, total, ctx.needs_input_grad[2]
        )
        return no_view(dx, ctx.shape), None, dweight if ctx.needs_input_grad[2] else None, None, None, None, None


def _taken_apart() -> bool:
    """Whether a `torch.func` transform needs the reference; `torch.compile` would put the question into its graph."""
    return not torch.compiler.is_compiling() and transforms_active()


class RopeRowsFunction(torch.autograd.Function):
    """Forward and backward of `rope_rows`. Saved for backward: cos, sin and rows, by reference."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, backend: str | None):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(cos, sin, rows)
        ctx.backend = backend
        return _kernel("rope_rows", x, backend)(x, cos, sin, rows, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        cos, sin, rows = ctx.saved_tensors
        return _kernel("rope_rows", grad, ctx.backend)(grad, cos, sin, rows, True), None, None, None, None


def _check_rows(op: str, rows: Tensor, like: Tensor, name: str = "rows") -> None:
    if rows.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32, got {describe(rows)}")
    if rows.dim() != 1:
        raise ValueError(f"{op}: {name} must be 1-D, got {describe(rows)}")
    if rows.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the other arguments, got {describe(rows)}")


def _check_floating(op: str, name: str, tensor: Tensor, dimensions: int) -> None:
    if tensor.dim() < dimensions:
        raise ValueError(f"{op}: {name} must have at least {dimensions} dimensions, got {describe(tensor)}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {describe(tensor)}")


def _check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have {like_name}'s dtype, {like.dtype}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like_name}'s device, {like.device}, got {describe(tensor)}")


def _check_changeable(op: str, name: str, tensor: Tensor, *others: Tensor) -> None:
    """Refuses what autograd lets nobody change, which it would say only when the kernel has changed it."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{op}: {name} must not be an inference tensor to be changed in place, got one")
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (tensor, *others)):
        return
    for owner in (tensor, tensor._base):
        if owner is not None and owner.is_leaf and owner.requires_grad:
            raise ValueError(
                f"{op}: {name} must be neither a leaf that requires grad nor a view of one to be changed in place, got "
                f"{describe(tensor)}"
            )
    if tensor._is_view() and _creation_of(tensor) != _CreationMeta.DEFAULT:
        raise ValueError(
            f"{op}: {name} must be no view made under no_grad, by a Function or beside others to be changed in place, "
            f"got {describe(tensor)}"
        )


def _check_owned(op: str, residual: Tensor, *others: Tensor) -> None:
    """Refuses a residual that cannot be changed in place, where it would be."""
    if not residual.is_contiguous():
        raise ValueError(f"{op}: residual must be contiguous to be changed in place, got {describe(residual)}")
    if not torch.compiler.is_compiling() and not _taken_apart():
        _check_changeable(op, "residual", residual, *others)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, with a gradient that needs neither atomics nor x.

    Args:
        x: `[..., C]`, seen as M rows; float32, bfloat16, float16 or float64; any strides.
        rows: `[S]`, int32, sorted and unique; a negative entry stands for no row and gives zeros. That they are in
            range is trusted.

    Returns:
        `[S, C]`, contiguous.

    Saved for backward: rows.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
    """
    _check_floating("gather_rows", "x", x, 2)
    _check_rows("gather_rows", rows, x)
    if _taken_apart():
        return reference.gather_rows(as_rows(x), rows)
    return GatherRowsFunction.apply(x, rows, backends.forced_backend())  # type: ignore[no-any-return, no-untyped-call]


def scatter_add_rows(residual: Tensor, values: Tensor, rows: Tensor, in_place: bool = False) -> Tensor:
    """residual with values added at rows; other rows are copied bit for bit.

    Args:
        residual: `[..., C]`, seen as M rows; float32, bfloat16, float16 or float64.
        values: `[..., C]`, seen as S rows, in residual's dtype; in memory of its own where residual is changed.
        rows: `[S]`, int32, sorted and unique; a negative entry stands for no row and is passed over. That they are in
            range is trusted.
        in_place: changes residual itself and returns it; only for a contiguous one that nobody else keeps and that
            autograd lets be changed, so no leaf that requires grad. It allows a change and promises none: use the
            result. Under `torch.compile`, which plans memory itself, and inside `torch.func` transforms residual stays
            as it is.

    Returns:
        `[..., C]` in residual's dtype; sums are rounded once.

    Saved for backward: rows. The gradient of residual is that of the result, untouched.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off, or residual cannot be changed in place;
            nothing has run.
        RuntimeError: values share memory with the residual to be changed; nothing has run.
    """
    op = "scatter_add_rows"
    _check_floating(op, "residual", residual, 2)
    _check_floating(op, "values", values, 2)
    _check_like(op, "values", values, "residual", residual)
    _check_rows(op, rows, residual)
    if values.shape[-1] != residual.shape[-1] or as_rows(values).shape[0] != rows.shape[0]:
        raise ValueError(
            f"{op}: values must be [..., {residual.shape[-1]}] with a row for each of rows {list(rows.shape)}, got "
            f"{describe(values)}"
        )
    if in_place:
        _check_owned(op, residual, values)
    if _taken_apart():
        return reference.scatter_add_rows(as_rows(residual), as_rows(values), rows).view(residual.shape)
    in_place = in_place and not torch.compiler.is_compiling()
    return ScatterAddRowsFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        residual, values, rows, in_place, backends.forced_backend()
    )


def split_rms_norm(
    x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0, owned: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """x for the residual, and the normalized kept rows for the block beside it: one gradient for both.

    Where x splits into the residual and a block, autograd would make a gradient of x's size for each and add them.
    Here backward adds the block's at rows of the residual's, in one pass.

    Args:
        x: `[..., H]`, seen as M rows; float32, bfloat16, float16 or float64.
        rows: `[S]`, int32, as for `gather_rows`; None takes all rows.
        weight: `[H]`, of the norm, in any floating dtype.
        eps: added to the mean of squares.
        offset: 1 for norms whose weight is the difference from one, else 0.
        owned: x is the caller's own and no leaf, so that `scatter_add_rows(..., in_place=True)` may change the
            residual; only with rows. Under `torch.compile` and inside `torch.func` transforms this does nothing.

    Returns:
        x itself for the residual (a view, which must be used in its place); h `[S, H]` in x's dtype; and what h can be
        formed from again, kept `[S, H]` and rstd `[S]`, see `reference.rms_norm_rows`. These two carry no gradient.

    Saved for backward: kept, rstd, weight and rows; h is not.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
    """
    op = "split_rms_norm"
    _check_floating(op, "x", x, 2)
    if weight.shape != x.shape[-1:] or weight.dtype not in FLOATING or weight.device != x.device:
        raise ValueError(f"{op}: weight must be [{x.shape[-1]}], floating, on {x.device}, got {describe(weight)}")
    if rows is not None:
        _check_rows(op, rows, x)
    elif owned:
        raise ValueError(f"{op}: owned needs rows: x itself is kept for backward without them")
    if _taken_apart():
        h, kept, rstd = reference.gather_rms_norm(as_rows(x), rows, weight, eps, offset)
        return x, h, ((as_rows(x) if rows is None else kept).detach(), rstd.detach())
    owned = owned and not torch.compiler.is_compiling()
    if owned:
        _check_changeable(op, "x", x, weight)
    residual, h, kept, rstd = SplitRMSNormFunction.apply(  # type: ignore[no-untyped-call]
        x, rows, weight, eps, offset, owned, backends.forced_backend()
    )
    return residual, h, (as_rows(kept), rstd)


def rope_rows(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None) -> Tensor:
    """Rotary embedding of the heads of some tokens, at the positions they have in the whole sequence.

    Args:
        x: `[S, heads, D]`; float32, bfloat16, float16 or float64; any strides.
        cos, sin: `[P, R]` with R even and at most D, in any floating dtype; they get no gradient.
        rows: `[S]`, int32, which row of cos and sin each token takes, in any order; a negative one gives zeros; None
            takes them one by one.

    Returns:
        `[S, heads, D]` in x's dtype, contiguous.

    Saved for backward: cos, sin and rows, by reference.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
    """
    op = "rope_rows"
    _check_floating(op, "x", x, 3)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [S, heads, D], got {describe(x)}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check_floating(op, name, tensor, 2)
        if tensor.dim() != 2 or tensor.shape[1] % 2 or tensor.shape[1] > x.shape[2] or tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be [P, R] with R even and at most {x.shape[2]} on {x.device}, got "
                f"{describe(tensor)}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"{op}: sin must be like cos, {describe(cos)}, got {describe(sin)}")
    count = cos.shape[0] if rows is None else rows.shape[0]
    if rows is not None:
        _check_rows(op, rows, x)
    if count != x.shape[0]:
        raise ValueError(
            f"{op}: x must have {count} tokens like {'cos' if rows is None else 'rows'}, got {describe(x)}"
        )
    if _taken_apart():
        return reference.rope_rows(x, cos, sin, rows, False)
    return RopeRowsFunction.apply(x, cos, sin, rows, backends.forced_backend())  # type: ignore[no-any-return, no-untyped-call]
