"""Linear layers that keep some rows of their input for the weight gradient, as `draw_rows` samples them.

Output, the gradients of x, bias and lora_b are exact; those of the weight and of lora_a are unbiased estimates. Their
formulas are in `peft_kernels/reference/wta_crs.py`; this file holds the checks and the autograd Functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.lora import as_rows
from ..reference.philox import dropout_scale
from ..reference.wta_crs import sampled_weight_grad
from . import lora
from ._autocast import autocast_dtype
from ._checks import FLOATING, describe
from ._views import no_view
from .token_elimination import _check_floating, _check_like
from .wta_crs import RowSample, refuse_transforms


def _kernel(name: str, tensor: Tensor, backend: str | None) -> Any:
    return backends.kernel(name, tensor.device.type, tensor.dtype, backend)


class SampledLinearFunction(torch.autograd.Function):
    """Forward and backward of `sampled_linear`.

    Saved for backward: weight by reference (while x wants a gradient), and the sample (while weight does).
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        rows: Tensor,
        scales: Tensor,
        backend: str | None,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        sample = (kept, rows, scales) if need_weight else (None, None, None)
        ctx.save_for_backward(weight if need_x else None, *sample)
        ctx.shape, ctx.backend = x.shape, backend
        return no_view(F.linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        if autocast_dtype(grad.device.type) is not None:  # dtypes were settled in forward
            with torch.autocast(grad.device.type, enabled=False):
                return SampledLinearFunction.backward(ctx, grad)
        weight, kept, rows, scales = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dy = as_rows(grad)
        dx = no_view(dy @ weight, ctx.shape) if need_x else None
        grad_weight = None
        if need_weight:
            grad_weight = sampled_weight_grad(_kernel("gather_rows", dy, ctx.backend)(dy, rows), kept, scales)
        return dx, grad_weight, dy.sum(0) if need_bias else None, None, None, None, None


class SampledLoRALinearFunction(torch.autograd.Function):
    """Forward and backward of `sampled_lora_linear`.

    Saved for backward: weight, the factors and hidden `[M, r]` as `LoRALinearFunction` does, and in x's place the
    sample (while lora_a or weight trains).
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        rng_state: Tensor | None,
        kept: Tensor,
        rows: Tensor,
        scales: Tensor,
        scaling: float,
        dropout_p: float,
        backend: str | None,
    ) -> Tensor:
        forward = _kernel("lora_linear_forward", x, backend)
        y, hidden = forward(as_rows(x), weight, bias, lora_a, lora_b, scaling, dropout_p, rng_state)
        trains = ctx.needs_input_grad[3] or ctx.needs_input_grad[1]
        sample = (kept, rows, scales) if trains else (None, None, None)
        ctx.save_for_backward(weight, lora_a, lora_b, hidden, rng_state, *sample)
        ctx.shape, ctx.scaling, ctx.dropout_p, ctx.backend = x.shape, scaling, dropout_p, backend
        return no_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def, override]
        if autocast_dtype(grad_out.device.type) is not None:  # dtypes were settled in forward
            with torch.autocast(grad_out.device.type, enabled=False):
                return SampledLoRALinearFunction.backward(ctx, grad_out)
        weight, lora_a, lora_b, hidden, rng_state, kept, rows, scales = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dy = as_rows(grad_out)
        dx = grad_weight = grad_bias = grad_a = grad_b = None
        if need_x or need_b:  # the exact ones need no x
            dx, _, grad_b = _kernel("lora_linear_backward", dy, ctx.backend)(
                dy, None, weight, lora_a, lora_b, hidden, ctx.scaling, ctx.dropout_p, rng_state, need_x, False, need_b
            )
            dx, grad_b = no_view(dx, ctx.shape) if need_x else None, grad_b if need_b else None
        if need_a or need_weight:
            chosen = _kernel("gather_rows", dy, ctx.backend)(dy, rows)
            if need_a:
                grad_a = _sampled_grad_a(ctx, chosen, lora_a, lora_b, rng_state, kept, rows, scales)
            if need_weight:
                grad_weight = sampled_weight_grad(chosen, kept, scales)
        if need_bias:
            grad_bias = dy.sum(0)
        return (dx, grad_weight, grad_bias, grad_a, grad_b, *(None,) * 7)


def _sampled_grad_a(  # type: ignore[no-untyped-def]
    ctx,
    chosen: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    rng_state: Tensor | None,
    kept: Tensor,
    rows: Tensor,
    scales: Tensor,
) -> Tensor:
    """`(scales * s dy[rows] lora_b)^T (D * x)[rows]`; scales, also that of dropout, go into the accumulation dtype."""
    grad_hidden = _kernel("lora_shrink", chosen, ctx.backend)(chosen, lora_b.t(), ctx.scaling, 0.0, None)
    grad_hidden = grad_hidden * scales[:, None]
    if rng_state is not None:
        # The mask belongs to rows of x, so that all of it is formed, for the moment, a byte per element.
        mask = _kernel("dropout_mask", chosen, ctx.backend)(
            _rows_of(ctx.shape), kept.shape[1], ctx.dropout_p, rng_state
        ).index_select(0, rows)
        kept = torch.where(mask, kept, torch.zeros((), dtype=kept.dtype, device=kept.device))
        grad_hidden = grad_hidden * dropout_scale(ctx.dropout_p)
    grad = _kernel("lora_factor_grad", kept, ctx.backend)
    return grad(kept, grad_hidden, 1.0, 0.0, None, lora_a.dtype, False)  # type: ignore[no-any-return]


def _rows_of(shape: torch.Size) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _check_sample(op: str, x: Tensor, sample: RowSample) -> None:
    total, kept, rows, scales = _rows_of(x.shape), sample.kept, sample.rows, sample.scales
    if sample.total != total or kept.dim() != 2 or kept.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: sample must be one of {total} rows of {x.shape[-1]} numbers to match x, got one of "
            f"{sample.total} rows of {kept.shape[-1]}"
        )
    _check_like(op, "sample.kept", kept, "x", x)
    for name, tensor, dtype in (("rows", rows, torch.int32), ("scales", scales, torch.float32)):
        if tensor.dtype != dtype or tensor.shape != kept.shape[:1] or tensor.device != x.device:
            raise ValueError(
                f"{op}: sample.{name} must be [{kept.shape[0]}] in {dtype} on {x.device}, got {describe(tensor)}"
            )


def sampled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sample: RowSample | None) -> Tensor:
    """`x weight^T + bias`, whose weight gradient comes from a sample of x's rows.

    Args:
        x: `[..., K]`, float32, bfloat16, float16 or float64; any strides.
        weight: `[N, K]` in x's dtype.
        bias: `[N]` in x's dtype, or None.
        sample: what `draw_rows` made of x, by the same autocast; None computes `nn.functional.linear`.

    Returns:
        `[..., N]` in x's dtype, the bits of `nn.functional.linear`. Under autocast x, weight and bias are cast first.

    Saved for backward: the sample, `k (K e + 8)` bytes for elements of e, in the place of x's `M K e`. The gradients of
    x and bias are exact, weight's is unbiased.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
        RuntimeError: inside a `torch.func` transform, or a second derivative.

    Source: Liu et al., "Winner-Take-All Column Row Sampling", NeurIPS 2023.
    """
    op = "sampled_linear"
    if sample is None:
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        if x.dtype in FLOATING and x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return sampled_linear(x, weight, bias, sample)
    _check_floating(op, "x", x, 1)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must be [N, {x.shape[-1]}] to match x, got {describe(weight)}")
    _check_like(op, "weight", weight, "x", x)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be [{weight.shape[0]}] to match weight, got {describe(bias)}")
        _check_like(op, "bias", bias, "x", x)
    _check_sample(op, x, sample)
    refuse_transforms(op)
    return SampledLinearFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, weight, bias, sample.kept, sample.rows, sample.scales, backends.forced_backend()
    )


def sampled_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    sample: RowSample | None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """`lora_linear`, whose gradient of lora_a comes from a sample of x's rows; weight's too, should it train.

    Args:
        x, weight, bias, lora_a, lora_b, scaling, dropout_p, training: as in `lora_linear`.
        sample: what `draw_rows` made of x, by the same autocast; None computes `lora_linear`.

    Returns:
        What `lora_linear` returns, to the bit.

    Saved for backward: the sample, `k (K e + 8)` bytes for elements of e, in the place of x's `M K e`, and as in
    `lora_linear` `[M, r]` float32. The gradients of x, bias and lora_b are exact, lora_a's is unbiased. With dropout
    backward forms the mask of all of x for the moment, a byte per element.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off; nothing has run.
        BackendUnavailable: inside `use_backend`, when that backend cannot serve the call.
        RuntimeError: inside a `torch.func` transform, or a second derivative.

    Source: Liu et al., "Winner-Take-All Column Row Sampling", NeurIPS 2023.
    """
    op = "sampled_lora_linear"
    if sample is None:
        return lora.lora_linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, training)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        if x.dtype in FLOATING and x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return sampled_lora_linear(x, weight, bias, lora_a, lora_b, scaling, sample, dropout_p, training)
    lora._check(x, weight, bias, lora_a, lora_b, dropout_p)
    _check_sample(op, x, sample)
    refuse_transforms(op)
    active = training and dropout_p > 0.0
    return SampledLoRALinearFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        x,
        weight,
        bias,
        lora_a,
        lora_b,
        lora.draw_rng_state(x.device) if active else None,
        sample.kept,
        sample.rows,
        sample.scales,
        scaling,
        dropout_p if active else 0.0,
        backends.forced_backend(),
    )
