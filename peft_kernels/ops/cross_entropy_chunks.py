"""The pass over hidden that forms losses and gradients from the logits of a chunk of rows at a time.

A chunk's logits become their own gradient in place and are multiplied on at once, so that backward only scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.lora import accumulation_dtype
from . import counted_labels
from .counted_labels import Counted


class Chunks:
    """One pass over the counted rows: losses, and the gradients of their sum that are wanted.

    Attributes:
        losses: `[S]` in the accumulation dtype, times the rows' weights.
        grad_hidden: `[S, H]`, of the losses without the rows' weights; None unless wanted, as those below.
        grad_weight, grad_bias: of the losses' sum, in the accumulation dtype.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        counted: Counted,
        chunk_size: int,
        softcap: float | None,
        needs: tuple[bool, bool, bool],
        backend: str | None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.softcap, self.needs = hidden, weight, bias, softcap, needs
        self.kernel = backends.kernel("cross_entropy_rows_", hidden.device.type, hidden.dtype, backend)
        self.targets, self.rows, self.weights = counted
        self.all_labeled = counted_labels.host_reads(self.targets)  # the others were left out
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
        if self.weights is not None:
            self.losses = self.losses * self.weights
        self.buffer = None

    def result(self, scale: Tensor | None, summed: bool) -> Tensor:
        """The sum of the losses times scale, or the losses of all M rows."""
        if not summed:
            return at_rows(self.losses, self.rows, self.hidden.shape[0])
        return self.losses.sum() if scale is None else self.losses.sum() * scale

    def _chunk(self, begin: int, end: int) -> Tensor:
        hidden = self.hidden[begin:end]
        if self.rows is not None:
            hidden = self.hidden.index_select(0, self.rows[begin:end])
        if not self.all_labeled:
            # What a row without a label holds may not be finite, and 0 NaN would be in the sums.
            hidden = torch.where((self.targets[begin:end] >= 0)[:, None], hidden, 0.0)
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
        weights = None if self.weights is None else self.weights[begin:end, None]
        if self.grad_weight is not None:
            # On the rows of hidden, which are shorter than those of the logits.
            self._add_weight_gradient(logits, hidden if weights is None else (hidden * weights).to(hidden.dtype))
        if self.grad_bias is not None:
            logits = logits if weights is None else logits.mul_(weights)
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
        elif grad.dtype != torch.float16:
            self.grad_weight.add_(grad.t() @ hidden)
        elif grad.device.type == "cuda":  # a sum over the rows may be out of float16's range
            self.grad_weight.add_(torch.mm(grad.t(), hidden, out_dtype=self.grad_weight.dtype))
        else:
            self.grad_weight.addmm_(grad.t().float(), hidden.float())


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Forward and backward of `linear_cross_entropy`: the losses of the rows, or their sum times a scale.

    Saved for backward: the gradient of hidden, `[S, H]` of the S rows that were computed, which rows these are, and
    their weights; the gradients of weight and bias if they train, not scaled yet.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor | None,
        token_weights: Tensor | None,
        scale: Tensor | None,
        chunk_size: int,
        softcap: float | None,
        summed: bool,
        backend: str | None,
    ) -> Tensor:
        counted = Counted(targets, rows, token_weights)
        chunks = Chunks(hidden, weight, bias, counted, chunk_size, softcap, ctx.needs_input_grad[:3], backend)
        # Undivided sums may be out of float16's range, and divided ones below it before a loss scale is on them.
        kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_weight = None if chunks.grad_weight is None else chunks.grad_weight.to(kept)
        grad_bias = None if chunks.grad_bias is None else chunks.grad_bias.to(kept)
        ctx.save_for_backward(chunks.grad_hidden, rows, token_weights, scale, grad_weight, grad_bias)
        ctx.shape, ctx.dtype, ctx.summed = hidden.shape, hidden.dtype, summed
        return chunks.result(scale, summed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        grad_hidden, rows, token_weights, scale, grad_weight, grad_bias = ctx.saved_tensors
        grad = grad if scale is None else grad * scale
        if grad_hidden is not None:
            factors = grad if ctx.summed or rows is None else grad.index_select(0, rows)
            if token_weights is not None:
                factors = factors * token_weights
            grad_hidden = at_rows(scaled(grad_hidden, factors.reshape(-1, 1), ctx.dtype), rows, ctx.shape[0])
        grad_weight = None if grad_weight is None else scaled(grad_weight, grad.reshape(1, 1), ctx.dtype)
        grad_bias = None if grad_bias is None else scaled(grad_bias, grad.reshape(1), ctx.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None, None, None


def scaled(values: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """values times factors of as many dimensions, in the wider dtype, rounded once.

    A factor without dimensions would be rounded to the dtype of values first on a GPU: 65536 is inf in float16.
    """
    return (values * factors).to(dtype)


def at_rows(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """values at rows of a tensor of `count` rows of zeros."""
    return values if rows is None else values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)
