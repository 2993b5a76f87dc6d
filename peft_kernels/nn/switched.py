"""A frozen weight that holds one of several sparse deltas, or none: whichever was asked for last.

Adapters come and go over one base layer. Whoever is about to compute asks for a delta with `hold`, or for the plain
weight with `restore`; both do nothing where the weight is in that state already. What it held before the delta is kept
only while the delta is in it, and read anew for the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .merged import Stamp, adopt, count_change, entries_of, layer_of, release, update_delta, write_delta
from .positions import index_dtype


@dataclass(frozen=True, eq=False)
class Positions:
    """Where the values of a delta belong.

    Attributes:
        indices: `[nnz]`, sorted, unique, flat positions in the weight.
        order: `values[order]` belong to indices, one by one; None where values are in that order themselves.
        inverse: the inverse of order.
    """

    indices: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, positions: Tensor, numel: int) -> Positions:
        """Those of values that belong to the flat `positions [nnz]`, in any order, of a weight of `numel` elements.

        Raises:
            TypeError, ValueError: positions are no integers, repeat, or are out of range.
        """
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices must be int32 or int64, got {positions.dtype}")
        positions = positions.detach().contiguous()
        if bool((positions[1:] > positions[:-1]).all()):
            ops.check_indices(positions, numel)
            return cls(positions.to(index_dtype(numel)))
        indices, order = positions.sort(stable=True)
        ops.check_indices(indices, numel)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
        small = index_dtype(len(order))
        return cls(indices.to(index_dtype(numel)), order.to(small), inverse.to(small))

    def arranged(self, values: Tensor) -> Tensor:
        """values in the order of indices."""
        if self.order is None or self.inverse is None:
            return values
        return ops.reordered(values, self.order, self.inverse)


class SwitchedWeight:
    """Keeps a weight in the state that was asked for; a `DeltaLayer` for the values that are in it.

    The weight is this object's to write while it lives: nobody else should change it while a delta is in it.

    Attributes:
        weight: `[N, K]`, contiguous.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._original: Tensor | None = None
        self._positions: Positions | None = None
        self._scaling = 1.0
        self._registered: tuple[Tensor, Positions] | None = None  # what an optimizer may write
        self._stamp = Stamp(weight)

    @property
    def indices(self) -> Tensor:
        """`[nnz]`, sorted, unique, flat positions of the delta that weight holds."""
        if self._positions is None:
            raise RuntimeError("the weight holds no delta")
        return self._positions.indices

    @property
    def original(self) -> Tensor:
        """`[nnz]` in weight's dtype: what weight held at indices before."""
        if self._original is None:
            raise RuntimeError("the weight holds no delta")
        return self._original

    @property
    def merged(self) -> bool:
        """Whether the weight does not hold the registered values as they are, so that an optimizer leaves it alone."""
        registered = None if self._registered is None else self._registered[1]
        return registered is None or self._positions is not registered or self._scaling != 1.0

    @property
    def holds_delta(self) -> bool:
        """Whether any delta is in the weight."""
        return self._positions is not None

    def holds(self, positions: Positions, values: Tensor, scaling: float, doubted: bool = False) -> bool:
        """Whether weight holds `scaling values` at positions; for certain, unless `doubted` will do."""
        if self._positions is not positions or self._scaling != scaling:
            return False
        return self._stamp.counts_agree(self.weight, values) if doubted else self._stamp.holds(self.weight, values)

    def doubt(self) -> None:
        """To be called in backward: values may change next without torch counting it, and `hold` writes them again."""
        self._stamp.doubt()

    def hold(self, positions: Positions, values: Tensor, scaling: float) -> None:
        """Makes weight hold `original + scaling values`, rounded once, and the original bits everywhere else."""
        # Torch's counts are not known to a traced function: it writes every time.
        if torch.compiler.is_compiling() or not self.holds(positions, values, scaling):
            self._write(positions, values, scaling)

    @torch.no_grad()
    def _write(self, positions: Positions, values: Tensor, scaling: float) -> None:
        if self._positions is not positions:
            self.restore()
            self._original = entries_of(self.weight, positions.indices)
            self._positions = positions
        change = positions.arranged(values.detach())
        write_delta(self.weight, positions.indices, self.original, change if scaling == 1.0 else change * scaling)
        self._scaling = scaling
        if torch.compiler.is_compiling():
            self._stamp.clear()
            return
        self._stamp.set(self.weight, values)
        self._register(values if scaling == 1.0 and positions.order is None else None, positions)

    def restore(self) -> None:
        """Takes the delta out of weight, to the bit."""
        if self._positions is None:
            return
        write_delta(self.weight, self._positions.indices, self.original, None)
        self._original = self._positions = None
        self._stamp.clear()
        if not torch.compiler.is_compiling():
            self._register(None, None)

    def update_adamw(self, trained: Tensor, *state: Any) -> None:
        """A step of AdamW on the registered values, and the write into weight; see `MergedLayer`."""
        update_delta(self, trained, *state)

    def written(self) -> None:
        """To be called by an optimizer that has changed the registered values and written them into weight."""
        if self._registered is None or self.merged:
            raise RuntimeError("the weight holds no values that an optimizer could have written")
        values, _ = self._registered
        count_change(values)
        count_change(self.weight)
        self._stamp.set(self.weight, values)

    def _register(self, values: Tensor | None, positions: Positions | None) -> None:
        before = None if self._registered is None else self._registered[0]
        if before is not None and before is not values and layer_of(before) is self:
            release(before)
        if values is None or positions is None or not values.is_leaf:
            self._registered = None
            return
        self._registered = values, positions
        if before is not values:
            adopt(values, self)
