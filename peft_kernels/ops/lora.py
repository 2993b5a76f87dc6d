"""The fused LoRA linear as an operator: `y = x W^T + bias + s (D * x) A^T B^T`.

Formulas, shapes and names are those of `peft_kernels/reference/lora.py`. This file holds the checks, the fake kernels,
the autograd Function and the registration; no arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference import lora as reference
from ..reference import philox
from ..reference.lora import accumulation_dtype, as_rows
from . import recompute
from ._autocast import autocast_dtype
from ._checks import FLOATING, describe, transforms_active
from ._register import register_operator, triton_launchers
from ._views import no_view


def _fake_dropout_mask(rows: int, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    return torch.empty((rows, columns), dtype=torch.bool, device=rng_state.device)


def _fake_shrink(x: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], factor.shape[0]), dtype=accumulation_dtype(x.dtype))


def _fake_accumulate_(
    out: Tensor, hidden: Tensor, factor: Tensor, scaling: float, dropout_p: float, rng_state: Tensor | None
) -> None:
    return None


def _fake_matmul(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    factor: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], matrix.shape[1]))


def _fake_factor_grad(
    x: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    shape = (x.shape[1], hidden.shape[1]) if transposed else (hidden.shape[1], x.shape[1])
    return x.new_empty(shape, dtype=dtype)


def _fake_grad_b(grad_out: Tensor, hidden: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), lora_b.new_empty(lora_b.shape)


def _fake_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), _fake_shrink(x, lora_a, 1.0, dropout_p, rng_state)


def _fake_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad_out.new_empty((grad_out.shape[0], weight.shape[1]) if need_x else 0),
        lora_a.new_empty(lora_a.shape if need_a else 0),
        lora_b.new_empty(lora_b.shape if need_b else 0),
    )


def _register() -> None:
    triton = triton_launchers("lora")
    for name, definition, fake in (
        ("dropout_mask", philox.dropout_mask, _fake_dropout_mask),
        ("lora_shrink", reference.lora_shrink, _fake_shrink),
        ("lora_accumulate_", reference.lora_accumulate_, _fake_accumulate_),
        ("lora_matmul", reference.lora_matmul, _fake_matmul),
        ("lora_factor_grad", reference.lora_factor_grad, _fake_factor_grad),
        ("lora_grad_b", reference.lora_grad_b, _fake_grad_b),
        ("lora_linear_forward", reference.lora_linear_forward, _fake_linear_forward),
        ("lora_linear_backward", reference.lora_linear_backward, _fake_linear_backward),
    ):
        register_operator(name, reference=definition, fake=fake, cuda=True, triton=triton)


_register()


class LoRALinearFunction(torch.autograd.Function):
    """Forward and backward of `lora_linear`; thin, the operators do the work.

    Saved for backward: `x` (only while `lora_a` or `weight` trains; where it is on offer, what it is formed from, see
    `recompute`) and `hidden [M, r]`. No dropped copy of x, no mask, nothing of size `[M, N]`.
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
        scaling: float,
        dropout_p: float,
        backend: str | None,
    ) -> Tensor:
        forward = backends.kernel("lora_linear_forward", x.device.type, x.dtype, backend)
        y, hidden = forward(as_rows(x), weight, bias, lora_a, lora_b, scaling, dropout_p, rng_state)
        keep_x = ctx.needs_input_grad[3] or ctx.needs_input_grad[1]
        inputs = recompute.to_save(ctx, x if keep_x else None)
        ctx.save_for_backward(weight, lora_a, lora_b, hidden, rng_state, *inputs)
        ctx.shape, ctx.scaling, ctx.dropout_p, ctx.backend = x.shape, scaling, dropout_p, backend
        return no_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def, override]
        if autocast_dtype(grad_out.device.type) is not None:  # dtypes were settled in forward
            with torch.autocast(grad_out.device.type, enabled=False):
                return LoRALinearFunction.backward(ctx, grad_out)
        if torch.is_grad_enabled():  # create_graph=True: the formulas in differentiable PyTorch
            return _differentiable_backward(ctx, grad_out)
        weight, lora_a, lora_b, hidden, rng_state, *inputs = ctx.saved_tensors
        x = recompute.saved(ctx, inputs)
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dy = as_rows(grad_out)
        rows = None if x is None else as_rows(x)
        dx = grad_weight = grad_bias = grad_a = grad_b = None
        if need_x or need_a or need_b:
            backward = backends.kernel("lora_linear_backward", dy.device.type, dy.dtype, ctx.backend)
            dx, grad_a, grad_b = backward(
                dy, rows, weight, lora_a, lora_b, hidden, ctx.scaling, ctx.dropout_p, rng_state, need_x, need_a, need_b
            )
            if need_x and grad_out.dim() != 2:
                dx = dx.view(ctx.shape)
            # What was not needed came back empty.
            dx, grad_a, grad_b = dx if need_x else None, grad_a if need_a else None, grad_b if need_b else None
        if need_weight:
            grad_weight = dy.t() @ rows
        if need_bias:
            grad_bias = dy.sum(0)
        return dx, grad_weight, grad_bias, grad_a, grad_b, None, None, None, None


