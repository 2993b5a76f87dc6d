"""The cross entropy of a language model's last layer without all of its logits: formed in chunks of rows.

A chunk's logits become their own gradient in place and are multiplied on at once, so that backward only scales. The
formula is in `peft_kernels/reference/cross_entropy.py`; this file holds the checks, the fake kernel, the autograd
Function and the registration. On a GPU nothing here waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference import cross_entropy as reference
from ..reference.lora import accumulation_dtype, as_rows
from ._autocast import autocast_dtype
from ._register import register_operator
from .sparse_delta import _FLOATING, _describe, _transforms_active

LOGITS_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""What the logits of a chunk take, by device type, where the caller does not say how many rows it has."""

REDUCTIONS = ("mean", "sum", "none")


def _fake_rows(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))


register_operator(
    "cross_entropy_rows_",
    reference=reference.cross_entropy_rows_,
    fake=_fake_rows,
    cuda=True,
    triton="no Triton kernel yet",
)


class _Chunks:
    """One pass over the rows with a label: losses, and the gradients of their sum that are wanted."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        softcap: float | None,
        needs: tuple[bool, bool, bool],
        backend: str | None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.softcap, self.needs = hidden, weight, bias, softcap, needs
        self.kernel = backends.kernel("cross_entropy_rows_", hidden.device.type, hidden.dtype, backend)
        self.rows = _labeled_rows(targets)
        self.targets = targets if self.rows is None else targets.index_select(0, self.rows)
        count = self.targets.shape[0]
        self.parts = -(-count // chunk_size)
        self.step = -(-count // self.parts) if self.parts else 0  # chunks of one size, but for the last
        # Memory that is used again need not be cleared by the system again; a compiler plans memory itself.
        self.reused = not torch.compiler.is_compiling()
        self.buffer = hidden.new_empty(self.step, weight.shape[0]) if self.reused else None
        wide = accumulation_dtype(hidden.dtype)
        losses = [] if self.parts else [hidden.new_zeros(0, dtype=wide)]
        self.grad_hidden = hidden.new_empty(count, hidden.shape[1]) if needs[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.grad_bias = weight.new_zeros(weight.shape[0], dtype=wide) if needs[2] else None
        for part in range(self.parts):
            losses.append(self._chunk(part * self.step, min(count, (part + 1) * self.step)))
        self.losses = losses[0] if len(losses) == 1 else torch.cat(losses)
        self.buffer = None

    def _chunk(self, begin: int, end: int) -> Tensor:
        hidden = self.hidden[begin:end]
        if self.rows is not None:
            hidden = self.hidden.index_select(0, self.rows[begin:end])
        logits = self._logits(hidden)
        capped = None
        if self.softcap is not None:
            capped = logits.div_(self.softcap).tanh_()
            logits = capped * self.softcap
        losses: Tensor = self.kernel(logits, self.targets[begin:end], 1.0 if any(self.needs) else 0.0)
        if capped is not None and any(self.needs):
            logits.mul_(capped.square_().neg_().add_(1.0))
        if self.grad_hidden is not None:
            self._multiply(logits, self.weight, self.grad_hidden[begin:end])
        if self.grad_weight is not None:
            self._add_weight_gradient(logits, hidden)
        if self.grad_bias is not None:
            self.grad_bias.add_(logits.sum(0, dtype=self.grad_bias.dtype))
        return losses

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.buffer is None:
            return F.linear(hidden, self.weight, self.bias)
        logits = self.buffer[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=logits)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=logits)

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        if self.reused:
            torch.mm(left, right, out=out)
        else:
            out.copy_(left @ right)

    def _add_weight_gradient(self, grad: Tensor, hidden: Tensor) -> None:
        assert self.grad_weight is not None
        if self.grad_weight.dtype == grad.dtype:
            self.grad_weight.addmm_(grad.t(), hidden)
        else:
            self.grad_weight.add_(grad.t() @ hidden)


def _host_reads(tensor: Tensor) -> bool:
    """Whether the host can look at the tensor at no cost."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _transforms_active()


