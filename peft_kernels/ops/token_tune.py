"""Gradients for selected tokens alone: rows put together again, and attention that keeps queries of selected ones.

Formulas, shapes and names are those of `peft_kernels/reference/token_tune.py`. Rows are moved by the operators of
`token_elimination`; attention is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference import token_tune as reference
from ._autocast import autocast_dtype
from ._checks import describe
from .token_elimination import _check_floating, _check_like, _check_rows, _kernel, _taken_apart


class MergeRowsFunction(torch.autograd.Function):
    """Forward and backward of `merge_rows`. Saved for backward: rows."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, selected: Tensor, others: Tensor, rows: Tensor, other_rows: Tensor, backend: str | None
    ):
        ctx.save_for_backward(rows)
        ctx.backend = backend
        return reference.merge_rows(selected, others, rows, other_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        (rows,) = ctx.saved_tensors
        return _taken(grad, rows, ctx.backend), None, None, None, None


class SelectedAttentionFunction(torch.autograd.Function):
    """Forward and backward of `selected_attention`.

    Saved for backward: q of selected tokens `[S, heads, D]`; k and v of all, `[M, key_value_heads, D]` each; rows; the
    mask, by reference. Backward computes the attention of the selected queries once more, so neither its output nor the
    sums of its rows are kept.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        other_q: Tensor,
        other_k: Tensor,
        other_v: Tensor,
        rows: Tensor,
        other_rows: Tensor,
        batch: int,
        mask: Tensor | None,
        scaling: float | None,
        backend: str | None,
    ):
        every_q, every_k, every_v = (
            reference.merge_rows(mine, others, rows, other_rows)
            for mine, others in ((q, other_q), (k, other_k), (v, other_v))
        )
        attended = _attended(every_q, every_k, every_v, batch, mask, scaling)
        ctx.save_for_backward(q, every_k, every_v, rows, mask)
        ctx.batch, ctx.scaling, ctx.backend = batch, scaling, backend
        others = _taken(attended, other_rows, backend)
        ctx.mark_non_differentiable(others)
        return _taken(attended, rows, backend), others

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _others: Tensor):  # type: ignore[no-untyped-def, override]
        *kept, rows, mask = ctx.saved_tensors
        leaves = [
            part.detach().requires_grad_(wanted) for part, wanted in zip(kept, ctx.needs_input_grad, strict=False)
        ]
        q, k, v = leaves
        visible = reference.visible_to(rows, ctx.batch, k.shape[0] // ctx.batch, mask)
        with torch.enable_grad():
            attended = _attended(q, k, v, ctx.batch, visible, ctx.scaling)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(attended, wanted, grad))
        grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
        for index in (1, 2):
            whole = grads[index]
            if whole is not None:
                grads[index] = _taken(whole, rows, ctx.backend)
        return (*grads, *[None] * 9)


def _attended(q: Tensor, k: Tensor, v: Tensor, batch: int, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of rows `[B * S, heads, D]` over rows `[B * T, key_value_heads, D]`, as rows `[B * S, heads * D]`."""
    q, k, v = (reference.heads_first(rows, batch) for rows in (q, k, v))
    return reference.tokens_first(reference.attention(q, k, v, mask, scaling))


def _taken(x: Tensor, rows: Tensor, backend: str | None) -> Tensor:
    """`x[rows]` of `[M, ...]`."""
    taken = _kernel("gather_rows", x, backend)(x.flatten(1), rows)
    return taken.view(-1, *x.shape[1:])  # type: ignore[no-any-return]


def _check_parts(
    op: str, names: tuple[str, str], selected: Tensor, others: Tensor, rows: Tensor, other_rows: Tensor
) -> None:
    """Checks rows of selected tokens and those of the others beside them."""
    for name, tensor, count in zip(names, (selected, others), (len(rows), len(other_rows)), strict=True):
        if tensor.shape[0] != count:
            raise ValueError(f"{op}: {name} must have a row for each of its {count} rows, got {describe(tensor)}")
    _check_like(op, names[1], others, names[0], selected)
    if others.shape[1:] != selected.shape[1:]:
        expected = ", ".join(map(str, (len(other_rows), *selected.shape[1:])))
        raise ValueError(f"{op}: {names[1]} must be like {names[0]}, [{expected}], got {describe(others)}")


def merge_rows(selected: Tensor, others: Tensor, rows: Tensor, other_rows: Tensor) -> Tensor:
    """Rows of selected tokens and of all others as one matrix again, with a gradient for the selected ones alone.

    Args:
        selected: `[S, ...]`; float32, bfloat16, float16 or float64.
        others: `[U, ...]`, in selected's dtype; they get no gradient.
        rows, other_rows: `[S]` and `[U]`, int32; together each of 0 to S + U - 1 once, which is trusted.

    Returns:
        `[S + U, ...]`, contiguous.

    Saved for backward: rows.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
    """
    op = "merge_rows"
    _check_floating(op, "selected", selected, 2)
    _check_floating(op, "others", others, 2)
    for name, indices in (("rows", rows), ("other_rows", other_rows)):
        _check_rows(op, indices, selected, name)
    _check_parts(op, ("selected", "others"), selected, others, rows, other_rows)
    if _taken_apart():
        return reference.merge_rows(selected, others, rows, other_rows)
    return MergeRowsFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        selected, others, rows, other_rows, backends.forced_backend()
    )


