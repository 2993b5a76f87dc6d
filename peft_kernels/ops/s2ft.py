"""A linear layer of which some channels train: `y = x weight^T + bias`, with a gradient for a slice of weight alone.

Formulas, shapes and names are those of `peft_kernels/reference/s2ft.py`. This file holds the checks, the fake kernels,
the autograd Function and the registration; no arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..reference import s2ft as reference
from ..reference.lora import as_rows
from . import recompute
from ._autocast import autocast_dtype
from ._checks import FLOATING, check_sorted, describe, transforms_active
from ._register import fake_in_place, register_operator, triton_launchers
from ._views import no_view

DIMS = {"output": 0, "input": 1}
"""Whose channels train to the dimension of weight `[N, K]` that they are counted along."""


def check_channels(indices: Tensor, channels: int) -> None:
    """Raises unless `indices` are some of `channels` channels: sorted, unique and in range.

    The operators trust in this, so it is checked once, where indices are installed; a pass over them, and on a GPU a
    wait for it.

    Args:
        indices: `[s]`, int64, contiguous.
        channels: how many there are, K for `dim="input"` and N for `dim="output"`.

    Raises:
        TypeError: the dtype is another one.
        ValueError: anything else; the message names the first entry that is wrong.
    """
    check_sorted(indices, channels, (torch.int64,), "there are channels")


def _fake_gather_columns(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], indices.shape[0])


def _fake_slice_grad(grad_out: Tensor, x: Tensor, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = grad_out.shape[1] if indices is None else indices.shape[0]
    return x.new_empty(rows, x.shape[1], dtype=dtype)


def _fake_swiglu(gate: Tensor, up: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], indices.shape[0])


def _fake_swiglu_backward(grad_h: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _register() -> None:
    triton = triton_launchers("s2ft")
    for name, definition, fake, cuda in (
        ("gather_columns", reference.gather_columns, _fake_gather_columns, True),
        ("slice_grad", reference.slice_grad, _fake_slice_grad, False),  # a product: Triton's
        ("slice_write_", reference.slice_write_, fake_in_place, True),
        ("slice_exchange_", reference.slice_exchange_, fake_in_place, True),
        ("slice_adamw_", reference.slice_adamw_, fake_in_place, True),
        ("swiglu", reference.swiglu, _fake_swiglu, True),
        ("swiglu_backward", reference.swiglu_backward, _fake_swiglu_backward, True),
    ):
        register_operator(name, reference=definition, fake=fake, cuda=cuda, triton=triton)


_register()


class S2FTLinearFunction(torch.autograd.Function):
    """Forward and backward of `s2ft_linear`; the products with weight are the library's.

    Saved for backward: at dim 1 `x[:, indices]` in memory of its own, at dim 0 x, either only while trainable trains;
    x also while weight does; in place of x, where it is on offer, what it is formed from, see `recompute`; weight,
    trainable and indices by reference.

    Over a transposed weight, x and dy change places in the gradient of the slice, which comes as the slice lies.

    The columns that forward has gathered are a second output, which nobody uses but a second derivative: by it these
    columns, which backward multiplies with, are a function of x.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trainable: Tensor,
        indices: Tensor,
        x_slice: Tensor | None,
        dim: int,
        rewrite: bool,
        transposed: bool,
        backend: str | None,
    ):
        need_weight, need_trainable = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        gathered = None
        if dim == 0 or not need_trainable:
            x_slice = None
        elif x_slice is None:
            gather_columns = backends.kernel("gather_columns", x.device.type, x.dtype, backend)
            x_slice = gathered = gather_columns(as_rows(x), indices)
        keep_x = need_weight or (need_trainable and dim == 0)
        inputs = recompute.to_save(ctx, x if keep_x else None)
        ctx.save_for_backward(x_slice, weight, trainable, indices, *inputs)
        ctx.shape, ctx.device_type = x.shape, x.device.type
        ctx.dim, ctx.rewrite, ctx.transposed, ctx.backend = dim, rewrite, transposed, backend
        y = no_view(F.linear(x, weight.t() if transposed else weight, bias))
        if torch.compiler.is_compiling():  # where there are no second derivatives
            return y
        ctx.set_materialize_grads(False)
        return y, gathered

    @staticmethod
    def backward(ctx, grad_out, grad_gathered=None):  # type: ignore[no-untyped-def, override]
        if autocast_dtype(ctx.device_type) is not None:  # dtypes were settled in forward
            with torch.autocast(ctx.device_type, enabled=False):
                return S2FTLinearFunction.backward(ctx, grad_out, grad_gathered)
        x_slice, weight, trainable, indices, *inputs = ctx.saved_tensors  # which checkpointing lets out once
        if ctx.rewrite:
            write = backends.kernel("slice_write_", ctx.device_type, weight.dtype, ctx.backend)
            write(weight.detach(), indices, trainable.detach(), 1 - ctx.dim if ctx.transposed else ctx.dim)
        x = recompute.saved(ctx, inputs)
        if grad_gathered is not None or grad_out is None or torch.is_grad_enabled():
            saved = x, x_slice, weight, trainable, indices
            return _differentiable_backward(ctx, saved, grad_out, grad_gathered)
        need_x, need_weight, need_bias, need_trainable = ctx.needs_input_grad[:4]
        dy = as_rows(grad_out)
        dx = grad_weight = grad_bias = grad_trainable = None
        if need_x:
            dx = grad_out @ (weight.t() if ctx.transposed else weight)
        if need_trainable:
            kept = as_rows(x if ctx.dim == 0 else x_slice)
            grad_trainable = _slice_grad(ctx, dy, kept, indices, trainable.dtype)
        if need_weight:
            grad_weight = as_rows(x).t() @ dy if ctx.transposed else dy.t() @ as_rows(x)
        if need_bias:
            grad_bias = dy.sum(0)
        return dx, grad_weight, grad_bias, grad_trainable, *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 6  # for what follows trainable in the arguments of forward


