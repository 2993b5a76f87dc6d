"""What the drop-ins share that train whole channels of a weight, whichever way the weight lies."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops
from .linear import take_over, takeover_obstacle
from .merged_linear import MergedWeight, adapter_dtype_over, contiguity_obstacle

Dim = Literal["input", "output"]
_AXES = {"output": 0, "input": 1}


class S2FTLayer(MergedWeight):
    """A linear layer with the matrix W `[N, K]`, of which some input or output channels train.

    A subclass says whether its `weight` is W or, `transposed`, W^T; trainable and original lie as they do in weight.

    Attributes:
        in_features, out_features: K and N.
        dim: whether "input" or "output" channels train.
        order: the channel that each place held before a co-permutation, an int64 buffer; None where nothing has moved.
    """

    in_features: int
    out_features: int
    trainable: nn.Parameter
    dim: Dim
    order: Tensor | None

    transposed: ClassVar[bool]
    """Whether weight is `[K, N]`."""
    trained_name: ClassVar[str] = "trainable"
    adapter_state: ClassVar[tuple[str, ...]] = (*MergedWeight.adapter_state, "dim", "order")

    @classmethod
    def obstacle(cls, linear: nn.Module) -> str | None:
        """Why this drop-in cannot take the place of a module; None when it can."""
        return takeover_obstacle(linear, cls.transposed) or contiguity_obstacle(linear)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        indices: Tensor | None = None,
        dim: Dim = "input",
        ratio: float | None = None,
        num_channels: int | None = None,
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """The drop-in over an existing layer: the same weight and bias Parameters, now frozen.

        Device, training flag, extra attributes and forward and backward hooks come along. The weight is changed in
        place once the slice is.

        Args:
            linear: an `nn.Linear` proper, or a `Conv1D` for `S2FTConv1D`, with a contiguous weight.
            indices: `[s]`, int64: the channels, sorted and unique.
            dim: "input" for columns of W, "output" for rows.
            ratio: or the share of the channels, in (0, 1], drawn at random.
            num_channels: or their number. One of the three.
            adapter_dtype: dtype of trainable. None means float32 over a float32, bfloat16 or float16 weight and
                float64 over float64.
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
        linear: nn.Module,
        indices: Tensor | None = None,
        dim: Dim = "input",
        ratio: float | None = None,
        num_channels: int | None = None,
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """`from_linear` without the freezing: `linear` and its parameters are left exactly as they are."""
        reason = cls.obstacle(linear)
        if reason is not None:
            raise TypeError(f"{cls.__name__} cannot replace this layer: {reason}")
        channels = linear.weight.shape[_axis_of(checked_dim(dim), cls.transposed)]
        adapter_dtype_over(linear.weight, adapter_dtype)
        if indices is None:
            indices = random_channels(channels, number_of_channels(channels, ratio, num_channels), generator)
        elif ratio is not None or num_channels is not None:
            raise ValueError("give indices, ratio or num_channels, got more than one of them")
        else:
            ops.check_channels(indices, channels)
        layer = cls._taken_from(linear)
        layer._add_slice(indices, dim, adapter_dtype)
        return layer

    @classmethod
    def _taken_from(cls, linear: nn.Module) -> Self:
        """The drop-in with the state of `linear`, still without a slice."""
        return take_over(linear, cls)

    def _add_slice(self, indices: Tensor, dim: Dim, adapter_dtype: torch.dtype | None) -> None:
        dtype = adapter_dtype_over(self.weight, adapter_dtype)
        self.dim = dim
        self.register_buffer("order", None)
        self.register_buffer("indices", indices.to(self.weight.device, copy=True))  # set_slice writes into it
        original = self._read_from(self.weight.detach())
        self.register_buffer("original", original)
        self.trainable = nn.Parameter(original.to(dtype, copy=True))
        self._begin()

    @property
    def axis(self) -> int:
        """The dimension of weight that channels are counted along."""
        return _axis_of(self.dim, self.transposed)

    def oriented(self, part: Tensor) -> Tensor:
        """A part of weight, such as trainable, as it lies in W: `[N, s]` or `[s, K]`. A view; also the way back."""
        return part.t() if self.transposed else part

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
            return F.linear(x, self.oriented(weight), self.bias)
        regathered = self._write_before_use()
        what = (x, weight, self.bias, self.trainable, self.indices, self.dim)
        y = ops.s2ft_linear(*what, x_slice=x_slice, rewrite=regathered, transposed=self.transposed)
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
        """What a printed model shows of it."""
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


def checked_dim(dim: str) -> str:
    """`dim`, when it is one."""
    if dim not in get_args(Dim):
        raise ValueError(f'dim must be "input" or "output", got {dim!r}')
    return dim


def _axis_of(dim: str, transposed: bool) -> int:
    """The dimension that channels are counted along."""
    return 1 - _AXES[dim] if transposed else _AXES[dim]
