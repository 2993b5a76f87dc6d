"""`S2FTLinear`, the drop-in for `nn.Linear` that trains whole channels of its weight."""

from __future__ import annotations

from typing import ClassVar

import torch

from .merged_linear import MergedLinear
from .s2ft_layer import Dim, S2FTLayer, checked_dim, number_of_channels, random_channels


class S2FTLinear(S2FTLayer, MergedLinear):
    """`y = x W^T + bias`, where some input or output channels of W train and the others are frozen.

    With `dim="input"` the slice `W[:, indices]` trains, and of x only the columns at indices are kept for backward;
    with `dim="output"` the slice `W[indices, :]`. The gradient is a dense product of that size. `trainable` holds the
    slice itself, not a change of it, so weight decay acts as it does when all of W trains; the layer writes it into
    `weight`, rounded once, when it has changed. Random input channels make this PaCA.

    Shapes: x `[..., K]`, weight `[N, K]`, bias `[N]`, indices `[s]`, y `[..., N]`, trainable and original `[N, s]` for
    input channels and `[s, K]` for output channels, K being `in_features` and N `out_features`. trainable is a
    Parameter; indices (int64; sorted, unique) and original (weight's dtype) are buffers. `state_dict` holds all of
    them; whether its `weight` has the trained slice in it does not matter, `original` settles it. A `state_dict` of the
    plain layer loads too (`strict=False`): then the slice is that of its weight.

    The weight belongs to the layer while it lives: share it with no other module (`inject` sees to that), and call
    `read_original` after changing it by hand. A change in place of `trainable.data` that torch does not count goes
    unseen outside of training: call `restore_weight` after it.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        ratio: share of the channels to train, in (0, 1], drawn at random.
        num_channels: or their number. One of the two.
        dim: "input" or "output".
        adapter_dtype: dtype of trainable. None means float32 over a float32, bfloat16 or float16 weight and float64
            over float64.

    Attributes:
        merged: whether the layer is a plain linear one with the slice in its weight, which gets no gradient.
        order: the channel that each place held before a co-permutation, an int64 buffer; None where nothing has moved.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS
    2024; Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025.
    """

    transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        ratio: float | None = None,
        num_channels: int | None = None,
        dim: Dim = "input",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        channels = in_features if checked_dim(dim) == "input" else out_features
        count = number_of_channels(channels, ratio, num_channels)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_slice(random_channels(channels, count), dim, adapter_dtype)
        self._freeze_base()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as `nn.Linear` does, and the channels at random; the slice is that of the weight."""
        super().reset_parameters()
        if "trainable" not in self._parameters or self.weight.is_meta:
            return
        self.indices.copy_(random_channels(self.channels, self.num_channels))
        self._filled = True
        self.read_original()
        self._after_reading()