def _slice_grad(ctx, dy: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
    """The gradient of trainable, as it lies: x is what was kept, its columns at dim 1."""
    slice_grad = backends.kernel("slice_grad", ctx.device_type, dy.dtype, ctx.backend)
    if not ctx.transposed:
        return slice_grad(dy, x, indices if ctx.dim == 0 else None, dtype)  # type: ignore[no-any-return]
    if ctx.dim == 0:
        dy = backends.kernel("gather_columns", ctx.device_type, dy.dtype, ctx.backend)(dy, indices)
    return slice_grad(x, dy, None, dtype)  # type: ignore[no-any-return]


def _differentiable_backward(  # type: ignore[no-untyped-def]
    ctx, saved: tuple[Tensor, ...], grad_out: Tensor | None, grad_gathered: Tensor | None
):
    """The gradients of the reference, so that they can be differentiated again (create_graph=True)."""
    x, x_slice, weight, trainable, indices = saved
    if ctx.transposed:
        weight, trainable = weight.t(), trainable.t()
    need_x, need_weight, need_bias, need_trainable = ctx.needs_input_grad[:4]
    dx = grad_weight = grad_bias = grad_trainable = None
    if grad_out is not None:
        dy = as_rows(grad_out)
        if need_x:
            dx = reference.s2ft_linear(grad_out, weight.t(), None, trainable.t(), indices, 1 - ctx.dim)
        if need_bias:
            grad_bias = dy.sum(0)
        if need_weight:
            grad_weight = dy.t() @ as_rows(x)
        if need_trainable:
            rows, channels = (as_rows(x), indices) if ctx.dim == 0 else (as_rows(x_slice), None)
            grad_trainable = reference.slice_grad(dy, rows, channels, trainable.dtype)
    if ctx.transposed:
        grad_weight, grad_trainable = (None if grad is None else grad.t() for grad in (grad_weight, grad_trainable))
    if need_x and grad_gathered is not None:
        columns = grad_gathered.new_zeros((grad_gathered.shape[0], ctx.shape[-1])).index_add(1, indices, grad_gathered)
        dx = columns.view(ctx.shape) if dx is None else dx + columns.view(ctx.shape)
    return dx, grad_weight, grad_bias, grad_trainable, *_NO_GRADIENTS


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trainable: Tensor,
    indices: Tensor,
    x_slice: Tensor | None,
    dim: str,
    transposed: bool,
) -> None:
    """Raises before anything runs; every message names the argument, what was expected and what came."""
    if dim not in DIMS:
        raise ValueError(f"s2ft_linear: dim must be 'input' or 'output', got {dim!r}")
    if weight.dim() != 2:
        sizes = "[in_features, out_features]" if transposed else "[out_features, in_features]"
        raise ValueError(f"s2ft_linear: weight must be 2-D {sizes}, got {describe(weight)}")
    out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"s2ft_linear: x must be [..., {in_features}] to match weight, got {describe(x)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"s2ft_linear: x must be float32, bfloat16, float16 or float64, got {describe(x)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"s2ft_linear: bias must be [{out_features}], got {describe(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("x_slice", x_slice)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"s2ft_linear: {name} must have x's dtype, {x.dtype}, got {describe(tensor)}")
    if indices.dtype != torch.int64:
        raise TypeError(f"s2ft_linear: indices must be int64, got {describe(indices)}")
    if indices.dim() != 1:
        raise ValueError(f"s2ft_linear: indices must be 1-D, got {describe(indices)}")
    count = indices.shape[0]
    shape = (count, in_features) if dim == "output" else (out_features, count)
    if transposed:
        shape = shape[::-1]
    if trainable.shape != shape:
        raise ValueError(
            f"s2ft_linear: trainable must be {list(shape)}, the slice of weight at indices along its {dim}, "
            f"got {describe(trainable)}"
        )
    if trainable.dtype not in FLOATING or (trainable.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            "s2ft_linear: trainable must be float32, bfloat16 or float16 (float64 if and only if x is), "
            f"got {describe(trainable)} with x {describe(x)}"
        )
    if x_slice is not None and dim != "input":
        raise ValueError(f"s2ft_linear: x_slice goes with dim 'input', got {describe(x_slice)} with dim {dim!r}")
    if x_slice is not None and x_slice.shape != (*x.shape[:-1], count):
        raise ValueError(
            f"s2ft_linear: x_slice must be {[*x.shape[:-1], count]}, x at indices, got {describe(x_slice)}"
        )
    others = {"weight": weight, "bias": bias, "trainable": trainable, "indices": indices, "x_slice": x_slice}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"s2ft_linear: {name} must be on x's device, {x.device}, got {describe(tensor)}")


