"""Selection of entries for sparse deltas: the largest of a gradient or of an outer product, and algebra on positions.

Formulas are in `peft_kernels/reference/sparse_selection.py`. Positions are flat, `n K + k`, sorted and unique.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import backends
from ..reference import sparse_selection as reference
from ..reference.lora import accumulation_dtype
from ._checks import dtype_and_shape, first_true
from ._register import register_operator

_SAMPLED_ROWS = 64  # of the product, from which the threshold is estimated
_SAMPLED_TOKENS = 64  # from which the scale of a row is estimated
_MARGINS = (1.25, 3.0)  # entries aimed at, as a share of those wanted, by the first estimate and by the second
_SLACK = 4096  # room beyond what is expected
_WHOLE = 1 << 16  # entries of a product that is too small to estimate anything for
_PART = 1 << 20  # entries of the product that are looked at together where no estimate holds


@torch.no_grad()
def gradient_topk(grad_out: Tensor, x: Tensor, count: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `count` entries of the weight's gradient `dy^T x` of largest magnitude, without the gradient.

    Always exact; among equal magnitudes the smaller position wins. A threshold is estimated from a few rows of the
    product, and one pass finds what reaches it. Where too few do twice, or far too many (a gradient with few distinct
    values, or whose largest entries share a row), another pass goes through the product in parts and keeps the best so
    far.

    Args:
        grad_out: dy `[..., N]`, the gradient of the layer's output.
        x: `[..., K]`, the layer's input, in the same dtype and with the same leading dimensions.
        count: how many entries.
        exclude: positions that are left out, `[nnz]` int32 or int64, sorted and unique.

    Returns:
        Positions, int64 `[count]`, sorted, and the entries there, `[count]` in the accumulation dtype (float32, or
        float64 for float64 tensors).

    Raises:
        TypeError, ValueError: bad arguments, or a gradient with NaN; the message names the first one found.
    """
    if grad_out.dim() < 1 or x.dim() < 1 or grad_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "grad_out and x must be [..., N] and [..., K] with the same leading dimensions, got "
            f"{dtype_and_shape(grad_out)} and {dtype_and_shape(x)}"
        )
    _check_floating("grad_out", grad_out, backends.DTYPES)
    if x.dtype != grad_out.dtype:
        raise TypeError(f"x must have grad_out's dtype, {_name(grad_out.dtype)}, got {dtype_and_shape(x)}")
    tokens = math.prod(x.shape[:-1])
    grad_out, x = grad_out.reshape(tokens, grad_out.shape[-1]), x.reshape(tokens, x.shape[-1])
    entries = grad_out.shape[1] * x.shape[1]
    left_out = 0
    if exclude is not None:
        _check_sorted("exclude", exclude, entries)
        exclude, left_out = exclude.to(torch.int64), exclude.numel()
    _check_count(count, entries - left_out)
    search = _Search(grad_out, x, count, exclude if left_out else None)
    if count == 0:
        return search.nothing()
    return search.estimated() or search.in_parts()


