"""What a delta is: per tensor of a base model, numbers to add at some of its positions.

`Delta` is a mapping from tensor names, in sorted order, to `Entry`. It may lie in memory (`SparseDelta`), in a file
(`DeltaFile`), or be computed from others an entry at a time when it is asked for (`ComputedDelta`), so that whole
chains of methods need the memory of a few tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.deltas import index_dtype
from ..ops.sparse_delta import check_indices

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Spec:
    """What is known of an entry without reading it.

    Attributes:
        shape: of the base model's tensor.
        dtype: of the base model's tensor.
        values_dtype: of the entry's values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    values_dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of the base model's tensor."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """The length of a row, along the last dimension."""
        return max(1, self.shape[-1]) if self.shape else 1


@dataclass(frozen=True)
class Entry:
    """A delta in one tensor.

    Attributes:
        indices: `[nnz]`, sorted, unique, flat positions, int32 (int64 where the tensor has 2^31 elements or more);
            None where every position has a value.
        values: `[nnz]`, floating point.
        spec: shape and dtypes.
    """

    indices: Tensor | None
    values: Tensor
    spec: Spec

    @property
    def nnz(self) -> int:
        """How many values."""
        return self.values.numel()

    @property
    def packed_indices(self) -> Tensor:
        """The indices as the operators take them: of shape `[0]` for None."""
        return self.values.new_empty(0, dtype=torch.int32) if self.indices is None else self.indices

    def positions(self) -> Tensor:
        """The indices, made where every position has a value."""
        if self.indices is not None:
            return self.indices
        return torch.arange(self.nnz, dtype=index_dtype(self.spec.numel), device=self.values.device)

    def dense(self) -> Tensor:
        """The delta as a tensor of the base model's shape, zero where there is no entry."""
        if self.indices is None:
            return self.values.reshape(self.spec.shape).clone()
        result = self.values.new_zeros(self.spec.numel)
        result[self.indices.to(torch.int64)] = self.values
        return result.view(self.spec.shape)

    def check(self, name: str) -> None:
        """Raises ValueError or TypeError, naming the tensor, unless everything is as the attributes say, and finite."""
        values, numel = self.values, self.spec.numel
        if values.dtype != self.spec.values_dtype or values.dtype not in VALUE_DTYPES:
            raise TypeError(
                f"{name}: values must be {dtype_name(self.spec.values_dtype)}, got {dtype_name(values.dtype)}"
            )
        if values.dim() != 1 or not values.is_contiguous():
            raise ValueError(f"{name}: values must be 1-D and contiguous, got {list(values.shape)}")
        count = numel if self.indices is None else self.indices.numel()
        if values.numel() != count:
            raise ValueError(f"{name}: values must be [{count}], one for each position, got {list(values.shape)}")
        if self.indices is not None:
            if numel > 2**31 - 1 and self.indices.dtype != torch.int64:
                raise TypeError(f"{name}: indices must be int64 for {numel} elements, got {self.indices.dtype}")
            _check_indices(name, self.indices, numel)
        if values.numel() and not all(math.isfinite(bound) for bound in values.aminmax()):
            raise ValueError(f"{name}: values must be finite, got NaN or infinity")


def _check_indices(name: str, indices: Tensor, numel: int) -> None:
    if indices.dim() == 1 and indices.dtype in (torch.int32, torch.int64) and indices.numel():
        # What rises from its first element to its last is in range when these two are.
        ends = int(indices[0]) >= 0 and int(indices[-1]) < numel
        if ends and indices.is_contiguous() and bool((indices[1:] > indices[:-1]).all()):
            return
    try:
        check_indices(indices, numel)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