# The base class's apply spares a small layer the price of Function.apply, as for sparse_delta_linear.
_apply = super(torch.autograd.Function, S2FTLinearFunction).apply


def s2ft_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trainable: Tensor,
    indices: Tensor,
    dim: str,
    *,
    x_slice: Tensor | None = None,
    rewrite: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`x weight^T + bias`, where `weight` holds trainable at `indices`; trainable gets that slice of weight's gradient.

    Forward and dx cost what they cost in a frozen linear layer, the gradient of trainable a share s / K or s / N of
    weight's. Whoever changes trainable writes it into weight with `slice_write_` before the next call.

    Args:
        x: `[..., K]`, float32, bfloat16, float16 or float64; any strides, zero rows allowed.
        weight: `[N, K]` in x's dtype, holding trainable, rounded. Usually frozen; gets a (dense) gradient if it asks
            for one, for which all of x is kept.
        bias: `[N]` in x's dtype, or None.
        trainable: `weight[:, indices] [N, s]` for `dim="input"`, `weight[indices, :] [s, K]` for `dim="output"`;
            float32, bfloat16 or float16 (float64 with float64 activations).
        indices: `[s]`, int64, sorted and unique channels. What `check_channels` checks is trusted here.
        dim: `"input"`, some of the K channels of x train, or `"output"`, some of the N channels of y.
        x_slice: `x[..., indices]`, where somebody has it already (`swiglu_s2ft`), for `dim="input"`; it is kept in
            place of a copy of these columns. What it holds is trusted. Never gets a gradient: dx is the derivative of y
            by all of x, these columns included. Second derivatives go through it to whatever made it.
        rewrite: backward writes trainable into weight again before it uses weight. Given where weight may have been
            gathered anew since forward (FSDP).
        transposed: weight is `[K, N]`, as transformers' `Conv1D` keeps it, for `x weight + bias`, and trainable lies as
            it does in there: `weight[indices, :] [s, N]` for `dim="input"`, `weight[:, indices] [K, s]` for
            `dim="output"`. Both are used as they lie.

    Returns:
        `[..., N]` in x's dtype. Under autocast, x, x_slice, weight and bias are cast to the autocast dtype first.

    Inside `torch.func` transforms (`grad`, `vmap`, `jvp`) the reference runs, which they can take apart.

    Saved for backward, while trainable trains: for `dim="input"` only `x[..., indices] [M, s]`, in memory of its own;
    for `dim="output"` x. Weight, trainable and indices by reference.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
        BackendUnavailable: inside `use_backend`, when that backend has no kernel for the call.

    Source: Yang et al., "S2FT", NeurIPS 2024, section 3.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        if x.dtype in FLOATING and x.dtype != torch.float64:
            rewrite = rewrite and weight.dtype == dtype  # a cast makes a copy, which nobody gathers anew
            x, weight = recompute.cast(x, dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            x_slice = None if x_slice is None else x_slice.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return s2ft_linear(
                x, weight, bias, trainable, indices, dim, x_slice=x_slice, rewrite=rewrite, transposed=transposed
            )
    _check(x, weight, bias, trainable, indices, x_slice, dim, transposed)
    if not torch.is_grad_enabled():  # nothing is kept
        return F.linear(x, weight.t() if transposed else weight, bias)
    along, backend = DIMS[dim], backends.forced_backend()
    if torch.compiler.is_compiling():
        return S2FTLinearFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, weight, bias, trainable, indices, x_slice, along, rewrite, transposed, backend
        )
    if transforms_active():
        if transposed:
            weight, trainable = weight.t(), trainable.t()
        return reference.s2ft_linear(x, weight, bias, trainable, indices, along)
    y, _ = _apply(x, weight, bias, trainable, indices, x_slice, along, rewrite, transposed, backend)
    return y  # type: ignore[no-any-return]
