"""Selection of entries for sparse deltas in plain PyTorch: the definition of each operator.

Which entries of a weight `[N, K]` a delta changes is decided from the gradient `dy^T x`, of which nothing but its
largest entries is needed, or from SM3's maxima, whose outer product stands for the second moments. Positions are flat,
`n K + k`, sorted and unique; among equal numbers the smaller position is the larger entry.

Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lora import accumulation_dtype


def outer_product_topk(rows: Tensor, columns: Tensor, count: int, exclude: Tensor) -> Tensor:
    """The positions of the `count` largest `rows[n] columns[k]` but for those in `exclude`: int64 `[count]`, sorted.

    rows `[N]` and columns `[K]`, float32 or float64, finite and at least 0; a product is rounded to that dtype.
    exclude, int32 or int64, sorted and unique; count is at most N K less their number. The operators never form the
    product; this definition does.
    """
    for name, factor in (("rows", rows), ("columns", columns)):
        wrong = (~((factor >= 0) & factor.isfinite())).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"outer_product_topk: {name} must be finite and at least 0, got {factor[at].item()} at position {at}"
            )
    limit = rows.numel() * columns.numel() - exclude.numel()
    if not 0 <= count <= limit:
        raise ValueError(
            f"outer_product_topk: count must be in [0, {limit}], the entries that are not excluded, got {count}"
        )
    product = torch.outer(rows, columns).flatten()
    product[exclude.to(torch.int64)] = -1.0
    order = torch.sort(product, descending=True, stable=True).indices
    return order[:count].sort().values


def product_above(grad_out: Tensor, x: Tensor, threshold: float, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of `dy^T x` whose magnitude is at least `threshold`, or that are NaN, in order of position.

    dy `[M, N]`, x `[M, K]`. Returns positions int64 `[capacity]`, values `[capacity]` in the accumulation dtype, and
    int64 `[1]`, how many there are. Where that is more than `capacity`, positions and values are unspecified; where it
    is less, so is what follows the last. The operators never hold the product as a whole; this definition does.
    """
    dtype = accumulation_dtype(x.dtype)
    product = (grad_out.to(dtype).t() @ x.to(dtype)).flatten()
    above = (~(product.abs().double() < threshold)).nonzero().flatten()
    positions = above.new_full((capacity,), -1)
    values = product.new_zeros(capacity)
    if len(above) <= capacity:
        positions[: len(above)] = above
        values[: len(above)] = product[above]
    return positions, values, above.new_tensor([len(above)])


def sorted_merge(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two sorted unique arrays without a common element as one sorted array, and from where each element came.

    first `[n]` and second `[m]`, both int32 or both int64; source int64 `[n + m]` counts through
    `cat(first, second)`, so that `cat(state_first, state_second)[source]` is the state of the merged array.
    """
    merged, source = torch.cat([first, second]).sort()
    return merged, source


def sorted_contains(indices: Tensor, other: Tensor) -> Tensor:
    """Which elements of the sorted unique `indices [n]` occur in the sorted unique `other [m]`: bool `[n]`."""
    return torch.isin(indices, other, assume_unique=True)