def _differentiable_backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    """The gradients through autograd of the reference, so that they can be differentiated again."""
    weight, lora_a, lora_b, hidden, rng_state, *kept = ctx.saved_tensors
    x = recompute.saved(ctx, kept)
    need = ctx.needs_input_grad
    rows = as_rows(grad_out)
    scaling, p = ctx.scaling, ctx.dropout_p
    accumulate = accumulation_dtype(grad_out.dtype)
    grad_hidden = (rows @ lora_b.to(rows.dtype)).to(accumulate) * scaling
    dx = grad_weight = grad_bias = grad_a = grad_b = None
    if need[0]:
        low_rank = reference.dropped(grad_hidden @ lora_a.to(accumulate), p, rng_state)
        dx = (rows @ weight + low_rank).to(rows.dtype).view(ctx.shape)
    if need[2]:
        grad_bias = rows.sum(0)
    if x is not None:
        inputs = as_rows(x)
        if need[1]:
            grad_weight = rows.t() @ inputs
        if need[3]:
            grad_a = (grad_hidden.t() @ reference.dropped(inputs.to(accumulate), p, rng_state)).to(lora_a.dtype)
    if need[4]:
        if x is not None:
            hidden = reference.lora_shrink(as_rows(x), lora_a, 1.0, p, rng_state)
        elif need[0]:  # hidden depends on x, which was not saved; without x's gradient it is a constant
            raise RuntimeError("double backward through lora_linear needs lora_a or weight to require gradients")
        grad_b = (rows.to(accumulate).t() @ hidden * scaling).to(lora_b.dtype)
    return dx, grad_weight, grad_bias, grad_a, grad_b, None, None, None, None


def _check_base(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"lora_linear: {name} must have x's dtype, {x.dtype}, got {describe(tensor)}")
    if tensor.device != x.device:
        raise ValueError(f"lora_linear: {name} must be on x's device, {x.device}, got {describe(tensor)}")


