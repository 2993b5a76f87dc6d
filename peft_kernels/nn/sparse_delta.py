"""`SparseDeltaLinear`, the drop-in for `nn.Linear` that trains a few entries of its weight."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.sparse_delta import Observer
from .linear import FLOATING, take_over, takeover_obstacle
from .merged import Stamp, adopt, count_change, entries_of, is_sharded, release, write_delta
from .positions import index_dtype, largest_positions, number_of, random_positions

SELECTIONS = ("random", "magnitude")
_ADAPTER_STATE = ("values", "indices", "original", "merged", "selection", "gradient_observer", "_stamp", "_filled")


def values_dtype_over(weight: Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """The deltas' dtype over `weight`; raises ValueError for one that the operators do not mix with it."""
    double = weight.dtype == torch.float64
    if adapter_dtype is None:
        return torch.float64 if double else torch.float32
    if adapter_dtype not in FLOATING or (adapter_dtype == torch.float64) != double:
        raise ValueError(
            "adapter_dtype must be float32, bfloat16 or float16 (float64 if and only if the weight is), "
            f"got {adapter_dtype} over a {weight.dtype} weight"
        )
    return adapter_dtype


class SparseDeltaLinear(nn.Linear):
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
    indices: Tensor
    original: Tensor
    merged: bool
    selection: str
    gradient_observer: Observer | None

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
        reason = takeover_obstacle(linear) or delta_obstacle(linear)
        if reason is not None:
            raise TypeError(f"{cls.__name__} cannot replace this layer: {reason}")
        _check_selection(selection)
        values_dtype_over(linear.weight, adapter_dtype)
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

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _add_delta(self, indices: Tensor, selection: str, adapter_dtype: torch.dtype | None) -> None:
        dtype = values_dtype_over(self.weight, adapter_dtype)
        self.merged = False
        self.selection = selection
        self.gradient_observer = None
        self.values = nn.Parameter(torch.zeros(indices.numel(), device=self.weight.device, dtype=dtype))
        self.register_buffer("indices", indices.to(self.weight.device, copy=True))  # set_delta writes into it
        self.register_buffer("original", entries_of(self.weight, self.indices))
        self._filled = not self.weight.is_meta
        self._adopt()
        self._stamp.set(self.weight, self.values)  # weight + 0

    def _adopt(self) -> None:
        """Makes the present weight and values the layer's own."""
        self._stamp = Stamp(self.weight)
        if not is_sharded(self.values):
            adopt(self.values, self)

    def _disown(self) -> None:
        """Lets go of them, until `_adopt`: torch does not swap a tensor that something refers to weakly."""
        self.__dict__.pop("_stamp", None)
        release(self.values)

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
        original = self._write_before_use()
        y = ops.sparse_delta_linear(
            x, weight, self.bias, self.values, self.indices, original=original, observer=self.gradient_observer
        )
        self._doubt_after_backward(y)
        return y

    def _doubt_after_backward(self, y: Tensor) -> None:
        """Has the next forward after y's backward write values again, however they are changed in between."""
        if not torch.compiler.is_compiling() and y.requires_grad and self.values.requires_grad:
            stamp = self._stamp
            y.register_hook(lambda grad: stamp.doubt())

    def _write_before_use(self) -> Tensor | None:
        """Has weight hold the delta; returns `original` where weight may be gathered anew before backward."""
        if not self._filled and not self.weight.is_meta:
            raise RuntimeError(
                f"{type(self).__name__} was made on the meta device and is not filled yet; load a state_dict into it, "
                "or call reset_parameters"
            )
        if torch.compiler.is_compiling():  # torch's counts are not known to a traced function: it writes every time
            write_delta(self.weight, self.indices, self._original_over(self.weight), self.values)
            return None
        self.write()
        return None if self._stamp.owns(self.weight) else self._original_over(self.weight)

    def write(self) -> None:
        """Writes the delta into weight if it is not there yet; forward does so by itself."""
        if self._stamp.holds(self.weight, self.values):
            return
        # What torch counts no change of, another backward pass that is still to come does not have to know either.
        counted = not self._stamp.counts_agree(self.weight, self.values)
        write_delta(self.weight, self.indices, self._original_over(self.weight), self.values, counted)
        self._stamp.set(self.weight, self.values)

    def _original_over(self, weight: Tensor) -> Tensor:
        """What `weight` holds without the delta: FSDP's mixed precision gathers it in another dtype."""
        return self.original.to(weight.dtype)

    def written(self) -> None:
        """To be called by an optimizer that has changed values and written them into weight in one pass."""
        count_change(self.values)
        count_change(self.weight)
        self._stamp.set(self.weight, self.values)

    def restore_weight(self) -> None:
        """Takes the delta out of weight, to the bit; the next forward writes it again."""
        self._stamp.clear()
        if self._filled and not self.weight.is_meta:
            write_delta(self.weight, self.indices, self.original, None)

    @torch.no_grad()
    def read_original(self) -> None:
        """Takes weight as it is now for the original one, after it was changed by hand."""
        self._stamp.clear()
        self.original.copy_(entries_of(self.weight, self.indices))

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
        indices = _checked(indices, self.weight)
        if indices.shape != self.indices.shape:
            raise ValueError(f"indices must be {list(self.indices.shape)}, as before, got {list(indices.shape)}")
        if values is not None and values.shape != indices.shape:
            raise ValueError(f"values must be {list(indices.shape)} to match indices, got {list(values.shape)}")
        if self.merged:
            raise ValueError("the delta is merged; unmerge it before moving it")
        self.restore_weight()
        self.indices.copy_(indices)
        self.original.copy_(entries_of(self.weight, self.indices))
        self.values.zero_() if values is None else self.values.copy_(values)

    def merge(self) -> None:
        """Computes as a plain linear layer with the delta in its weight from now on; a second call warns."""
        if self.merged:
            warnings.warn(f"{type(self).__name__} is merged already; nothing to do", stacklevel=2)
            return
        self.write()
        self.merged = True

    def unmerge(self) -> None:
        """Undoes `merge` and takes the delta out of weight, to the bit; it is an adapter again, which the next forward
        writes. Warns and does nothing when the layer is not merged."""
        if not self.merged:
            warnings.warn(f"{type(self).__name__} is not merged; nothing to do", stacklevel=2)
            return
        self.merged = False
        self.restore_weight()

    def to_linear(self, merge: bool) -> nn.Linear:
        """A plain `nn.Linear` in this layer's place, with its weight, bias, hooks, training flag and attributes.

        Args:
            merge: True leaves the delta in the weight; False takes it out, to the bit.
        """
        if merge:
            self.write()
        else:
            self.restore_weight()
        return take_over(self, nn.Linear, without=_ADAPTER_STATE)

    def _apply(self, *args: Any, **kwargs: Any) -> SparseDeltaLinear:
        # In another dtype the rounding of W0 is wanted, not that of W0 + delta rounded before.
        self.restore_weight()
        before = self.indices
        self._disown()
        try:
            super()._apply(*args, **kwargs)
        finally:
            self._adopt()
        # to("meta") and to_empty leave nothing behind that could be read, and positions that could be anywhere.
        self._filled = self._filled and _same(before, self.indices)
        if self.merged and self._filled:
            self.write()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_stamp"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()

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
        given = {name for name in ("weight", "values", "indices", "original") if f"{prefix}{name}" in state_dict}
        try:
            for name in sorted(given):
                _check_shape(name, state_dict[f"{prefix}{name}"], getattr(self, name).shape)
            if "indices" in given:
                _checked(state_dict[f"{prefix}indices"], self.weight)
                if "weight" in given and "original" not in given:
                    raise ValueError(f"expected {prefix}original with them, without which the weight cannot be told")
            elif "original" in given:
                raise ValueError(f"expected with {prefix}original, which belongs to them, got nothing")
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}indices: {error}")
            return
        if not {"weight", "original"} <= given:  # else both are replaced, and original settles what weight holds
            self.restore_weight()
        self._disown()
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._adopt()
        self._filled = self._filled or len(given) == 4
        if self._filled and not {"weight", "original"} <= given:  # weight is as it was before any delta
            self.read_original()
        if self.merged:
            self.write()

    def extra_repr(self) -> str:
        merged = ", merged=True" if self.merged else ""
        density = self.num_deltas / max(self.weight.numel(), 1)
        return f"{super().extra_repr()}, num_deltas={self.num_deltas} ({density:.3%}){merged}"


def delta_obstacle(linear: nn.Module) -> str | None:
    """Why a delta cannot be written into this layer's weight; None when it can. Beyond `takeover_obstacle`."""
    weight = linear._parameters["weight"]
    if weight is not None and not weight.is_contiguous():
        return f"its weight is not contiguous (strides {list(weight.stride())})"
    return None


def _check_selection(selection: str) -> None:
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")


def _selected(weight: Tensor, count: int, selection: str, generator: torch.Generator | None) -> Tensor:
    if selection == "magnitude":
        return largest_positions(weight.detach().abs(), count)
    return random_positions(weight.numel(), count, generator)


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, as in the layer, got {list(tensor.shape)}")


def _same(before: Tensor, after: Tensor) -> bool:
    """Whether positions have survived a move."""
    if before is after:
        return True
    return not after.is_meta and not before.is_meta and torch.equal(before.to(after.device), after)


def _checked(indices: Tensor, weight: Tensor) -> Tensor:
    """indices in the layer's index dtype, once they are known to be positions in weight."""
    ops.check_indices(indices, weight.numel())
    return indices.to(index_dtype(weight.numel()))
