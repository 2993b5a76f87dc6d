"""`WTACRSLinear`, the drop-in for a trainable `nn.Linear` that keeps some rows of its input for the weight gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .linear import take_over, takeover_obstacle
from .row_sampling import RowSampling


class WTACRSLinear(nn.Linear):
    """`y = x weight^T + bias`, trained by an unbiased estimate of weight's gradient from a sample of x's rows.

    Shapes: x `[..., K]`, weight `[N, K]`, bias `[N]`, y `[..., N]`. Parameters, their names and `state_dict` are those
    of `nn.Linear`. Output and the gradients of x and bias are exact. In evaluation, and while weight does not train, it
    is an `nn.Linear`.

    Of M rows `ceil(keep_ratio M)` are kept: those of the largest norms for certain, the others drawn. Layers that get
    the same tensor share a sample; see `row_sampling`, and `ops.sampled_linear` for what is saved.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        keep_ratio: share of the rows that are kept, in (0, 1].

    Attributes:
        row_sampling: the `RowSampling`; its `keep_ratio` and `grad_norms` may be changed at any time.

    Raises:
        ValueError: keep_ratio is not in (0, 1].

    Source: Liu et al., "Winner-Take-All Column Row Sampling", NeurIPS 2023.
    """

    row_sampling: RowSampling

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        keep_ratio: float = 0.3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        row_sampling = RowSampling(keep_ratio)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.row_sampling = row_sampling

    @classmethod
    def from_linear(cls, linear: nn.Linear, keep_ratio: float = 0.3) -> WTACRSLinear:
        """A `WTACRSLinear` over an existing layer: the same Parameters, hooks, flags and attributes, nothing copied.

        Raises:
            TypeError: `linear` cannot be replaced; the message says why.
            ValueError: keep_ratio is not in (0, 1].
        """
        row_sampling = RowSampling(keep_ratio)
        reason = takeover_obstacle(linear)
        if reason is not None:
            raise TypeError(f"WTACRSLinear cannot replace this layer: {reason}")
        layer = take_over(linear, cls)
        layer.row_sampling = row_sampling
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`; see `ops.sampled_linear` for dtypes, errors and what is saved for backward."""
        sample = self.row_sampling.sample(x, self.weight.requires_grad) if self.training else None
        return ops.sampled_linear(x, self.weight, self.bias, sample)

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` in this layer's place, with its Parameters, hooks, flags and attributes."""
        return take_over(self, nn.Linear, without=("row_sampling",))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep_ratio={self.row_sampling.keep_ratio:g}"