def selected_attention(
    selected: tuple[Tensor, Tensor, Tensor],
    others: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    other_rows: Tensor,
    batch: int,
    mask: Tensor | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens over all tokens, with gradients for selected ones alone.

    Forward is one attention of all queries. Selected queries see keys and values of all tokens; those of the others get
    no gradient, and neither does what comes out for the others give any.

    Args:
        selected: q `[S, heads, D]`, k and v `[S, key_value_heads, D]` of selected tokens, rotated; float32, bfloat16,
            float16 or float64.
        others: the same of all others, `[U, ...]`.
        rows, other_rows: `[S]` and `[U]`, int32, sorted: rows of `[B * T, ...]`, as many of each sequence in a list,
            and together each once, which is trusted.
        batch: B.
        mask: `[B or 1, heads or 1, T, T]`, bool or to be added; None for causal attention.
        scaling: of the products; None is `1 / sqrt(D)`.

    Returns:
        `[S, heads * D]` of selected tokens, `[U, heads * D]` of the others.

    Saved for backward: q of selected tokens, k and v of all, rows and, by reference, mask. Under `torch.compile`, which
    plans memory itself, all that torch's attention keeps.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
    """
    op = "selected_attention"
    for name, indices in (("rows", rows), ("other_rows", other_rows)):
        _check_rows(op, indices, selected[0], name)
    for name, mine, theirs in zip(("q", "k", "v"), selected, others, strict=True):
        _check_floating(op, name, mine, 3)
        _check_floating(op, f"other_{name}", theirs, 3)
        _check_parts(op, (name, f"other_{name}"), mine, theirs, rows, other_rows)
    heads, groups = selected[0].shape[1], selected[1].shape[1]
    if selected[2].shape[1] != groups or groups < 1 or heads % groups:
        raise ValueError(
            f"{op}: k and v must have the same number of heads, one that divides q's, {heads}, got "
            f"{describe(selected[1])} and {describe(selected[2])}"
        )
    if batch < 1 or rows.shape[0] % batch or other_rows.shape[0] % batch:
        raise ValueError(
            f"{op}: batch must divide the numbers of rows, {rows.shape[0]} and {other_rows.shape[0]}, got {batch}"
        )
    tokens = (rows.shape[0] + other_rows.shape[0]) // batch
    if mask is not None and (mask.dim() != 4 or mask.shape[2:] != (tokens, tokens)):
        raise ValueError(f"{op}: mask must be [B or 1, heads or 1, {tokens}, {tokens}], got {describe(mask)}")
    dtype = autocast_dtype(rows.device.type)
    tensors: Any = [tensor if dtype is None else tensor.to(dtype) for tensor in (*selected, *others)]
    if torch.compiler.is_compiling() or _taken_apart():
        return reference.selected_attention(*tensors, rows, other_rows, batch, mask, scaling)  # type: ignore[call-arg]
    return SelectedAttentionFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        *tensors, rows, other_rows, batch, mask, scaling, backends.forced_backend()
    )
