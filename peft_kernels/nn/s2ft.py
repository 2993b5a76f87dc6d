"""`S2FTLinear`, the drop-in for `nn.Linear` that trains whole channels of its weight."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops
from .linear import take_over, takeover_obstacle
from .merged_linear import MergedLinear, adapter_dtype_over, contiguity_obstacle

Dim = Literal["input", "output"]
_AXES = {"output": 0, "input": 1}


class S2FTLinear(MergedLinear):
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

    trainable: nn.Parameter
    dim: Dim
    order: Tensor | None

    trained_name: ClassVar[str] = "trainable"
    adapter_state: ClassVar[tuple[str, ...]] = (*MergedLinear.adapter_state, "dim", "order")

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
        channels = in_features if _checked_dim(dim) == "input" else out_features
        count = number_of_channels(channels, ratio, num_channels)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_slice(random_channels(channels, count), dim, adapter_dtype)
        self._freeze_base()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        indices: Tensor | None = None,
        dim: Dim = "input",
        ratio: float | None = None,
        num_channels: int | None = None,
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> S2FTLinear:
        """An `S2FTLinear` over an existing layer: the same weight and bias Parameters, now frozen.

        Device, training flag, extra attributes and forward and backward hooks come along. The weight is changed in
        place once the slice is.

        Args:
            linear: an `nn.Linear` proper with a contiguous weight.
            indices: `[s]`, int64: the channels, sorted and unique.
            dim: "input" for columns of weight, "output" for rows.
            ratio: or the share of the channels, in (0, 1], drawn at random.
            num_channels: or their number. One of the three.
            adapter_dtype: as in the constructor.
            generator: CPU generator for random channels; None means torch's default CPU generator.

        Raises:
            TypeError: `linear` cannot be replaced, or indices have another dtype; the message says why.
            ValueError: a hyperparameter is out of range, or indices are not sorted, unique and in range.
        """
        layer = cls.over(linear, indices, dim, ratio, num_channels, adapter_dtype, generator)
        layer._freeze_base()
        return layer

    @classmethod
    def over(
        cls,
        linear: nn.Linear,
        indices: Tensor | None = None,
        dim: Dim = "input",
        ratio: float | None = None,
        num_channels: int | None = None,
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> S2FTLinear:
        """`from_linear` without the freezing: `linear` and its parameters are left exactly as they are."""
        reason = takeover_obstacle(linear) or contiguity_obstacle(linear)
        if reason is not None:
            raise TypeError(f"{cls.__name__} cannot replace this layer: {reason}")
        channels = linear.in_features if _checked_dim(dim) == "input" else linear.out_features
        adapter_dtype_over(linear.weight, adapter_dtype)
        if indices is None:
            indices = random_channels(channels, number_of_channels(channels, ratio, num_channels), generator)
        elif ratio is not None or num_channels is not None:
            raise ValueError("give indices, ratio or num_channels, got more than one of them")
        else:
            ops.check_channels(indices, channels)
        layer = take_over(linear, cls)
        layer._add_slice(indices, dim, adapter_dtype)
        return layer

    def _add_slice(self, indices: Tensor, dim: Dim, adapter_dtype: torch.dtype | None) -> None:
        dtype = adapter_dtype_over(self.weight, adapter_dtype)
        self.dim = dim
        self.register_buffer("order", None)
        self.register_buffer("indices", indices.to(self.weight.device, copy=True))  # set_slice writes into it
        original = self._read_from(self.weight.detach())
        self.register_buffer("original", original)
        self.trainable = nn.Parameter(original.to(dtype, copy=True))
        self._begin()

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

    @property
    def axis(self) -> int:
        """The dimension of weight that channels are counted along: 1 for input channels, 0 for output channels."""
        return _AXES[self.dim]

    @property
    def channels(self) -> int:
        """How many channels the weight has along `dim`."""
        return self.in_features if self.dim == "input" else self.out_features

    @property
    def num_channels(self) -> int:
        """How many of them train."""
        return self.indices.numel()

    def forward(self, x: Tensor, x_slice: Tensor | None = None) -> Tensor:
        """x `[..., K]` to `[..., N]`; see `ops.s2ft_linear` for dtypes, errors, what is saved for backward.

        Args:
            x: the input.
            x_slice: `x[..., indices]`, where somebody has it already.
        """
        weight = self.weight
        if self.merged:
            return F.linear(x, weight, self.bias)
        regathered = self._write_before_use()
        y = ops.s2ft_linear(
            x, weight, self.bias, self.trainable, self.indices, self.dim, x_slice=x_slice, rewrite=regathered
        )
        self._doubt_after_backward(y)
        return y

    def change(self) -> Tensor:
        """What training has added to the slice so far: `trainable - original`, in trainable's dtype."""
        return self.trainable.detach() - self.original.to(self.trainable.dtype)

    @torch.no_grad()
    def set_slice(self, indices: Tensor, trainable: Tensor | None = None) -> None:
        """Trains other channels, as many as before; what has changed so far is taken out to the bit.

        Args:
            indices: `[s]`, int64, sorted and unique.
            trainable: their slice, shaped as before; None means that of the weight. The Parameter stays the same, so an
                optimizer keeps its state, which the caller moves along.

        Raises:
            TypeError, ValueError: indices or trainable do not fit; nothing has changed.
        """
        indices = self._checked_indices(indices)
        if indices.shape != self.indices.shape:
            raise ValueError(f"indices must be {list(self.indices.shape)}, as before, got {list(indices.shape)}")
        if trainable is not None and trainable.shape != self.trainable.shape:
            raise ValueError(f"trainable must be {list(self.trainable.shape)}, got {list(trainable.shape)}")
        if self.merged:
            raise ValueError("the slice is merged; unmerge it before moving it")
        self._restore()
        self.indices.copy_(indices)
        self.original.copy_(self._read_from(self.weight))
        self.trainable.copy_(self.original if trainable is None else trainable)

    def _write_into(self, weight: Tensor, restored: bool) -> None:
        write = backends.kernel("slice_write_", weight.device.type, weight.dtype)
        write(weight, self.indices, self.original if restored else self.trainable.detach(), self.axis)

    def _read_from(self, weight: Tensor) -> Tensor:
        return weight.index_select(self.axis, self.indices)

    def _checked_indices(self, indices: Tensor) -> Tensor:
        ops.check_channels(indices, self.channels)
        return indices

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name for name in ("weight", self.trained_name) if f"{prefix}{name}" in state_dict}
        if self.order is not None and given == {"weight"}:
            error_msgs.append(
                f"{prefix}weight: the layer's channels have moved (co_permute), those of a plain layer have not; load "
                "them before inject, or eject first"
            )
            return
        saved = state_dict.get(f"{prefix}order")
        if given and (saved is None) != (self.order is None):
            which = "the saved layer's" if saved is not None else "this layer's"
            error_msgs.append(f"{prefix}order: only {which} channels have moved (co_permute)")
            return
        if given and saved is not None and self.order is not None and not torch.equal(saved.cpu(), self.order.cpu()):
            error_msgs.append(f"{prefix}order: in the saved layer channels have moved (co_permute) to other places")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def _after_reading(self) -> None:
        self.trainable.copy_(self.original)

    def update_adamw(self, trained: Tensor, *state: Any) -> None:
        """A step of AdamW on the slice, and the write into weight; for `optim.SparseAdamW`, see `MergedLayer`."""
        *moments, step, lr, beta1, beta2, eps, weight_decay = state
        kernel = backends.kernel("slice_adamw_", trained.device.type, trained.dtype)
        target = (self.weight.detach(), self.indices, self.axis)
        kernel(trained, *moments, *target, step, lr, beta1, beta2, eps, weight_decay)

    def extra_repr(self) -> str:
        merged = ", merged=True" if self.merged else ""
        return f"{super().extra_repr()}, dim={self.dim!r}, num_channels={self.num_channels}{merged}"


def number_of_channels(channels: int, ratio: float | None, num_channels: int | None) -> int:
    """How many of `channels` train; raises ValueError unless exactly one of the two says so, in range."""
    if (ratio is None) == (num_channels is None):
        raise ValueError(f"give either ratio or num_channels, got ratio={ratio!r}, num_channels={num_channels!r}")
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
        return max(1, round(ratio * channels)) if channels else 0
    if isinstance(num_channels, bool) or not isinstance(num_channels, int) or not 0 <= num_channels <= channels:
        raise ValueError(f"num_channels must be an integer in [0, {channels}], got {num_channels!r}")
    return num_channels


def random_channels(channels: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of `channels`, drawn evenly without repetition: int64, sorted, on the CPU, so that one seed gives one
    choice on every device."""
    return torch.randperm(channels, generator=generator, device="cpu")[:count].sort().values


def _checked_dim(dim: str) -> str:
    if dim not in get_args(Dim):
        raise ValueError(f'dim must be "input" or "output", got {dim!r}')
    return dim
