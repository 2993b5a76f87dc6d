"""A linear layer whose weight holds a sparse delta: `y = x weight^T + bias`, with a gradient for the delta alone.

Formulas, shapes and names are those of `peft_kernels/reference/sparse_delta.py`. This file holds the checks, the fake
kernels, the autograd Function and the registration; no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference import sparse_delta as reference
from ..reference.lora import as_rows
from . import recompute
from ._autocast import autocast_dtype
from ._checks import FLOATING, check_sorted, describe, transforms_active
from ._register import fake_in_place, register_operator, triton_launchers
from ._views import no_view

Observer = Callable[[Tensor, Tensor], None]
"""What may look at a layer's backward pass: it is called with grad_out `[M, N]` and x `[M, K]`."""


def check_indices(indices: Tensor, numel: int) -> None:
    """Raises unless `indices` are positions in a weight of `numel` elements: sorted, unique and in range.

    The operators trust in this, so it is checked once, where indices are installed; a pass over them, and on a GPU a
    wait for it.

    Args:
        indices: `[nnz]`, int32 or int64, contiguous.
        numel: how many elements the weight has.

    Raises:
        TypeError: the dtype is another one.
        ValueError: anything else; the message names the first entry that is wrong.
    """
    check_sorted(indices, numel, (torch.int32, torch.int64), "the weight has elements")