class Delta(Mapping[str, Entry]):
    """A mapping from tensor names to entries; see the module.

    Attributes:
        specs: shapes and dtypes by name, in sorted order of names.
        base_model: what it is to be added to, where that is known.
        history: how it was made, one step per text.
    """

    def __init__(self, specs: Mapping[str, Spec], base_model: str | None, history: Sequence[str]) -> None:
        self.specs: dict[str, Spec] = dict(sorted(specs.items()))
        self.base_model = base_model
        self.history = tuple(history)

    def __getitem__(self, name: str) -> Entry:
        """The entry of tensor `name`; read or computed anew each time where it is not in memory."""
        if name not in self.specs:
            raise KeyError(name)
        return self.entry(name)

    def entry(self, name: str) -> Entry:
        """The entry of a tensor that is known to be there."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    @property
    def numel(self) -> int:
        """Elements of all tensors that it may change."""
        return sum(spec.numel for spec in self.specs.values())


class SparseDelta(Delta):
    """A delta in memory.

    Args:
        entries: entries by tensor name, another delta to hold in memory, or (name, entry) pairs.
        base_model: what it is to be added to; by default what the other delta says.
        history: how it was made; by default what the other delta says.

    Raises:
        TypeError, ValueError: an entry is not as `Entry` wants it.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry] | Iterable[tuple[str, Entry]],
        *,
        base_model: str | None = None,
        history: Sequence[str] = (),
    ) -> None:
        if isinstance(entries, Delta):
            base_model, history = base_model or entries.base_model, tuple(history) or entries.history
        self._entries = dict(entries)
        for name, entry in self._entries.items():
            entry.check(name)
        super().__init__({name: entry.spec for name, entry in self._entries.items()}, base_model, history)

    def entry(self, name: str) -> Entry:
        """The entry itself, not a copy."""
        return self._entries[name]


class ComputedDelta(Delta):
    """A delta whose entries are computed when they are asked for, and not kept.

    Args:
        specs: shapes and dtypes of what `compute` returns.
        compute: the entry of a tensor.
        base_model, history: as in `Delta`.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        compute: Callable[[str], Entry],
        base_model: str | None,
        history: Sequence[str],
    ) -> None:
        super().__init__(specs, base_model, history)
        self._compute = compute

    def entry(self, name: str) -> Entry:
        """The entry, computed."""
        return self._compute(name)


def empty_entry(spec: Spec) -> Entry:
    """A delta that changes nothing."""
    return Entry(torch.empty(0, dtype=index_dtype(spec.numel)), torch.empty(0, dtype=spec.values_dtype), spec)


def from_tensors(
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    *,
    base_model: str | None = None,
    history: Sequence[str] = (),
) -> SparseDelta:
    """A delta of given indices and values, as a sparse adapter holds them.

    Args:
        tensors: `(indices [nnz], values [nnz])` by tensor name; on any device, and copied only from another one.
        shapes: the base model's shapes by tensor name.
        dtype: the base model's dtype, or dtypes by tensor name.
        base_model, history: as in `Delta`.

    Raises:
        KeyError: a tensor has no shape or dtype.
        TypeError, ValueError: indices are unsorted, repeated or out of range, or values not finite.
    """
    entries = {}
    for name, (indices, values) in tensors.items():
        shape = tuple(shapes[name])
        spec = Spec(shape, dtype[name] if isinstance(dtype, Mapping) else dtype, values.dtype)
        # Checked as they came: positions that do not fit 32 bits must not wrap around into range.
        Entry(indices.detach().cpu(), values.detach().cpu(), spec).check(name)
        positions = indices.detach().cpu().to(index_dtype(spec.numel))
        entries[name] = Entry(positions, values.detach().cpu(), spec)
    return SparseDelta(entries, base_model=base_model, history=history)


def common_specs(deltas: Sequence[Delta]) -> dict[str, Spec]:
    """The specs of all tensors that any of `deltas` changes; their dtypes promoted where they differ.

    Raises:
        ValueError: there are no deltas, or two have different shapes for a tensor.
    """
    if not deltas:
        raise ValueError("deltas must be at least one, got none")
    specs: dict[str, Spec] = {}
    for delta in deltas:
        for name, spec in delta.specs.items():
            known = specs.setdefault(name, spec)
            if known.shape != spec.shape:
                raise ValueError(f"{name}: deltas must have one shape, got {list(known.shape)} and {list(spec.shape)}")
            dtypes = (
                torch.promote_types(known.dtype, spec.dtype),
                torch.promote_types(known.values_dtype, spec.values_dtype),
            )
            specs[name] = Spec(spec.shape, *dtypes)
    return dict(sorted(specs.items()))


def common_base(deltas: Sequence[Delta]) -> str | None:
    """The base model of all `deltas`; a warning where they name different ones."""
    names = sorted({delta.base_model for delta in deltas if delta.base_model is not None})
    if len(names) > 1:
        warnings.warn(f"deltas of different base models: {', '.join(names)}", stacklevel=3)
    return names[0] if len(names) == 1 else None


def common_history(deltas: Sequence[Delta], step: str) -> tuple[str, ...]:
    """The steps that lead to `step` on several deltas, numbered from 1 where there are more than one."""
    if len(deltas) == 1:
        return (*deltas[0].history, step)
    return (*(f"{i}: {text}" for i, delta in enumerate(deltas, 1) for text in delta.history), step)
