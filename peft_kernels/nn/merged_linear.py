"""What the drop-ins share that train a part of a weight inside of the weight itself."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .linear import FLOATING, take_over
from .merged import Stamp, adopt, count_change, is_sharded, put, release


def adapter_dtype_over(weight: Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of what trains over `weight`; raises ValueError for one that the operators do not mix with it."""
    double = weight.dtype == torch.float64
    if adapter_dtype is None:
        return torch.float64 if double else torch.float32
    if adapter_dtype not in FLOATING or (adapter_dtype == torch.float64) != double:
        raise ValueError(
            "adapter_dtype must be float32, bfloat16 or float16 (float64 if and only if the weight is), "
            f"got {adapter_dtype} over a {weight.dtype} weight"
        )
    return adapter_dtype


def contiguity_obstacle(linear: nn.Module) -> str | None:
    """Why nothing can be written into this layer's weight; None when it can. Beyond `takeover_obstacle`."""
    weight = linear._parameters["weight"]
    if weight is not None and not weight.is_contiguous():
        return f"its weight is not contiguous (strides {list(weight.stride())})"
    return None


class MergedWeight(nn.Module):
    """A linear layer whose frozen `weight`, however it lies, holds what trains, at `indices`, written whenever that has
    changed.

    What the weight held there before is kept in `original`, so nothing accumulates, and taking the change out restores
    every bit. The layer writes before it computes; a change of what trains is seen by torch's own count of changes,
    and after a backward pass it is written anew in any case.

    A subclass says which Parameter trains, how it is written and read, and which plain layer it stands in for, and
    calls `_begin` when weight, original and what trains are there.

    Attributes:
        indices: which part of weight trains.
        original: what weight held there before, in weight's dtype.
        merged: whether the layer is a plain linear one with the change in its weight, and nothing trains.
    """

    indices: Tensor
    original: Tensor
    merged: bool

    trained_name: ClassVar[str]
    """Name of the Parameter that trains."""
    adapter_state: ClassVar[tuple[str, ...]] = ("indices", "original", "merged", "_stamp", "_filled", "_taken_out")
    """Names of all that the plain layer does not have."""

    @property
    @abstractmethod
    def plain_type(self) -> type[nn.Module]:
        """The class of the plain layer in whose place this one is."""

    @abstractmethod
    def _write_into(self, weight: Tensor, restored: bool) -> None:
        """Writes what trains into the plain tensor weight, or, when `restored`, the original bits."""

    @abstractmethod
    def _read_from(self, weight: Tensor) -> Tensor:
        """What weight holds at indices, a new tensor."""

    @abstractmethod
    def _checked_indices(self, indices: Tensor) -> Tensor:
        """`indices` in the layer's index dtype; raises TypeError or ValueError where they do not fit weight."""

    def _after_reading(self) -> None:
        """Called when a state_dict has replaced the weight below what trains, after `original` was read anew."""

    @property
    def trained(self) -> nn.Parameter:
        """The Parameter that trains."""
        return self._parameters[self.trained_name]  # type: ignore[return-value]

    def _begin(self) -> None:
        """To be called when weight, original and what trains agree for the first time."""
        self.merged = False
        self._taken_out = False
        self._filled = not self.weight.is_meta
        self._adopt()
        self._stamp.set(self.weight, self.trained)

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _adopt(self) -> None:
        """Makes the present weight and what trains the layer's own."""
        self._stamp = Stamp(self.weight)
        if not is_sharded(self.trained):
            adopt(self.trained, self)

    def _disown(self) -> None:
        """Lets go of them, until `_adopt`: torch does not swap a tensor that something refers to weakly."""
        self.__dict__.pop("_stamp", None)
        release(self.trained)

    def _doubt_after_backward(self, y: Tensor) -> None:
        """Has the next forward after y's backward write anew, however what trains is changed in between."""
        if not torch.compiler.is_compiling() and y.requires_grad and self.trained.requires_grad:
            stamp = self._stamp
            y.register_hook(lambda grad: stamp.doubt())

    def _write_before_use(self) -> bool:
        """Has weight hold what trains; returns whether weight may be gathered anew before backward."""
        if not self._filled and not self.weight.is_meta:
            or_reset = ", or call reset_parameters" if hasattr(self, "reset_parameters") else ""
            raise RuntimeError(
                f"{type(self).__name__} was made on the meta device and is not filled yet; load a state_dict into it"
                + or_reset
            )
        if torch.compiler.is_compiling():  # torch's counts are not known to a traced function: it writes every time
            self._put()
            return False
        self.write()
        return not self._stamp.owns(self.weight)

    def write(self) -> None:
        """Writes what trains into weight if it is not there yet; forward does so by itself."""
        if self._stamp.holds(self.weight, self.trained):
            return
        # What torch counts no change of, another backward pass that is still to come does not have to know either.
        self._put(counted=not self._stamp.counts_agree(self.weight, self.trained))
        self._stamp.set(self.weight, self.trained)
        self._taken_out = False

    def _put(self, restored: bool = False, counted: bool = True) -> None:
        put(self.weight, lambda weight: self._write_into(weight, restored), counted)

    def written(self) -> None:
        """To be called by an optimizer that has changed what trains and written it into weight in one pass."""
        count_change(self.trained)
        count_change(self.weight)
        self._stamp.set(self.weight, self.trained)
        self._taken_out = False

    def restore_weight(self) -> None:
        """Takes the change out of weight, to the bit; the next forward writes it again, and nothing before it."""
        self._restore()
        self._taken_out = True

    def _restore(self) -> None:
        self._stamp.clear()
        if self._filled and not self.weight.is_meta:
            self._put(restored=True)

    @torch.no_grad()
    def read_original(self) -> None:
        """Takes weight as it is now for the original one, after it was changed by hand."""
        self._stamp.clear()
        self.original.copy_(self._read_from(self.weight.detach()))

    def merge(self) -> None:
        """Computes as a plain linear layer with the change in its weight from now on; a second call warns."""
        if self.merged:
            warnings.warn(f"{type(self).__name__} is merged already; nothing to do", stacklevel=2)
            return
        self.write()
        self.merged = True

    def unmerge(self) -> None:
        """Undoes `merge` and takes the change out of weight, to the bit; it is an adapter again, which the next forward
        writes. Warns and does nothing when the layer is not merged."""
        if not self.merged:
            warnings.warn(f"{type(self).__name__} is not merged; nothing to do", stacklevel=2)
            return
        self.merged = False
        self.restore_weight()

    def to_linear(self, merge: bool) -> nn.Module:
        """The plain layer in this one's place, a `plain_type`, with its weight, bias, hooks, training flag and
        attributes.

        Args:
            merge: True leaves the change in the weight; False takes it out, to the bit.
        """
        if merge:
            self.write()
        else:
            self._restore()
        release(self.trained)  # an optimizer that still has it must not write into a weight that is no longer ours
        return take_over(self, self.plain_type, without=(*self.adapter_state, self.trained_name))

    def _apply(self, *args: Any, **kwargs: Any) -> MergedWeight:
        # In another dtype the rounding of the original weight is wanted, not that of one that was rounded before. What
        # was merged and has trained on since stays what was merged.
        rewritten = not self.merged or self._stamp.counts_agree(self.weight, self.trained)
        if rewritten:
            self._restore()
        before = self.indices
        self._disown()
        try:
            super()._apply(*args, **kwargs)
        finally:
            self._adopt()
        # to("meta") and to_empty leave nothing behind that could be read, and indices that could be anything.
        self._filled = self._filled and _same(before, self.indices)
        if self.merged and self._filled and rewritten:
            self.write()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_stamp"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Whoever takes `weight` alone out of it, as a plain layer does, gets what has been trained; the original one
        # after `restore_weight` and `unmerge`.
        plain = not self.weight.is_meta and not is_sharded(self.weight) and not self.weight.is_inference()
        if self._filled and plain and not (self.merged or self._taken_out) and not torch.is_inference_mode_enabled():
            self.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        names = ("weight", self.trained_name, "indices", "original")
        given = {name for name in names if f"{prefix}{name}" in state_dict}
        try:
            for name in sorted(given):
                _check_shape(name, state_dict[f"{prefix}{name}"], getattr(self, name).shape)
            if "indices" in given:
                self._checked_indices(state_dict[f"{prefix}indices"])
                if "weight" in given and "original" not in given:
                    raise ValueError(f"expected {prefix}original with them, without which the weight cannot be told")
            elif "original" in given:
                raise ValueError(f"expected with {prefix}original, which belongs to them, got nothing")
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}indices: {error}")
            return
        if not {"weight", "original"} <= given:  # else both are replaced, and original settles what weight holds
            self._restore()
        self._disown()
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._adopt()
        self._filled = self._filled or len(given) == 4
        if self._filled and not {"weight", "original"} <= given:  # weight is as it was before any change
            self.read_original()
            if self.trained_name not in given and given:
                self._after_reading()
        if self.merged:
            self.write()


class MergedLinear(MergedWeight, nn.Linear):
    """The same for `nn.Linear`."""

    @property
    def plain_type(self) -> type[nn.Module]:
        return nn.Linear


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, as in the layer, got {list(tensor.shape)}")


def _same(before: Tensor, after: Tensor) -> bool:
    """Whether indices have survived a move."""
    if before is after:
        return True
    return not after.is_meta and not before.is_meta and torch.equal(before.to(after.device), after)