def _labeled_rows(targets: Tensor) -> Tensor | None:
    """The rows that have a label, where the host may ask at no cost and some have none; else None, for all rows."""
    if not _host_reads(targets):
        return None
    rows = (targets >= 0).nonzero().flatten()
    return None if rows.shape[0] == targets.shape[0] else rows


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Forward and backward of `linear_cross_entropy`: the losses of the rows, or their sum.

    Saved for backward: the gradient of hidden, `[S, H]` of the S rows that were computed, and which rows these are;
    those of weight and bias if they train.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        softcap: float | None,
        summed: bool,
        backend: str | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        chunks = _Chunks(hidden, weight, bias, targets, chunk_size, softcap, needs, backend)
        grad_weight = None if chunks.grad_weight is None else chunks.grad_weight.to(weight.dtype)
        grad_bias = None if chunks.grad_bias is None or bias is None else chunks.grad_bias.to(bias.dtype)
        ctx.save_for_backward(chunks.grad_hidden, chunks.rows, grad_weight, grad_bias)
        ctx.shape, ctx.summed = hidden.shape, summed
        return chunks.losses.sum() if summed else _at_rows(chunks.losses, chunks.rows, hidden.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        grad_hidden, rows, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            if ctx.summed:
                grad_hidden = grad_hidden * grad
            else:
                factors = grad if rows is None else grad.index_select(0, rows)
                grad_hidden = (grad_hidden * factors[:, None]).to(grad_hidden.dtype)
            grad_hidden = _at_rows(grad_hidden, rows, ctx.shape[0])
        grad_weight = None if grad_weight is None else grad_weight * grad
        grad_bias = None if grad_bias is None else grad_bias * grad
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _at_rows(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """values at rows of a tensor of `count` rows of zeros."""
    return values if rows is None else values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    shift: bool = False,
    token_mask: Tensor | None = None,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`cross_entropy(hidden weight^T + bias, labels)`, holding the logits of a chunk of rows at a time.

    Forward forms the gradients too, a chunk at a time, and backward only scales them. On the CPU rows without a label
    are left out of the products; on a GPU, where the host does not know them, and under `torch.compile` they are in
    them, and change nothing.

    Args:
        hidden: `[..., H]`, the input of the last layer, seen as M rows; float32, bfloat16, float16 or float64.
        weight: `[V, H]` in hidden's dtype.
        labels: int64 with hidden's leading dimensions: in `[0, V)`, or `ignore_index`.
        bias: `[V]` in hidden's dtype, or None.
        ignore_index: the label of tokens that do not count.
        reduction: `"mean"` over the tokens that count (NaN where there are none, as in torch), `"sum"`, or `"none"`,
            which has no gradient for weight and bias.
        num_items_in_batch: what `"mean"` divides by in place of the count, a number or a tensor: transformers' sum over
            the tokens of all accumulated batches.
        shift: hidden at token t predicts the label at t + 1, as in causal language models; hidden is not copied.
        token_mask: bool with labels' shape: only labels where it is true count (Rho-1's loss on selected tokens).
        logit_softcap: c of logits `c tanh(logits / c)`, or None. Takes the memory of a second chunk.
        chunk_size: rows per chunk; None takes as many as have 64 MiB of logits, or 256 MiB on a GPU.

    Returns:
        A scalar, or with `"none"` a loss per label (zero where it does not count; with shift, at t the loss of label
        t + 1), in float32, or float64 for float64. Under autocast hidden, weight and bias are cast first.

    Saved for backward: hidden's gradient, as many bytes as hidden, and the gradients of weight and bias if they train.
    In 16 bits gradients are rounded once before they are scaled and once after; that of weight is a float32 sum of the
    chunks' products, which are rounded each.

    Raises:
        ValueError, TypeError: an argument's value, shape, dtype or device is off; nothing has run. On a GPU a label out
            of range raises when the device comes to it.

    Source: Hsu et al., "Liger Kernel", 2024; Luo et al., "Mini-Sequence Transformers", 2024. Lin et al., "Rho-1",
    NeurIPS 2024, for token_mask.
    """
    dtype = autocast_dtype(hidden.device.type)
    if dtype is not None:
        if hidden.dtype in _FLOATING and hidden.dtype != torch.float64:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_cross_entropy(
                hidden,
                weight,
                labels,
                bias,
                ignore_index=ignore_index,
                reduction=reduction,
                num_items_in_batch=num_items_in_batch,
                shift=shift,
                token_mask=token_mask,
                logit_softcap=logit_softcap,
                chunk_size=chunk_size,
            )
    _check_tensors(hidden, weight, labels, bias, token_mask)
    _check_options(reduction, num_items_in_batch, logit_softcap, chunk_size)
    trains = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if reduction == "none" and trains:
        raise ValueError(
            'linear_cross_entropy: reduction "none" has no gradient for weight and bias, which ask for one'
        )
    if shift and labels.shape[-1] > 0:
        labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
        token_mask = None if token_mask is None else F.pad(token_mask[..., 1:], (0, 1), value=False)
    targets = _targets(labels, token_mask, weight.shape[0], ignore_index)
    if chunk_size is None:
        row_bytes = weight.shape[0] * weight.element_size()
        chunk_size = max(1, LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"]) // row_bytes)
    rows, summed = as_rows(hidden), reduction != "none"
    losses = _losses(rows, weight, bias, targets, chunk_size, logit_softcap, summed)
    if not summed:
        return losses.view(labels.shape)
    if reduction == "sum":
        return losses
    return losses / ((targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_size: int,
    softcap: float | None,
    summed: bool,
) -> Tensor:
    if _transforms_active():
        losses = reference.linear_cross_entropy(hidden, weight, bias, targets, softcap)
        return losses.sum() if summed else losses
    backend = backends.forced_backend()
    if not torch.is_grad_enabled():
        chunks = _Chunks(hidden, weight, bias, targets, chunk_size, softcap, (False, False, False), backend)
        return chunks.losses.sum() if summed else _at_rows(chunks.losses, chunks.rows, hidden.shape[0])
    return LinearCrossEntropyFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, targets, chunk_size, softcap, summed, backend
    )


def _targets(labels: Tensor, token_mask: Tensor | None, vocabulary: int, ignore_index: int) -> Tensor:
    """The labels of the rows, `[M]`, negative where there is none."""
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= vocabulary))
    expected = f"linear_cross_entropy: labels must be in [0, {vocabulary}) or {ignore_index}"
    if _host_reads(labels):
        if bool(wrong.any()):
            raise ValueError(f"{expected}, got {int(labels[wrong][0])}")
    else:
        torch._assert_async(~wrong.any(), expected)
    if token_mask is not None:
        counted = counted & token_mask
    return torch.where(counted, labels, -1).flatten()


def _check_tensors(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, token_mask: Tensor | None
) -> None:
    op = "linear_cross_entropy"
    if hidden.dim() < 1 or hidden.dtype not in _FLOATING:
        raise TypeError(
            f"{op}: hidden must be [..., H], float32, bfloat16, float16 or float64, got {_describe(hidden)}"
        )
    features = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must be [V >= 1, {features}], got {_describe(weight)}")
    others: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "weight": (weight, hidden.dtype, tuple(weight.shape)),
        "bias": (bias, hidden.dtype, (weight.shape[0],)),
        "labels": (labels, torch.int64, tuple(hidden.shape[:-1])),
        "token_mask": (token_mask, torch.bool, tuple(hidden.shape[:-1])),
    }
    for name, (tensor, dtype, shape) in others.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            name_of = str(dtype).removeprefix("torch.")
            raise TypeError(f"{op}: {name} must be {name_of}, got {_describe(tensor)}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {_describe(tensor)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on hidden's device, {hidden.device}, got {_describe(tensor)}")


def _check_options(
    reduction: str, num_items_in_batch: int | Tensor | None, logit_softcap: float | None, chunk_size: int | None
) -> None:
    op = "linear_cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f'{op}: num_items_in_batch is for reduction "mean", got it with {reduction!r}')
    if logit_softcap is not None and not logit_softcap > 0.0:
        raise ValueError(f"{op}: logit_softcap must be positive, got {logit_softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1 row, got {chunk_size}")