class _Search:
    """One call of `gradient_topk` on checked arguments."""

    def __init__(self, grad_out: Tensor, x: Tensor, count: int, exclude: Tensor | None) -> None:
        self.grad_out, self.x, self.count, self.exclude = grad_out, x, count, exclude
        self.rows, self.columns = grad_out.shape[1], x.shape[1]
        self.kernel = backends.kernel("product_above", x.device.type, x.dtype)
        self.contains = backends.kernel("sorted_contains", x.device.type, torch.float32)

    def estimated(self) -> tuple[Tensor, Tensor] | None:
        """The result by one threshold for the whole product; None where it lets too few or too many through."""
        for margin in _MARGINS:
            found = self._above(0, self.rows, *self._estimate(margin))
            if found is None:
                return None
            if len(found[0]) >= self.count:
                return self._largest(*found)
        return None

    def in_parts(self) -> tuple[Tensor, Tensor]:
        """The result by going through the product in parts: never holds more than a part and the best so far."""
        best = self.nothing()
        threshold = 0.0
        step = max(1, max(_PART, 2 * self.count) // max(1, self.columns))
        for begin in range(0, self.rows, step):
            end = min(self.rows, begin + step)
            found = self._above(begin, end, threshold, (end - begin) * self.columns)
            assert found is not None, "a part holds no more entries than it has"
            best = (torch.cat([best[0], found[0]]), torch.cat([best[1], found[1]]))
            if len(best[0]) > self.count:
                best = self._largest(*best)
                # What is found later lies behind, so it must be larger; it may be equal here, and is dropped then.
                threshold = float(best[1].abs().amin())
        return best

    def nothing(self) -> tuple[Tensor, Tensor]:
        """No entry."""
        empty = torch.empty(0, dtype=torch.int64, device=self.x.device)
        return empty, empty.to(accumulation_dtype(self.x.dtype))

    def _estimate(self, margin: float) -> tuple[float, int]:
        """A threshold that somewhat more than the wanted entries should reach, and room for them."""
        entries = self.rows * self.columns
        if entries <= _WHOLE:
            return 0.0, entries
        # Rows by their scale, so that few of them stand for all; a few tokens tell the scale.
        tokens = self.grad_out[:: max(1, self.grad_out.shape[0] // _SAMPLED_TOKENS)]
        norms = torch.linalg.vector_norm(tokens, dim=0, dtype=accumulation_dtype(self.x.dtype))
        step = max(1, self.rows // _SAMPLED_ROWS)
        chosen = norms.argsort(stable=True)[step // 2 :: step].sort().values
        sample = (self.grad_out[:, chosen].t() @ self.x).abs().flatten()
        wanted = self.count / (entries - (0 if self.exclude is None else self.exclude.numel()))
        allowed = sample
        if self.exclude is not None:
            positions = (chosen[:, None] * self.columns + torch.arange(self.columns, device=chosen.device)).flatten()
            allowed = sample[~self.contains(positions, self.exclude)]
        rank = int(wanted * margin * len(allowed)) + 1
        if rank >= len(allowed):
            return 0.0, entries
        threshold = float(allowed.topk(rank, sorted=False).values.amin())
        if threshold != threshold:  # NaN: in parts, which tells where
            return float("inf"), 0
        reaching = int((sample >= threshold).sum()) / len(sample)
        return threshold, min(entries, int(reaching * margin * entries) + self.count + _SLACK)

    def _above(self, begin: int, end: int, threshold: float, capacity: int) -> tuple[Tensor, Tensor] | None:
        """Entries of rows [begin, end) that reach the threshold and are not excluded; None without room for them."""
        positions, values, found = self.kernel(self.grad_out[:, begin:end], self.x, threshold, capacity)
        number = int(found)
        if number > capacity:
            return None
        positions, values = positions[:number] + begin * self.columns, values[:number]
        if self.exclude is not None:
            allowed = ~self.contains(positions, self.exclude)
            positions, values = positions[allowed], values[allowed]
        at = first_true(values.isnan())
        if at is not None:
            n, k = divmod(int(positions[at]), self.columns)
            raise ValueError(f"the gradient must have no NaN, got one at row {n}, column {k}")
        return positions, values

    def _largest(self, positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The wanted ones of at least as many, in order; `positions` are sorted."""
        size = values.abs()
        last = size.topk(self.count, sorted=False).values.amin()
        keep = size > last
        equal = (size == last).nonzero().flatten()
        keep[equal[: self.count - int(keep.sum())]] = True
        return positions[keep], values[keep]


@torch.no_grad()
def outer_product_topk(rows: Tensor, columns: Tensor, count: int, *, exclude: Tensor | None = None) -> Tensor:
    """The positions of the `count` largest `rows[n] columns[k]`, without the product.

    Args:
        rows: `[N]`, float32 or float64, finite and at least 0, as the maxima of SM3 are.
        columns: `[K]`, likewise, in the same dtype.
        count: how many; among equal products the smaller position wins.
        exclude: positions that are left out, `[nnz]` int32 or int64, sorted and unique.

    Returns:
        int64 `[count]`, sorted.

    Raises:
        TypeError, ValueError, RuntimeError: bad arguments.
    """
    _check_floating("rows", rows, (torch.float32, torch.float64))
    if columns.dtype != rows.dtype:
        raise TypeError(f"columns must have rows' dtype, {_name(rows.dtype)}, got {dtype_and_shape(columns)}")
    for name, factor in (("rows", rows), ("columns", columns)):
        if factor.dim() != 1:
            raise ValueError(f"{name} must be 1-D, got {dtype_and_shape(factor)}")
    entries = rows.numel() * columns.numel()
    if exclude is None:
        exclude = torch.empty(0, dtype=torch.int64, device=rows.device)
    _check_sorted("exclude", exclude, entries)
    _check_count(count, entries - exclude.numel())
    result: Tensor = backends.kernel("outer_product_topk", rows.device.type, rows.dtype)(rows, columns, count, exclude)
    return result


def sorted_merge(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two sorted arrays without a common element as one, and where each element came from.

    Args:
        first: `[n]`, int32 or int64, sorted and unique.
        second: `[m]`, likewise, in the same dtype.

    Returns:
        The merged array `[n + m]`, and source, int64 `[n + m]`: `cat(state_first, state_second)[source]` is the state
        of the merged array.

    Raises:
        TypeError, ValueError: bad arguments, a common element among them.
    """
    _check_pair("first", first, "second", second)
    merged, source = _sorted_kernel("sorted_merge", first)(first, second)
    at = first_true(merged[1:] == merged[:-1])
    if at is not None:
        raise ValueError(f"first and second must have no common element, got {int(merged[at])} in both")
    return merged, source


def sorted_contains(indices: Tensor, other: Tensor) -> Tensor:
    """Which elements of `indices [n]` occur in `other [m]`, both sorted, unique and of one dtype: bool `[n]`.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    _check_pair("indices", indices, "other", other)
    found: Tensor = _sorted_kernel("sorted_contains", indices)(indices, other)
    return found


def sorted_union(first: Tensor, second: Tensor) -> Tensor:
    """The elements of either of two sorted unique arrays of one dtype, sorted and unique.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    added = second[~sorted_contains(second, first)]
    merged: Tensor = _sorted_kernel("sorted_merge", first)(first, added)[0]
    return merged


def sorted_difference(first: Tensor, second: Tensor) -> Tensor:
    """The elements of `first` that are not in `second`, both sorted, unique and of one dtype.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    return first[~sorted_contains(first, second)]


def sorted_intersection(first: Tensor, second: Tensor) -> Tensor:
    """The elements of both of two sorted unique arrays of one dtype.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    return first[sorted_contains(first, second)]


def _sorted_kernel(operator: str, indices: Tensor) -> backends.Function:
    # Backends are kept by the dtype of activations, which these operators do not have; all serve float32.
    return backends.kernel(operator, indices.device.type, torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_floating(name: str, tensor: Tensor, dtypes: Iterable[torch.dtype]) -> None:
    names = [_name(dtype) for dtype in dtypes]
    if _name(tensor.dtype) not in names:
        raise TypeError(f"{name} must be {', '.join(names[:-1])} or {names[-1]}, got {dtype_and_shape(tensor)}")


def _check_count(count: int, limit: int) -> None:
    if not 0 <= count <= limit:
        raise ValueError(f"count must be in [0, {limit}], the entries that are not excluded, got {count}")


def _check_pair(name: str, first: Tensor, other_name: str, other: Tensor) -> None:
    _check_sorted(name, first)
    _check_sorted(other_name, other)
    if other.dtype != first.dtype:
        raise TypeError(
            f"{other_name} must have the dtype of {name}, {_name(first.dtype)}, got {dtype_and_shape(other)}"
        )


def _check_sorted(name: str, positions: Tensor, limit: int | None = None) -> None:
    """Raises unless `positions` are sorted and unique, and below `limit`; a pass over them, and on a GPU a wait."""
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {dtype_and_shape(positions)}")
    if positions.dim() != 1 or not positions.is_contiguous():
        raise ValueError(f"{name} must be 1-D and contiguous, got {dtype_and_shape(positions)}")
    at = first_true(positions[1:] <= positions[:-1])
    if at is not None:
        before, after = positions[at : at + 2].tolist()
        raise ValueError(f"{name} must be sorted and unique, got {after} at position {at + 1} after {before}")
    if limit is None or positions.numel() == 0:
        return
    for wrong in (int(positions[0]), int(positions[-1])):
        if not 0 <= wrong < limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {wrong}")


def _fake_outer_product_topk(rows: Tensor, columns: Tensor, count: int, exclude: Tensor) -> Tensor:
    return rows.new_empty(count, dtype=torch.int64)


def _fake_product_above(grad_out: Tensor, x: Tensor, threshold: float, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(capacity, dtype=accumulation_dtype(x.dtype))
    return x.new_empty(capacity, dtype=torch.int64), values, x.new_empty(1, dtype=torch.int64)


def _fake_sorted_merge(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    size = first.shape[0] + second.shape[0]
    return first.new_empty(size), first.new_empty(size, dtype=torch.int64)


def _fake_sorted_contains(indices: Tensor, other: Tensor) -> Tensor:
    return indices.new_empty(indices.shape[0], dtype=torch.bool)


def _register() -> None:
    for name, definition, fake in (
        ("outer_product_topk", reference.outer_product_topk, _fake_outer_product_topk),
        ("product_above", reference.product_above, _fake_product_above),
        ("sorted_merge", reference.sorted_merge, _fake_sorted_merge),
        ("sorted_contains", reference.sorted_contains, _fake_sorted_contains),
    ):
        register_operator(name, reference=definition, fake=fake, cuda=True, triton="no Triton kernel yet")


_register()
