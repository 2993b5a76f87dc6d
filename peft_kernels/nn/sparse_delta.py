"""`SparseDeltaLinear`, the drop-in for `nn.Linear` that trains a few entries of its weight."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops
from ..ops.sparse_delta import Observer
from .linear import take_over, takeover_obstacle
from .merged import entries_of, update_delta
from .merged_linear import MergedLinear, adapter_dtype_over, contiguity_obstacle
from .positions import index_dtype, largest_positions, number_of, random_positions

SELECTIONS = ("random", "magnitude")


class SparseDeltaLinear(MergedLinear):
    """`y = x (W0 + scatter(indices, values))^T + bias`, at the cost of the frozen layer and a sampled gradient.

    `weight` itself holds the sum: the layer writes it when values have changed, before it is used, rounding
    `original + values` once, with `original = W0[indices]` kept beside. So nothing accumulates, and taking the delta
    out restores every bit. Any optimizer may train `values`; `optim.SparseAdamW` writes back in the same pass.

    Shapes: x `[..., K]`, weight `[N, K]`, bias `[N]`, values, indices and original `[nnz]`, y `[..., N]`, K being
    `in_features` and N `out_features`. values is a Parameter; indices (int32, or int64 over more than 2**31 elements;
    sorted, unique, flat positions `n K + k`) and original (weight's dtype) are buffers. `state_dict` holds all of them;
    whether its `weight` has the delta in it does not matter, `original` settles it. A `state_dict` of the plain layer
    loads too (`strict=False`), with `original` read from its weight.

    The weight belongs to the layer while it lives: share it with no other module (`inject` sees to that), and call
    `read_original` after changing it by hand. A change of values is seen by torch's own count of changes, and after a
    backward pass they are written anew in any case; only a change in place of `values.data` without one goes unseen:
    call `restore_weight` after it.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        density: share of the entries to train, in (0, 1].
        num_deltas: or their number. One of the two.
        selection: "random", or "magnitude" for the largest entries of the weight.
        adapter_dtype: dtype of values. None means float32 over a float32, bfloat16 or float16 weight and float64 over
            float64.

    Attributes:
        merged: whether the layer is a plain linear one with the delta in its weight, whose values get no gradient.
        gradient_observer: called in backward with dy `[M, N]` and x `[M, K]`, or None.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024.
    """

    values: nn.Parameter
    selection: str
    gradient_observer: Observer | None

    trained_name: ClassVar[str] = "values"
    adapter_state: ClassVar[tuple[str, ...]] = (*MergedLinear.adapter_state, "selection", "gradient_observer")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        density: float | None = None,
        num_deltas: int | None = None,
        selection: Literal["random", "magnitude"] = "random",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        count = number_of(in_features * out_features, density, num_deltas)
        _check_selection(selection)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_delta(_selected(self.weight, count, selection, None), selection, adapter_dtype)
        self._freeze_base()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        density: float | None = None,
        num_deltas: int | None = None,
        indices: Tensor | None = None,
        selection: Literal["random", "magnitude"] = "random",
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> SparseDeltaLinear:
        """A `SparseDeltaLinear` over an existing layer: the same weight and bias Parameters, now frozen.

        Device, training flag, extra attributes and forward and backward hooks come along. The weight is changed in
        place once the values are.

        Args:
            linear: an `nn.Linear` proper with a contiguous weight.
            density: share of the entries to train, in (0, 1].
            num_deltas: or their number.
            indices: or the positions `n K + k` themselves: int32 or int64, sorted and unique. One of the three.
            selection: as in the constructor.
            adapter_dtype: as in the constructor.
            generator: CPU generator for a random selection; None means torch's default CPU generator.

        Raises:
            TypeError: `linear` cannot be replaced, or indices have another dtype; the message says why.
            ValueError: a hyperparameter is out of range, or indices are not sorted, unique and in range.
        """
        layer = cls.over(linear, density, num_deltas, indices, selection, adapter_dtype, generator)
        layer._freeze_base()
        return layer

    @classmethod
    def over(
        cls,
        linear: nn.Linear,
        density: float | None = None,
        num_deltas: int | None = None,
        indices: Tensor | None = None,
        selection: Literal["random", "magnitude"] = "random",
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> SparseDeltaLinear:
        """`from_linear` without the freezing: `linear` and its parameters are left exactly as they are."""
        reason = takeover_obstacle(linear) or contiguity_obstacle(linear)
        if reason is not None:
            raise TypeError(f"{cls.__name__} cannot replace this layer: {reason}")
        _check_selection(selection)
        adapter_dtype_over(linear.weight, adapter_dtype)
        if indices is None:
            count = number_of(linear.weight.numel(), density, num_deltas)
            indices = _selected(linear.weight, count, selection, generator)
        elif density is not None or num_deltas is not None:
            raise ValueError("give density, num_deltas or indices, got more than one of them")
        else:
            indices = _checked(indices, linear.weight)
        layer = take_over(linear, cls)
        layer._add_delta(indices, selection, adapter_dtype)
        return layer

    def _add_delta(self, indices: Tensor, selection: str, adapter_dtype: torch.dtype | None) -> None:
        dtype = adapter_dtype_over(self.weight, adapter_dtype)
        self.selection = selection
        self.gradient_observer = None
        self.values = nn.Parameter(torch.zeros(indices.numel(), device=self.weight.device, dtype=dtype))
        self.register_buffer("indices", indices.to(self.weight.device, copy=True))  # set_delta writes into it
        self.register_buffer("original", self._read_from(self.weight))
        self._begin()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as `nn.Linear` does, and the positions as `selection` says; the values become zero."""
        super().reset_parameters()
        if "values" not in self._parameters or self.weight.is_meta:
            return
        self.indices.copy_(_selected(self.weight, self.num_deltas, self.selection, None))
        self.values.zero_()
        self._filled = True
        self.read_original()

    @property
    def num_deltas(self) -> int:
        """How many entries of the weight train."""
        return self.indices.numel()

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`; see `ops.sparse_delta_linear` for dtypes, errors, what is saved for backward."""
        weight = self.weight
        if self.merged:
            return F.linear(x, weight, self.bias)
        regathered = self._write_before_use()
        y = ops.sparse_delta_linear(
            x,
            weight,
            self.bias,
            self.values,
            self.indices,
            original=self._original_over(weight) if regathered else None,
            observer=self.gradient_observer,
        )
        self._doubt_after_backward(y)
        return y

    def _original_over(self, weight: Tensor) -> Tensor:
        """What `weight` holds without the delta: FSDP's mixed precision gathers it in another dtype."""
        return self.original.to(weight.dtype)

    def _write_into(self, weight: Tensor, restored: bool) -> None:
        write = backends.kernel("scatter_write_", weight.device.type, weight.dtype)
        values = None if restored else self.values.detach()
        write(weight, self.indices, self._original_over(weight), values)

    def _read_from(self, weight: Tensor) -> Tensor:
        return entries_of(weight, self.indices)

    def _checked_indices(self, indices: Tensor) -> Tensor:
        return _checked(indices, self.weight)

    def update_adamw(self, trained: Tensor, *state: Any) -> None:
        """A step of AdamW on values, and the write into weight; for `optim.SparseAdamW`, see `MergedLayer`."""
        update_delta(self, trained, *state)

    @torch.no_grad()
    def set_delta(self, indices: Tensor, values: Tensor | None = None) -> None:
        """Moves the delta to other positions, as many as before; what it has changed so far is taken out to the bit.

        Args:
            indices: `[nnz]`, int32 or int64, sorted, unique positions.
            values: `[nnz]`; None means zeros. The Parameter stays the same, so an optimizer keeps its state, which the
                caller moves along.

        Raises:
            TypeError, ValueError: indices or values do not fit; nothing has changed.
        """
        indices = self._checked_indices(indices)
        if indices.shape != self.indices.shape:
            raise ValueError(f"indices must be {list(self.indices.shape)}, as before, got {list(indices.shape)}")
        if values is not None and values.shape != indices.shape:
            raise ValueError(f"values must be {list(indices.shape)} to match indices, got {list(values.shape)}")
        if self.merged:
            raise ValueError("the delta is merged; unmerge it before moving it")
        self._restore()
        self.indices.copy_(indices)
        self.original.copy_(entries_of(self.weight, self.indices))
        self.values.zero_() if values is None else self.values.copy_(values)

    def extra_repr(self) -> str:
        merged = ", merged=True" if self.merged else ""
        density = self.num_deltas / max(self.weight.numel(), 1)
        return f"{super().extra_repr()}, num_deltas={self.num_deltas} ({density:.3%}){merged}"


def _check_selection(selection: str) -> None:
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")


def _selected(weight: Tensor, count: int, selection: str, generator: torch.Generator | None) -> Tensor:
    if selection == "magnitude":
        return largest_positions(weight.detach().abs(), count)
    return random_positions(weight.numel(), count, generator)


def _checked(indices: Tensor, weight: Tensor) -> Tensor:
    """indices in the layer's index dtype, once they are known to be positions in weight."""
    ops.check_indices(indices, weight.numel())
    return indices.to(index_dtype(weight.numel()))
