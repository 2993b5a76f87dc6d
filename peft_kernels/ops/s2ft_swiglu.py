"""SwiGLU, alone and in front of a layer of which some input channels train: then it also writes these channels.

Formulas, shapes and names are those of `peft_kernels/reference/s2ft.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference import s2ft as reference
from ..reference.lora import as_rows
from ._checks import FLOATING, describe, transforms_active
from ._views import no_view


class SwiGLUFunction(torch.autograd.Function):
    """Forward and backward of `swiglu`, without indices, and of `swiglu_s2ft`.

    Saved for backward: gate, up and indices by reference.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, indices: Tensor | None, backend: str | None):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(gate, up, indices)
        ctx.backend = backend
        if not torch.compiler.is_compiling():  # there zeros stand for what gets no gradient
            ctx.set_materialize_grads(False)
        swiglu = backends.kernel("swiglu", gate.device.type, gate.dtype, backend)
        channels = gate.new_empty(0, dtype=torch.int64) if indices is None else indices
        h, x_slice = swiglu(as_rows(gate), as_rows(up), channels)
        if indices is None:
            return no_view(h, gate.shape)
        return no_view(h, gate.shape), no_view(x_slice, (*gate.shape[:-1], indices.shape[0]))

    @staticmethod
    def backward(ctx, grad_h, grad_slice=None):  # type: ignore[no-untyped-def, override]
        gate, up, indices = ctx.saved_tensors
        if grad_slice is not None:
            if grad_h is None:
                grad_h = torch.zeros_like(gate)
            grad_h = grad_h.index_add(-1, indices, grad_slice)
        if grad_h is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # create_graph=True: the formulas in differentiable PyTorch
            return *reference.swiglu_backward(grad_h, gate, up), None, None
        swiglu_backward = backends.kernel("swiglu_backward", gate.device.type, gate.dtype, ctx.backend)
        grads = swiglu_backward(as_rows(grad_h), as_rows(gate), as_rows(up))
        return *(no_view(grad, gate.shape) for grad in grads), None, None


def _check_gate(op: str, gate: Tensor, up: Tensor) -> None:
    if gate.dim() < 1:
        raise ValueError(f"{op}: gate must be [..., K], got {describe(gate)}")
    if gate.dtype not in FLOATING:
        raise TypeError(f"{op}: gate must be float32, bfloat16, float16 or float64, got {describe(gate)}")
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up must be {list(gate.shape)} like gate, got {describe(up)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"{op}: up must have gate's dtype, {gate.dtype}, got {describe(up)}")
    if up.device != gate.device:
        raise ValueError(f"{op}: up must be on gate's device, {gate.device}, got {describe(up)}")


def _check(gate: Tensor, up: Tensor, indices: Tensor) -> None:
    _check_gate("swiglu_s2ft", gate, up)
    if indices.dtype != torch.int64:
        raise TypeError(f"swiglu_s2ft: indices must be int64, got {describe(indices)}")
    if indices.dim() != 1:
        raise ValueError(f"swiglu_s2ft: indices must be 1-D, got {describe(indices)}")
    if indices.device != gate.device:
        raise ValueError(f"swiglu_s2ft: indices must be on gate's device, {gate.device}, got {describe(indices)}")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, in one pass over gate and up.

    Args:
        gate: `[..., K]`, float32, bfloat16, float16 or float64; any strides, zero rows allowed.
        up: `[..., K]`, in gate's dtype.

    Returns:
        `[..., K]` in gate's dtype, contiguous, formed in the accumulation dtype and rounded once.

    Saved for backward: gate and up by reference; not the result, see `recompute.swiglu_recipe`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
        BackendUnavailable: inside `use_backend`, when that backend has no kernel for the call.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check_gate("swiglu", gate, up)
    if torch.compiler.is_compiling():
        apply = SwiGLUFunction.apply
    elif transforms_active():
        none = gate.new_empty(0, dtype=torch.int64)
        return reference.swiglu(as_rows(gate), as_rows(up), none)[0].view(gate.shape)
    else:
        apply = _apply
    return apply(gate, up, None, backends.forced_backend())  # type: ignore[no-any-return]


def swiglu_s2ft(gate: Tensor, up: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`h = silu(gate) * up` and `h[..., indices]`, in one pass over gate and up.

    The second result is what `s2ft_linear(h, ..., dim="input", x_slice=...)` keeps for backward, so that h itself need
    not be read again, nor kept. A gradient that it gets is added to h's, as for any copy of these columns;
    `s2ft_linear` gives it none, as h's carries it all.

    Args:
        gate: `[..., K]`, float32, bfloat16, float16 or float64; any strides, zero rows allowed.
        up: `[..., K]`, in gate's dtype.
        indices: `[s]`, int64, sorted and unique channels. What `check_channels` checks is trusted here.

    Returns:
        `[..., K]` and `[..., s]` in gate's dtype, contiguous, formed in the accumulation dtype and rounded once.

    Saved for backward: gate, up and indices by reference; not h.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is off; nothing has run.
        BackendUnavailable: inside `use_backend`, when that backend has no kernel for the call.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _check(gate, up, indices)
    if torch.compiler.is_compiling():
        apply = SwiGLUFunction.apply
    elif transforms_active():
        h, x_slice = reference.swiglu(as_rows(gate), as_rows(up), indices)
        return h.view(gate.shape), x_slice.view(*gate.shape[:-1], indices.shape[0])
    else:
        apply = _apply
    return apply(gate, up, indices, backends.forced_backend())  # type: ignore[no-any-return]


# The base class's apply spares a small layer the price of Function.apply, as for sparse_delta_linear.
_apply = super(torch.autograd.Function, SwiGLUFunction).apply