def _fake_sampled_product(grad_out: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(indices.shape[0], dtype=dtype)


def _register() -> None:
    triton = triton_launchers("sparse_delta")
    for name, definition, fake in (
        ("scatter_write_", reference.scatter_write_, fake_in_place),
        ("scatter_accumulate_", reference.scatter_accumulate_, fake_in_place),
        ("sampled_product", reference.sampled_product, _fake_sampled_product),
        ("sparse_adamw_", reference.sparse_adamw_, fake_in_place),
        ("sparse_sm3_", reference.sparse_sm3_, fake_in_place),
    ):
        register_operator(name, reference=definition, fake=fake, cuda=True, triton=triton)


_register()


class SparseDeltaLinearFunction(torch.autograd.Function):
    """Forward and backward of `sparse_delta_linear`; the products with weight are the library's.

    Saved for backward: x (only while values or weight trains; where it is on offer, what it is formed from, see
    `recompute`), weight and indices by reference. Nothing of size `[N, K]` is made in either pass.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        original: Tensor | None,
        observer: Observer | None,
        backend: str | None,
    ) -> Tensor:
        keep_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(weight, values, indices, original, *recompute.to_save(ctx, x if keep_x else None))
        ctx.observer, ctx.backend = observer, backend
        return no_view(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def, override]
        if autocast_dtype(grad_out.device.type) is not None:  # dtypes were settled in forward
            with torch.autocast(grad_out.device.type, enabled=False):
                return SparseDeltaLinearFunction.backward(ctx, grad_out)
        weight, values, indices, original, *inputs = ctx.saved_tensors  # which checkpointing lets out once
        need_x, need_weight, need_bias, need_values = ctx.needs_input_grad[:4]
        if original is not None:
            write = backends.kernel("scatter_write_", weight.device.type, weight.dtype, ctx.backend)
            write(weight.detach(), indices, original, values.detach())
        x = recompute.saved(ctx, inputs)
        if torch.is_grad_enabled():  # create_graph=True: the formulas in differentiable PyTorch
            return _differentiable_backward(ctx, (x, weight, values, indices), grad_out)
        dy = as_rows(grad_out)
        rows = None if x is None else as_rows(x)
        dx = grad_weight = grad_bias = grad_values = None
        if need_x:
            dx = grad_out @ weight
        if need_values:
            sampled_product = backends.kernel("sampled_product", dy.device.type, dy.dtype, ctx.backend)
            grad_values = sampled_product(dy, rows, indices, values.dtype)
            _observe(ctx, dy, rows)
        if need_weight:
            grad_weight = dy.t() @ rows
        if need_bias:
            grad_bias = dy.sum(0)
        return dx, grad_weight, grad_bias, grad_values, None, None, None, None


def _observe(ctx, dy: Tensor, rows: Tensor) -> None:  # type: ignore[no-untyped-def]
    if ctx.observer is not None:
        ctx.observer(dy.detach(), rows.detach())  # what is looked at later must not hold a graph


def _differentiable_backward(ctx, saved: tuple[Tensor, ...], grad_out: Tensor):  # type: ignore[no-untyped-def]
    """The gradients of the reference, so that they can be differentiated again."""
    x, weight, values, indices = saved
    need_x, need_weight, need_bias, need_values = ctx.needs_input_grad[:4]
    dx = grad_weight = grad_bias = grad_values = None
    if need_x:
        dx = reference.sparse_delta_linear(grad_out, weight.t(), None, values, _transposed(indices, weight.shape))
    if need_bias:
        grad_bias = as_rows(grad_out).sum(0)
    if need_weight:
        grad_weight = as_rows(grad_out).t() @ as_rows(x)
    if need_values:
        grad_values = reference.sampled_product(as_rows(grad_out), as_rows(x), indices, values.dtype)
        _observe(ctx, as_rows(grad_out), as_rows(x))
    return dx, grad_weight, grad_bias, grad_values, None, None, None, None


def _transposed(indices: Tensor, shape: torch.Size) -> Tensor:
    """The same positions in the transposed weight."""
    rows, columns = shape
    positions = indices.to(torch.int64)
    return positions % columns * rows + positions // columns


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, original: Tensor | None
) -> None:
    """Raises before anything runs; every message names the argument, what was expected and what came."""
    if weight.dim() != 2:
        raise ValueError(f"sparse_delta_linear: weight must be 2-D [out_features, in_features], got {describe(weight)}")
    out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"sparse_delta_linear: x must be [..., {in_features}] to match weight, got {describe(x)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"sparse_delta_linear: x must be float32, bfloat16, float16 or float64, got {describe(x)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"sparse_delta_linear: bias must be [{out_features}], got {describe(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"sparse_delta_linear: {name} must have x's dtype, {x.dtype}, got {describe(tensor)}")
    if values.dtype not in FLOATING or (values.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            "sparse_delta_linear: values must be float32, bfloat16 or float16 (float64 if and only if x is), "
            f"got {describe(values)} with x {describe(x)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sparse_delta_linear: indices must be int32 or int64, got {describe(indices)}")
    if indices.dim() != 1 or values.shape != indices.shape:
        raise ValueError(
            "sparse_delta_linear: values and indices must be 1-D and of the same length, "
            f"got {describe(values)} and {describe(indices)}"
        )
    if original is not None and original.shape != indices.shape:
        raise ValueError(
            f"sparse_delta_linear: original must be {list(indices.shape)}, one per entry, got {describe(original)}"
        )
    if original is not None and original.dtype != weight.dtype:
        raise TypeError(
            f"sparse_delta_linear: original must have weight's dtype, {weight.dtype}, got {describe(original)}"
        )
    others = {"weight": weight, "bias": bias, "values": values, "indices": indices, "original": original}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"sparse_delta_linear: {name} must be on x's device, {x.device}, got {describe(tensor)}")


# As for lora_linear: torch.func's transforms take the reference apart; the base class's apply spares a small layer the
# price of Function.apply.
_apply = super(torch.autograd.Function, SparseDeltaLinearFunction).apply


def sparse_delta_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    *,
    original: Tensor | None = None,
    observer: Observer | None = None,
) -> Tensor:
    """`x weight^T + bias`, where `weight` holds the delta already; values get the gradient `(dy^T x)[indices]`.

    Forward and dx cost what they cost in a frozen linear layer. Whoever changes values writes them into weight with
    `scatter_write_` before the next call; `nn.SparseDeltaLinear` and `optim.SparseAdamW` do. Unstructured deltas save
    no activation memory: the gradient needs all of x.

    Args:
        x: `[..., K]`, float32, bfloat16, float16 or float64; any strides, zero rows allowed.
        weight: `[N, K]` in x's dtype, holding `original + values` at indices. Usually frozen; gets a (dense) gradient
            if it asks for one.
        bias: `[N]` in x's dtype, or None.
        values: `[nnz]`, float32, bfloat16 or float16 (float64 with float64 activations).
        indices: `[nnz]`, int32 or int64 positions `n K + k`, sorted and unique. What `check_indices` checks is trusted
            here.
        original: `[nnz]` in weight's dtype: what weight held at indices before. Given where weight may have been
            gathered anew since forward (FSDP), so that backward writes the delta again; None otherwise.
        observer: called in backward with dy `[M, N]` and x `[M, K]`, while values get a gradient.

    Returns:
        `[..., N]` in x's dtype. Under autocast, x, weight and bias are cast to the autocast dtype first.

    Inside `torch.func` transforms (`grad`, `vmap`, `jvp`) the reference runs, which they can take apart.

    Saved for backward: x (only while values or weight trains); weight, values and indices by reference.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
        BackendUnavailable: inside `use_backend`, when that backend has no `sampled_product` for the call (in backward).

    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024, section 3.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        if x.dtype in FLOATING and x.dtype != torch.float64:
            if weight.dtype != dtype:
                original = None  # the cast makes a copy, which holds the delta and which nobody gathers anew
            x, weight = recompute.cast(x, dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return sparse_delta_linear(x, weight, bias, values, indices, original=original, observer=observer)
    _check(x, weight, bias, values, indices, original)
    if torch.compiler.is_compiling():
        apply = SparseDeltaLinearFunction.apply
    elif transforms_active():
        return reference.sparse_delta_linear(x, weight, bias, values, indices)
    else:
        apply = _apply
    return apply(  # type: ignore[no-any-return]
        x, weight, bias, values, indices, original, observer, backends.forced_backend()
    )


class QuantizedSparseDeltaLinearFunction(torch.autograd.Function):
    """Forward and backward of `quantized_sparse_delta_linear`: the weight is made dense in each, and dropped.

    Saved for backward: x (only while values train; where it is on offer, what it is formed from, see `recompute`),
    values and indices by reference.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        x: Tensor,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        dequantize: Callable[[torch.dtype], Tensor],
        backend: str | None,
    ) -> Tensor:
        inputs = recompute.to_save(ctx, x if ctx.needs_input_grad[2] else None)
        ctx.save_for_backward(values, indices, *inputs)
        ctx.dequantize, ctx.backend, ctx.dtype = dequantize, backend, x.dtype
        return no_view(F.linear(x, _with_delta(dequantize(x.dtype), values, indices, backend), bias))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def, override]
        values, indices, *inputs = ctx.saved_tensors
        x = recompute.saved(ctx, inputs)
        need_x, need_bias, need_values = ctx.needs_input_grad[:3]
        dy = as_rows(grad_out)
        dx = grad_bias = grad_values = None
        if need_x:
            dx = grad_out @ _with_delta(ctx.dequantize(ctx.dtype), values, indices, ctx.backend)
        if need_values:
            sampled_product = backends.kernel("sampled_product", dy.device.type, dy.dtype, ctx.backend)
            grad_values = sampled_product(dy, as_rows(x), indices, values.dtype)
        if need_bias:
            grad_bias = dy.sum(0)
        return dx, grad_bias, grad_values, None, None, None


def _with_delta(weight: Tensor, values: Tensor, indices: Tensor, backend: str | None) -> Tensor:
    accumulate = backends.kernel("scatter_accumulate_", weight.device.type, weight.dtype, backend)
    accumulate(weight, indices, values.detach(), 1.0)
    return weight


def quantized_sparse_delta_linear(
    x: Tensor,
    dequantize: Callable[[torch.dtype], Tensor],
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
) -> Tensor:
    """`x (W + scatter(indices, values))^T + bias` over a weight that is stored quantised.

    The delta is added while the weight is dense, in each pass for the length of one product, and rounded once; what is
    stored does not change.

    Args:
        x: `[..., K]`, float32, bfloat16 or float16.
        dequantize: gives W `[N, K]` in a dtype, as a new contiguous tensor that may be written to. Called in forward
            and, for dx, in backward.
        bias: `[N]` in x's dtype, or None.
        values: `[nnz]`, float32, bfloat16 or float16.
        indices: `[nnz]`, int32 or int64 positions `n K + k`, sorted and unique; trusted, see `check_indices`.

    Returns:
        `[..., N]` in x's dtype. Under autocast x and bias are cast to the autocast dtype first.

    Saved for backward: x (only while values train); values and indices by reference. Second derivatives raise.

    Raises:
        ValueError, TypeError: as `sparse_delta_linear`.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, bias = recompute.cast(x, dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return quantized_sparse_delta_linear(x, dequantize, bias, values, indices)
    if x.dtype not in FLOATING or x.dtype == torch.float64:
        raise TypeError(f"quantized_sparse_delta_linear: x must be float32, bfloat16 or float16, got {describe(x)}")
    apply = QuantizedSparseDeltaLinearFunction.apply
    return apply(x, bias, values, indices, dequantize, backends.forced_backend())  # type: ignore[no-any-return]
