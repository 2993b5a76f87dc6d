"""Cross entropy of a language model in plain PyTorch: the definition of the operators that never hold all logits.

With `logits = hidden weight^T [M, V]`, for each row m with a label: `loss[m] = logsumexp(logits[m]) -
logits[m, label]`, and `dlogits[m] = scale (softmax(logits[m]) - onehot(label))`.

Source: Hsu et al., "Liger Kernel", 2024, and Luo et al., "Mini-Sequence Transformers", 2024: logits in chunks of rows,
their gradient formed in forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lora import accumulation_dtype


def cross_entropy_rows_(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Losses of the rows of logits, which become `scale` times their own gradient, in place.

    Args:
        logits: `[C, V]`, any floating dtype, rows contiguous; overwritten, each number rounded once.
        labels: int64 `[C]`; a negative one stands for no label: its loss and its gradient are zero.
        scale: factor of the gradient; 0 where only losses are wanted, which leaves zeros whatever the logits are.

    Returns:
        `[C]` in the accumulation dtype.
    """
    wide = logits.to(accumulation_dtype(logits.dtype))
    labeled = labels >= 0
    total = wide.logsumexp(1)
    target = labels.clamp(min=0)[:, None]
    losses = torch.where(labeled, total - wide.gather(1, target)[:, 0], torch.zeros_like(total))
    if scale == 0.0:
        logits.zero_()
        return losses
    grad = (wide - total[:, None]).exp()
    grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide.dtype))
    logits.copy_(torch.where(labeled[:, None], grad * scale, torch.zeros((), dtype=wide.dtype, device=wide.device)))
    return losses


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> Tensor:
    """Losses of the rows from all logits at once: hidden `[M, H]`, weight `[V, H]`, bias `[V]`, labels int64 `[M]`.

    Logits are `c tanh(logits / c)` for a softcap c. A negative label stands for none, and its loss is zero. The result
    `[M]` is in the accumulation dtype.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    wide = logits.to(accumulation_dtype(logits.dtype))
    return torch.nn.functional.cross_entropy(wide, labels.clamp(min=-1), ignore_index=-1, reduction="none")