def _check_factor(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype not in FLOATING or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(
            f"lora_linear: {name} must be float32, bfloat16 or float16 (float64 if and only if x is), "
            f"got {describe(tensor)} with x {describe(x)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"lora_linear: {name} must be on x's device, {x.device}, got {describe(tensor)}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, dropout_p: float) -> None:
    """Raises before anything runs; every message names the argument, what was expected and what came."""
    if weight.dim() != 2:
        raise ValueError(f"lora_linear: weight must be 2-D [out_features, in_features], got {describe(weight)}")
    out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"lora_linear: x must be [..., {in_features}] to match weight, got {describe(x)}")
    if lora_a.dim() != 2 or lora_a.shape[1] != in_features or lora_a.shape[0] < 1:
        raise ValueError(f"lora_linear: lora_a must be [r, {in_features}] with r >= 1, got {describe(lora_a)}")
    if lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(
            f"lora_linear: lora_b must be [{out_features}, {lora_a.shape[0]}] to match weight and lora_a, "
            f"got {describe(lora_b)}"
        )
    if x.dtype not in FLOATING:
        raise TypeError(f"lora_linear: x must be float32, bfloat16, float16 or float64, got {describe(x)}")
    _check_base("weight", weight, x)
    if bias is not None:
        if bias.shape != (out_features,):
            raise ValueError(f"lora_linear: bias must be [{out_features}], got {describe(bias)}")
        _check_base("bias", bias, x)
    _check_factor("lora_a", lora_a, x)
    _check_factor("lora_b", lora_b, x)
    if not 0.0 <= dropout_p <= 1.0:  # also refuses NaN
        raise ValueError(f"lora_linear: dropout_p must be a probability in [0, 1], got {dropout_p}")


# torch.func's transforms need rules for every operator they meet; the reference is made of torch's own, which do.
# Without them the base class's apply does all that Function.apply does, in a call that a small layer can afford.
_apply = super(torch.autograd.Function, LoRALinearFunction).apply


def draw_rng_state(device: torch.device) -> Tensor:
    """A fresh (seed, offset), int64 `[2]`, from torch's generator of `device`: no host sync, safe in CUDA graphs.

    `torch.manual_seed`, activation checkpointing and CUDA graphs therefore govern our masks as they do torch's own.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """`x weight^T + bias + scaling (D * x) lora_a^T lora_b^T`, fused forward and backward.

    Args:
        x: `[..., K]`, float32, bfloat16, float16 or float64; any strides, zero rows allowed.
        weight: `[N, K]`, x's dtype. Usually frozen; gets a gradient if it asks for one.
        bias: `[N]` in x's dtype, or None.
        lora_a: `[r, K]`, float32, bfloat16 or float16 (float64 with float64 activations); cast on load.
        lora_b: `[N, r]`, likewise. Gradients of both come back in their own dtypes.
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.
        dropout_p: probability of dropping an element of x on its way into lora_a, in steps of 2**-16.
        training: dropout applies only when True.

    Returns:
        `[..., N]` in x's dtype. Under autocast, x, weight and bias are cast to the autocast dtype first; the factors
        keep theirs.

    Inside `torch.func` transforms (`grad`, `vmap`, `jvp`) the reference runs, which they can take apart.

    Saved for backward: x (only while lora_a or weight trains) and `[M, r]` float32. The dropout mask is regenerated
    from 16 bytes. Same inputs and seed, same bits from run to run; what our kernels compute also for any number of
    threads, while a product with weight that is the library's depends on it where torch's own does.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is off; nothing has run.
        BackendUnavailable: inside `use_backend`, when that backend cannot serve the call.

    Source: Hu et al., "LoRA", ICLR 2022, eq. 3; dropout placement as in Hugging Face PEFT ("pre", one mask per layer).
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        if x.dtype in FLOATING and x.dtype != torch.float64:
            x, weight = recompute.cast(x, dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, training)
    _check(x, weight, bias, lora_a, lora_b, dropout_p)
    active = training and dropout_p > 0.0
    rng_state = draw_rng_state(x.device) if active else None
    p = dropout_p if active else 0.0
    if torch.compiler.is_compiling():
        apply = LoRALinearFunction.apply
    elif transforms_active():
        return reference.lora_linear(x, weight, bias, lora_a, lora_b, scaling, p, rng_state)
    else:
        apply = _apply
    return apply(  # type: ignore[no-any-return]
        x, weight, bias, lora_a, lora_b, rng_state, scaling, p, backends.forced_backend()
    )


def lora_merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """`weight + scaling lora_b lora_a`, a new tensor in weight's dtype.

    The product is formed in the accumulation dtype and added before rounding; in bfloat16 on processors with matrix
    tiles it carries 16 bits, so the result is the rounding of the exact sum to within 2**-16 of the product.

    Args:
        weight: `[N, K]`, left as it is.
        lora_a: `[r, K]`.
        lora_b: `[N, r]`.
        scaling: as for `lora_linear`.
    """
    _check(weight[:0], weight, None, lora_a, lora_b, 0.0)
    merged = weight.detach().clone(memory_format=torch.contiguous_format)
    hidden = lora_b.detach().to(accumulation_dtype(weight.dtype)).contiguous()
    accumulate = backends.kernel("lora_accumulate_", merged.device.type, merged.dtype)
    accumulate(merged, hidden, lora_a.detach(), scaling, 0.0, None)
    return merged
